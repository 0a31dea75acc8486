"""The out-of-core pass against plain Python arithmetic, bit for bit."""

from __future__ import annotations

import errno
import itertools
import math
import random
import shutil
import struct
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlink.errors import FedlinkError, Reason
from fedlink.run_file import RunSpec
from fedlink.tensors import DTYPES, Kind, Role
from fedserver.aggregation import reading
from fedserver.aggregation.files import ShardReader, naming_a_full_disk
from fedserver.aggregation.fold import aggregate
from fedserver.aggregation.optimizers.sgd import Sgd
from fedserver.aggregation.pipeline import ModelFiles, Pipeline
from fedserver.aggregation.prefix import PrefixSums
from fedserver.aggregation.presets import pipeline_for
from fedserver.aggregation.reducers.mean import WeightedMean
from tests.support.floats import nearest
from tests.support.shards import NUMPY, T, contribution, get, listed, put

FEDAVG = Pipeline(Kind.DELTA, WeightedMean(), Sgd(1.0))
B, F = Role.BUFFER, Role.FROZEN
NARROW = ("F16", "BF16", "F8_E4M3", "F8_E5M2")
FLOATS = (*NARROW, "F32", "F64")


def adopt(version, old=None):
    """Model and master of a new version as the next round reads them; shards not rewritten come from `old`."""
    found = {f.blob: (old.files[i], old.lists[i]) for i, f in enumerate(old.manifest.files)} if old else {}
    found |= {f.entry.blob: (f.path, listed(f.path, f.chunk_digests)) for f in version.files}

    def files(manifest):
        return ModelFiles(manifest, *zip(*(found[f.blob] for f in manifest.files), strict=True))

    return files(version.model), files(version.master) if version.master else None


def float32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def published(x, dtype):
    """A float as the bytes of a dtype, without numpy's or ml_dtypes' rounding."""
    if dtype in ("F64", "F32"):
        return struct.pack("<d" if dtype == "F64" else "<f", x)
    return np.array(nearest(x, dtype)).astype(NUMPY[dtype]).tobytes()


def expected(tensor, master, updates, weights, kind, rate):
    """The new bytes of a tensor and of its master, in plain Python."""
    if tensor.role is F:
        return tensor.data, b""
    if not DTYPES[tensor.dtype].floating:
        best = max(range(len(weights)), key=lambda k: (weights[k], -k))
        return updates[best].data, b""
    out, out_master = b"", b""
    flat = [u.array.astype(np.float64).ravel().tolist() for u in updates]
    base = (master or tensor).array.astype(np.float64).ravel().tolist()
    for i, x in enumerate(base):
        total = 0.0
        for k, n in enumerate(weights):
            total += n * flat[k][i]
        mean = total / sum(weights)
        if tensor.role is Role.PARAMETER:
            mean = x + rate * (mean if kind is Kind.DELTA else -mean)
            if tensor.dtype in NARROW:
                mean = float32(mean)
                out_master += struct.pack("<f", mean)
        out += published(mean, tensor.dtype)
    return out, out_master


def values(dtype):
    bits = NUMPY[dtype]
    if DTYPES[dtype].floating:
        finite = st.floats(-4, 4) | st.sampled_from([0.0, 1.0, 1e-4, 2.0**-10, 1 + 2.0**-8])
        return finite.map(lambda x: np.array(x).astype(bits))
    if dtype == "BOOL":
        return st.booleans().map(np.bool_)
    size = np.dtype(bits).itemsize
    return st.binary(min_size=size, max_size=size).map(lambda b: np.frombuffer(b, bits)[0])


@st.composite
def tensor_like(draw, name, dtype, shape, role):
    n = math.prod(shape)
    items = draw(st.lists(values(dtype), min_size=n, max_size=n))
    return T(name, dtype, shape, b"".join(v.tobytes() for v in items), role)


@st.composite
def rounds(draw):
    """A model in shards, its clients' updates, and the strategy."""
    kind = draw(st.sampled_from([Kind.DELTA, Kind.GRADIENT]))
    wire = draw(st.sampled_from(["F32", "BF16", "F16"]))
    model = []
    for i in range(draw(st.integers(1, 5))):
        role = draw(st.sampled_from(list(Role)))
        dtype = draw(st.sampled_from(FLOATS if role is Role.PARAMETER else list(NUMPY)))
        shape = draw(st.sampled_from([(), (0,), (1,), (5,), (2, 3), (3, 0, 2), (13,)]))
        model.append(draw(tensor_like(f"t{i}", dtype, shape, role)))
    clients = []
    for _ in range(draw(st.integers(1, 4))):
        update = []
        for t in model:
            if t.role is not F:
                sent = ("F64" if t.dtype == "F64" else wire) if t.role is Role.PARAMETER else t.dtype
                update.append(draw(tensor_like(t.name, sent, t.shape, t.role)))
        clients.append(update)
    weights = draw(
        st.lists(st.integers(0, 1 << 40), min_size=len(clients), max_size=len(clients)).filter(lambda w: sum(w) > 0)
    )
    return kind, draw(st.sampled_from([1.0, 0.1, 1.7])), model, clients, weights


def cut(draw, tensors):
    """Spread tensors over files, at random and in a random order."""
    order = draw(st.permutations(tensors))
    at = draw(st.integers(0, len(order)))
    return [order[:at], order[at:]]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), case=rounds(), window=st.sampled_from([1, 2, 5, 1 << 17]))
def test_bit_for_bit_what_plain_arithmetic_gives(data, case, window):
    kind, rate, tensors, clients, weights = case
    pipeline = Pipeline(kind, WeightedMean(), Sgd(rate))
    with TemporaryDirectory() as name, mock.patch.object(reading, "WINDOW", window):
        tmp = Path(name)
        model = put(tmp / "model", Kind.MODEL, cut(data.draw, tensors))
        sent = [
            contribution(tmp, f"c{k}", weights[k], kind, cut(data.draw, update)) for k, update in enumerate(clients)
        ]
        master, wanted = None, {t.name: t for t in tensors}
        masters = {}
        for turn in range(2):
            out = tmp / f"v{turn}"
            out.mkdir()
            # However many had been added up before.
            sums = PrefixSums(tmp / f"sums{turn}")
            if stop := data.draw(st.integers(0, len(sent))):
                sums.add(model.manifest, sent[:stop], pipeline.reducer)
            version = aggregate(model, master, data.draw(st.permutations(sent)), pipeline, out, sums=sums)
            if any(t.role is not F and DTYPES[t.dtype].floating for t in tensors):
                assert version.folded_early == sums.count
            model, master = adopt(version, model)
            for t in tensors:
                mine = [next(u for u in update if u.name == t.name) for update in clients] if t.role is not F else []
                new, new_master = expected(wanted[t.name], masters.get(t.name), mine, weights, kind, rate)
                wanted[t.name] = T(t.name, t.dtype, t.shape, new, t.role)
                if t.role is Role.PARAMETER and t.dtype in NARROW:
                    masters[t.name] = T(t.name, "F32", t.shape, new_master)
            assert get(model) == wanted
            assert (get(master) if master else {}) == masters


def simple(tmp_path, x, deltas, weights, dtype="F32", wire="F32", kind=Kind.DELTA):
    model = put(tmp_path / "model", Kind.MODEL, [[T.of("x", dtype, x)]])
    updates = [
        contribution(tmp_path, f"c{k}", n, kind, [[T.of("x", wire, d)]])
        for k, (d, n) in enumerate(zip(deltas, weights, strict=True))
    ]
    (tmp_path / "out").mkdir(exist_ok=True)
    return model, updates, tmp_path / "out"


def test_within_half_an_ulp_of_the_exact_mean(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(5000).astype(np.float32)
    deltas = (rng.standard_normal((7, 5000)) * 1e-2).astype(np.float32)
    weights = [199, 172, 30, 85, (1 << 24) + 1, 3, 1_000_003]
    model, updates, out = simple(tmp_path, x, deltas, weights)
    new = get(adopt(aggregate(model, None, updates, FEDAVG, out))[0])["x"].array
    for i in range(0, 5000, 7):
        exact = Fraction(float(x[i])) + sum(
            n * Fraction(float(d)) for n, d in zip(weights, deltas[:, i], strict=True)
        ) / sum(weights)
        assert abs(Fraction(float(new[i])) - exact) <= Fraction(float(np.spacing(abs(new[i])))) * Fraction("0.5000001")


def test_the_order_of_arrival_and_the_number_of_threads_change_nothing(tmp_path):
    rng = np.random.default_rng(0)
    shards = [[T.of(f"t{s}.{i}", "BF16", rng.standard_normal(300)) for i in range(3)] for s in range(5)]
    model = put(tmp_path / "model", Kind.MODEL, shards)
    sent = []
    for k in range(4):
        update = [[T.of(t.name, "F32", rng.standard_normal(300)) for t in shard] for shard in shards]
        sent.append(contribution(tmp_path, f"c{k}", 3**k, Kind.DELTA, update))
    results = set()
    for turn, order in enumerate(itertools.permutations(sent)):
        out = tmp_path / f"out{turn}"
        out.mkdir()
        version = aggregate(model, None, order, FEDAVG, out, workers=1 + turn % 4)
        results.add((version.model.serialize(), version.master.serialize()))
    assert len(results) == 1


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_small_step_taken_a_hundred_times_moves_a_16_bit_parameter(tmp_path, dtype):
    model, updates, out = simple(tmp_path, [1.0], [[1e-4], [1e-4]], [3, 1], dtype)
    master = None
    for turn in range(100):
        (out / str(turn)).mkdir()
        model, master = adopt(aggregate(model, master, updates, FEDAVG, out / str(turn)), model)
    moved = get(model)["x"].array.astype(float)[0]
    assert moved == float(np.array(1.01).astype(NUMPY[dtype])) != 1.0
    assert get(master)["x"].array[0] == pytest.approx(1.01, abs=100 * 2**-24)


def test_only_narrow_parameters_have_a_master(tmp_path):
    model = put(
        tmp_path / "model",
        Kind.MODEL,
        [
            [T.of("a", "F32", [1]), T.of("b", "BF16", [1]), T.of("m", "BF16", [1], B)],
            [T.of("c", "F64", [1])],
            [T.of("z", "F16", [1], F)],
        ],
    )
    update = [[T.of("a", "F32", [1]), T.of("b", "F32", [1]), T.of("m", "BF16", [3], B), T.of("c", "F64", [1])]]
    sent = contribution(tmp_path, "c", 1, Kind.DELTA, update)
    (tmp_path / "out").mkdir()
    version = aggregate(model, None, [sent], FEDAVG, tmp_path / "out")
    assert {(t.spec.name, t.spec.dtype) for t in version.master.tensors} == {("b", "F32")}
    assert [f.entry.name for f in version.files] == [
        "part-0.safetensors",
        "part-1.safetensors",
        version.master.files[0].name,
    ]
    model, sent = put(tmp_path / "wide", Kind.MODEL, [[T.of("a", "F32", [1])]]), [[T.of("a", "F32", [1])]]
    (tmp_path / "out2").mkdir()
    version = aggregate(model, None, [contribution(tmp_path, "d", 1, Kind.DELTA, sent)], FEDAVG, tmp_path / "out2")
    assert version.master is None


def test_a_frozen_shard_is_kept_by_digest_and_never_read(tmp_path):
    shards = [[T.of("w", "F32", [1, 2])], [T.of("base", "F32", np.ones(99), F)], [T.of("v", "F32", [3])]]
    model = put(tmp_path / "model", Kind.MODEL, shards, {"tied": "base"})
    model.files[1].unlink()
    sent = contribution(tmp_path, "c", 1, Kind.DELTA, [[T.of("w", "F32", [1, 1]), T.of("v", "F32", [1])]])
    (tmp_path / "out").mkdir()
    version = aggregate(model, None, [sent], FEDAVG, tmp_path / "out")
    assert version.model.files[1] == model.manifest.files[1]
    assert version.model.by_name["base"] == model.manifest.by_name["base"]
    assert version.model.aliases == {"tied": "base"}
    assert [f.entry.name for f in version.files] == ["part-0.safetensors", "part-2.safetensors"]


def test_a_shard_that_comes_out_the_same_keeps_its_digest(tmp_path):
    model, updates, out = simple(tmp_path, [1.0, -2.0], [[0.5, 0.5]], [1])
    first, _ = adopt(aggregate(model, None, updates, FEDAVG, out))
    still = contribution(tmp_path, "still", 1, Kind.DELTA, [[T.of("x", "F32", [0, 0])]])
    (tmp_path / "out2").mkdir()
    second, _ = adopt(aggregate(first, None, [still], FEDAVG, tmp_path / "out2"))
    assert second.manifest.serialize() == first.manifest.serialize()


def test_what_is_not_averaged_comes_from_the_client_with_most_examples(tmp_path):
    def shard(n, flag, z):
        return [[T.of("n", "I64", n, B), T.of("flag", "BOOL", flag, B), T.of("z", "C64", z, B)]]

    model = put(tmp_path / "model", Kind.MODEL, shard(0, True, 0))

    def winner(*weights):
        out = tmp_path / f"out{weights}"
        out.mkdir()
        sent = [
            contribution(tmp_path, name, w, Kind.DELTA, shard((1 << 60) + i, i % 2 == 0, 1j * i))
            for i, (name, w) in enumerate(zip(("a", "b", "c"), weights, strict=True))
        ]
        random.Random(sum(weights)).shuffle(sent)
        new = get(adopt(aggregate(model, None, sent, FEDAVG, out))[0])
        i = int(new["n"].array) - (1 << 60)
        assert (new["flag"].array, new["z"].array) == (i % 2 == 0, 1j * i)
        return "abc"[i]

    assert winner(1, 2, 3) == "c"
    assert winner(1, 3, 3) == "b"
    assert winner(3, 3, 3) == "a"
    assert winner(0, 0, 1) == "c"


def test_no_examples(tmp_path):
    model, updates, out = simple(tmp_path, [1.0], [[1.0], [2.0]], [0, 0])
    for sent in (updates, []):
        with pytest.raises(FedlinkError) as e:
            aggregate(model, None, sent, FEDAVG, out)
        assert e.value.reason is Reason.NO_EXAMPLES


@pytest.mark.parametrize(
    ("dtype", "wire", "x", "delta"),
    [
        ("F32", "F32", 3e38, 3e38),
        ("F64", "F64", 1e308, 1.7e308),
        ("F16", "F32", 60000, 60000),
        ("BF16", "F32", 3e38, 2e38),
        ("F8_E4M3", "F32", 448, 448),
        ("F8_E5M2", "F32", 50000, 50000),
    ],
)
def test_a_result_too_large_for_its_dtype_is_refused_by_name(tmp_path, dtype, wire, x, delta):
    model, updates, out = simple(tmp_path, [1, x], [[1, delta]], [2], dtype, wire)
    with pytest.raises(FedlinkError, match="'x'") as e:
        aggregate(model, None, updates, FEDAVG, out)
    assert (e.value.reason, e.value.metadata) == (Reason.NOT_FINITE, {"tensor": "x"})


def test_a_pass_that_is_not_wanted_any_more_ends_at_its_next_window(tmp_path):
    ones = [1.0] * (5 * reading.WINDOW)
    model, updates, out = simple(tmp_path, ones, [ones], [1])
    asked = itertools.count(1)
    with pytest.raises(FedlinkError) as e:
        aggregate(model, None, updates, FEDAVG, out, unwanted=lambda: next(asked) > 3)
    assert e.value.reason is Reason.DRAINING
    assert next(asked) == 5


def test_a_file_cut_short_behind_our_back(tmp_path):
    model, updates, out = simple(tmp_path, [1.0], [[1.0]], [1])
    updates[0].files[0].write_bytes(updates[0].files[0].read_bytes()[:-1])
    with pytest.raises(FedlinkError, match="'x'") as e:
        aggregate(model, None, updates, FEDAVG, out)
    assert e.value.reason is Reason.BLOB_CORRUPT


@pytest.mark.parametrize("whose", ["model", "master", "update", "list"])
def test_a_bit_that_turned_is_never_averaged(tmp_path, whose):
    size = 600_000
    rng = np.random.default_rng(5)
    model, updates, out = simple(
        tmp_path, rng.normal(size=size), [rng.normal(size=size) for _ in range(2)], [1, 1], "BF16", "F32"
    )
    model, master = adopt(aggregate(model, None, updates, FEDAVG, out), model)
    victim = {"model": model, "master": master, "update": updates[1], "list": updates[1]}[whose]
    path = (victim.lists if whose == "list" else victim.files)[0]
    data = bytearray(path.read_bytes())
    # The lowest bit of the last number: what it makes of the sum passes every other check.
    data[-2 if whose == "model" else -4] ^= 1
    path.write_bytes(data)
    out = tmp_path / "again"
    out.mkdir()
    if whose == "model":  # what is published is the cast of the master; the model itself is not read
        aggregate(model, master, updates, FEDAVG, out)
        shutil.rmtree(out)
        out.mkdir()
        master = None
    with pytest.raises(FedlinkError, match="damaged on the server's disk") as e:
        aggregate(model, master, updates, FEDAVG, out)
    assert e.value.reason is Reason.BLOB_CORRUPT
    assert e.value.metadata["digest"] == victim.manifest.files[0].blob.digest.hex()
    assert e.value.metadata.get("client") == (updates[1].client if victim is updates[1] else None)


def test_a_bit_that_makes_infinity_is_blamed_on_the_disk(tmp_path):
    model, updates, out = simple(tmp_path, [1.0], [[1.0]], [1])
    path = updates[0].files[0]
    path.write_bytes(path.read_bytes()[:-4] + struct.pack("<f", math.inf))
    with pytest.raises(FedlinkError) as e:
        aggregate(model, None, updates, FEDAVG, out)
    assert e.value.reason is Reason.BLOB_CORRUPT


def test_nothing_is_written_over_a_file_that_may_be_an_input(tmp_path):
    model, updates, out = simple(tmp_path, [1.0], [[1.0]], [1])
    model, _ = adopt(aggregate(model, None, updates, FEDAVG, out))
    with pytest.raises(FileExistsError):
        aggregate(model, None, updates, FEDAVG, out)
    assert get(model)["x"].array[0] == 2.0


def test_a_full_disk_is_named():
    with pytest.raises(FedlinkError) as e, naming_a_full_disk(Path("data")):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert e.value.reason is Reason.DISK_FULL
    with pytest.raises(PermissionError), naming_a_full_disk(Path("data")):
        raise PermissionError(errno.EACCES, "no")


def test_more_clients_than_open_files(tmp_path):
    limit = 300
    model, updates, out = simple(tmp_path, [0.0], [[float(k)] for k in range(limit)], [1] * limit)
    new = get(adopt(aggregate(model, None, updates, FEDAVG, out))[0])
    assert new["x"].array[0] == np.float32((limit - 1) / 2)
    with ShardReader(limit=2) as reader:
        for update in updates[:10]:
            reader.read(update.files, update.manifest.by_name["x"], 0, memoryview(bytearray(4)))
            assert len(reader._open) <= 2
    assert not reader._open


def test_presets(tmp_path):
    spec = {"workload": "w", "rounds": 1}
    assert pipeline_for(RunSpec.checked(spec, "t")) == Pipeline(Kind.DELTA, mock.ANY, Sgd(1.0))
    fedsgd = RunSpec.checked({**spec, "strategy": "fedsgd", "server_optimizer": {"learning_rate": 0.5}}, "t")
    # One step on a quadratic: the gradient of x^2 / 2 is x.
    model, updates, out = simple(tmp_path, [8.0], [[8.0]], [5], kind=Kind.GRADIENT)
    new = get(adopt(aggregate(model, None, updates, pipeline_for(fedsgd), out))[0])
    assert new["x"].array[0] == 4.0
    model, updates, out = simple(tmp_path / "delta", [8.0], [[-8.0]], [5])
    half = RunSpec.checked({**spec, "server_optimizer": {"learning_rate": 0.5}}, "t")
    assert get(adopt(aggregate(model, None, updates, pipeline_for(half), out))[0])["x"].array[0] == 4.0


def test_fp8_master_survives_rounds_too_small_to_show(tmp_path):
    model, updates, out = simple(tmp_path, [1.0], [[1e-3]], [1], "F8_E4M3")
    model, master = adopt(aggregate(model, None, updates, FEDAVG, out), model)
    assert get(model)["x"].array.astype(float)[0] == 1.0
    assert get(master)["x"].array[0] == np.float32(1.0 + float(np.float32(1e-3)))


def test_what_is_published_is_the_cast_of_the_master(tmp_path):
    # In float64 the sum lies above the middle of two bfloat16 values, its float32 exactly on it.
    model, updates, out = simple(tmp_path, [1.0], [[2**-8 + 2**-30]], [1], "BF16")
    model, master = adopt(aggregate(model, None, updates, FEDAVG, out), model)
    assert get(master)["x"].array[0] == 1 + 2**-8
    assert get(model)["x"].array.astype(float)[0] == 1.0
