"""Models in and out: every dtype bit for bit, roles and ties kept, nothing but safetensors opened."""

from __future__ import annotations

import itertools
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import numpy as reference

from fedlink import tensors as fedlink_tensors
from fedlink.blobs import chunk_digests_of, ref_of
from fedlink.companions import INDEX_NAME
from fedlink.errors import FedlinkError, Reason
from fedlink.manifest import Manifest
from fedlink.tensors import DTYPES, Role, read_header, roles_metadata
from fedserver.aggregation.numbers import sound
from fedserver.modelexport import export
from fedserver.modelfiles import ConvertedModel, convert
from tests.support.shards import T, read_safetensors, write_safetensors

B, F, P = Role.BUFFER, Role.FROZEN, Role.PARAMETER
SHAPES = [(), (0,), (1,), (8,), (3, 8), (0, 8), (2, 1, 8)]


def data_of(dtype: str, shape: tuple[int, ...], seed: int) -> bytes:
    """Random bits that are allowed in a tensor that trains."""
    size = int(np.prod(shape)) * DTYPES[dtype].bits // 8
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 2 if dtype == "BOOL" else 256, size, dtype=np.uint8)
    width = max(1, DTYPES[dtype].bits // 8)
    while not sound(raw, dtype):
        bad = [i for i in range(0, size, width) if not sound(raw[i : i + width], dtype)]
        for i in bad:
            raw[i : i + width] = rng.integers(0, 256, width, dtype=np.uint8)
    return raw.tobytes()


def source(path: Path, tensors, aliases=()) -> Path:
    specs = [fedlink_tensors.TensorSpec(t.name, t.dtype, t.shape, t.role) for t in tensors]
    write_safetensors(path, tensors, roles_metadata(specs, dict(aliases)))
    return path


def converted(path: Path, **options) -> ConvertedModel:
    out = path.parent / f"out-{len(list(path.parent.iterdir()))}"
    out.mkdir()
    return convert(path, out, **options)


async def exported(model: ConvertedModel, target: Path) -> list[Path]:
    paths = {f.entry: f.path for f in model.files}

    async def fetch(entry, path):
        assert not path.exists()
        shutil.copy(paths[entry], path)

    return await export(model.manifest, fetch, target)


def contents(paths) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {k: v for p in paths if p.suffix == ".safetensors" for k, v in read_safetensors(p).items()}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(fedlink_tensors, "SHARD_MIN_BYTES", 64)
    monkeypatch.setattr(fedlink_tensors, "SHARD_MAX_BYTES", 256)


async def test_every_dtype_and_shape_bit_for_bit(tmp_path, small_shards):
    tensors = []
    for dtype in DTYPES:
        for k, shape in enumerate(SHAPES):
            if int(np.prod(shape)) * DTYPES[dtype].bits % 8:
                continue
            role = [P if DTYPES[dtype].floating else B, F][k % 2]
            tensors.append(T(f"{dtype}.{k}", dtype, shape, data_of(dtype, shape, k), role))
    model = converted(source(tmp_path / "m.safetensors", tensors))
    assert len(model.files) > 3
    assert {(t.spec.name, t.spec.role) for t in model.manifest.tensors} == {(t.name, t.role) for t in tensors}
    paths = await exported(model, tmp_path / "export")
    wanted = {t.name: (t.dtype, t.shape, t.data) for t in tensors}
    assert contents(paths) == wanted == contents(f.path for f in model.files)
    again = converted(tmp_path / "export")
    assert again.manifest.serialize() == model.manifest.serialize()


async def test_files_are_named_by_their_content(tmp_path, small_shards):
    tensors = [T.of(f"t{i}", "F32", np.full(20, i)) for i in range(6)]
    model = converted(source(tmp_path / "m.safetensors", tensors))
    for i, f in enumerate(model.files):
        data = f.path.read_bytes()
        assert f.entry == model.manifest.files[i]
        assert f.entry.blob == ref_of(data)
        assert f.chunk_digests == chunk_digests_of(data)
        assert f.path.name == f.entry.name == f"model-{i + 1:05d}-of-{len(model.files):05d}.safetensors"
        model.manifest.check_header(i, read_header(f.path))
    assert Manifest.parse(model.manifest.serialize()).by_name.keys() == {t.name for t in tensors}


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 8), max_size=3), order=st.permutations(range(8)))
def test_the_layout_does_not_depend_on_the_source_files(tmp_path_factory, cuts, order):
    tmp_path = tmp_path_factory.mktemp("cut")
    tensors = [T.of(f"t{i}", "F64" if i % 3 else "F16", np.arange(i), F if i % 2 else P) for i in range(8)]
    plain = converted(source(tmp_path / "m.safetensors", tensors), frozen=["t[1357]"])
    (tmp_path / "sharded").mkdir()
    edges = [0, *sorted(cuts), 8]
    weight_map = {}
    for k, (a, b) in enumerate(itertools.pairwise(edges)):
        write_safetensors(tmp_path / "sharded" / f"s{k}.safetensors", [tensors[i] for i in order[a:b]])
        weight_map |= {tensors[i].name: f"s{k}.safetensors" for i in order[a:b]}
    (tmp_path / "sharded" / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    sharded = converted(tmp_path / "sharded", frozen=["t[1357]"])
    assert sharded.manifest.serialize() == plain.manifest.serialize()
    assert len(plain.files) == 2


async def test_tied_names_travel_once_and_come_back(tmp_path, small_shards):
    tensors = [T.of("embed", "F32", np.arange(30)), T.of("w", "F32", np.ones(30))]
    model = converted(source(tmp_path / "m.safetensors", tensors, aliases={"head": "embed"}))
    assert model.manifest.aliases == {"head": "embed"}
    paths = await exported(model, tmp_path / "export")
    assert contents(paths).keys() == {"embed", "w"}
    index = json.loads((tmp_path / "export" / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 240
    assert index["weight_map"].keys() == {"embed", "w"}
    metadata = {p.name: read_header(p).metadata for p in paths if p.suffix == ".safetensors"}
    assert [m["head"] for m in metadata.values() if "head" in m] == ["embed"]
    assert all(m["format"] == "pt" for m in metadata.values())
    assert converted(tmp_path / "export").manifest.aliases == {"head": "embed"}


async def test_a_tied_module_comes_out_as_safetensors_own_loader_wants_it(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_model, save_model

    class Tied(torch.nn.Module):
        def __init__(self, fill):
            super().__init__()
            self.embed = torch.nn.Embedding(4, 3)
            self.norm = torch.nn.BatchNorm1d(3)
            self.head = torch.nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight
            torch.nn.init.constant_(self.embed.weight, fill)

    save_model(Tied(2.0), str(tmp_path / "m.safetensors"))
    model = converted(tmp_path / "m.safetensors", buffers=["norm.running_*"])
    assert len(model.manifest.aliases) == 1
    assert model.manifest.by_name["norm.running_var"].spec.role is B
    assert model.manifest.by_name["norm.num_batches_tracked"].spec.role is B
    assert model.manifest.by_name["norm.weight"].spec.role is P
    (path,) = await exported(model, tmp_path / "export")
    assert path == tmp_path / "export" / "model.safetensors"
    loaded = Tied(0.0)
    assert load_model(loaded, str(path)) == (set(), [])
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.head.weight.eq(2.0).all()


async def test_the_stock_library_reads_what_is_exported(tmp_path):
    tensors = [T.of("a", "F16", np.ones((2, 3))), T.of("b", "I64", -5, B), T.of("c", "BOOL", [True], B)]
    model = converted(source(tmp_path / "m.safetensors", tensors))
    (path,) = await exported(model, tmp_path / "export")
    assert [p.name for p in (tmp_path / "export").iterdir()] == ["model.safetensors"]
    loaded = reference.load_file(path)
    assert {k: (v.dtype, v.tolist()) for k, v in loaded.items()} == {
        t.name: (t.array.dtype, t.array.tolist()) for t in tensors
    }


def test_roles_by_default_by_metadata_and_by_pattern(tmp_path):
    tensors = [T.of(n, "F32", [1]) for n in ("a.weight", "b.weight", "b.mean", "c.mean")] + [T.of("n", "I32", [1], B)]
    write_safetensors(tmp_path / "plain.safetensors", tensors)

    def roles(path, **options):
        return {t.spec.name: t.spec.role for t in converted(path, **options).manifest.tensors}

    assert roles(tmp_path / "plain.safetensors") == {"a.weight": P, "b.weight": P, "b.mean": P, "c.mean": P, "n": B}
    chosen = roles(tmp_path / "plain.safetensors", buffers=["*.mean"], frozen=["b.*", "n"])
    assert chosen == {"a.weight": P, "b.weight": F, "b.mean": F, "c.mean": B, "n": F}
    said = source(tmp_path / "said.safetensors", [T.of("a", "F32", [1], F), T.of("b", "F32", [1], B)])
    assert roles(said) == {"a": F, "b": B}
    assert roles(said, buffers=["a"]) == {"a": B, "b": B}


def test_a_pattern_that_matches_nothing_is_a_mistake(tmp_path):
    path = source(tmp_path / "m.safetensors", [T.of(f"layer{i}", "F32", [1]) for i in range(9)])
    with pytest.raises(FedlinkError, match=r"'Layer\*' matches no tensor.*layer0, .* and 4 more") as e:
        converted(path, frozen=["Layer*"])
    assert e.value.reason is Reason.BAD_CONFIG


@pytest.mark.parametrize(("dtype", "bits"), [("F32", "0000c07f"), ("BF16", "807f"), ("F8_E4M3", "ff"), ("BOOL", "02")])
def test_what_no_update_may_hold_no_trained_tensor_may_begin_with(tmp_path, dtype, bits):
    path = source(tmp_path / "m.safetensors", [T("mask", dtype, (1,), bytes.fromhex(bits), B), T.of("w", "F32", [1])])
    with pytest.raises(FedlinkError, match="'mask'") as e:
        converted(path)
    assert (e.value.reason, e.value.metadata) == (Reason.NOT_FINITE, {"tensor": "mask"})
    assert converted(path, frozen=["mask"]).manifest.by_name["mask"].spec.role is F


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_pickle_is_never_opened(tmp_path, name):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / name).write_bytes(b"cos\nsystem\n")
    for path in (tmp_path / "m", tmp_path / "m" / name):
        with pytest.raises(FedlinkError, match="pickle") as e:
            converted(path)
        assert e.value.reason is Reason.BAD_CONFIG


def test_sources_that_cannot_be_told(tmp_path):
    tensor = [T.of("w", "F32", [1])]
    with pytest.raises(FedlinkError, match="does not exist"):
        converted(tmp_path / "nowhere")
    (tmp_path / "m").mkdir()
    with pytest.raises(FedlinkError, match="no safetensors file"):
        converted(tmp_path / "m")
    write_safetensors(tmp_path / "m" / "a.safetensors", tensor)
    assert len(converted(tmp_path / "m").files) == 1
    write_safetensors(tmp_path / "m" / "b.safetensors", tensor)
    with pytest.raises(FedlinkError, match="2 safetensors files"):
        converted(tmp_path / "m")
    write_safetensors(tmp_path / "m" / "model.safetensors", [T.of("chosen", "F32", [1])])
    assert converted(tmp_path / "m").manifest.by_name.keys() == {"chosen"}


@pytest.mark.parametrize("data", [b"", b"GGUF" * 9, struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 4) + b"[[]]"])
def test_a_malformed_file(tmp_path, data):
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(FedlinkError, match=r"m\.safetensors") as e:
        converted(tmp_path / "m.safetensors")
    assert e.value.reason is Reason.BAD_MANIFEST


def index_of(tmp_path, text) -> Path:
    shutil.rmtree(tmp_path / "m", ignore_errors=True)
    (tmp_path / "m").mkdir()
    write_safetensors(tmp_path / "m" / "a.safetensors", [T.of("w", "F32", [1])])
    write_safetensors(tmp_path / "m" / "b.safetensors", [T.of("v", "F32", [1])])
    (tmp_path / "m" / INDEX_NAME).write_text(text if isinstance(text, str) else json.dumps({"weight_map": text}))
    return tmp_path / "m"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        "[" * 100_000,
        {"w": "../m/a.safetensors"},
        {"w": "/etc/passwd"},
        {"w": "gone.safetensors"},
        {"w": "b.safetensors", "v": "b.safetensors"},
        {"w": "a.safetensors", "x": "a.safetensors"},
        {"w": ["a.safetensors"]},
    ],
)
def test_an_index_that_is_wrong(tmp_path, text):
    with pytest.raises(FedlinkError) as e:
        converted(index_of(tmp_path, text))
    assert e.value.reason is Reason.BAD_MANIFEST


def test_a_tensor_in_two_files(tmp_path):
    path = index_of(tmp_path, {"w": "a.safetensors", "v": "b.safetensors"})
    assert converted(path).manifest.by_name.keys() == {"w", "v"}
    write_safetensors(path / "b.safetensors", [T.of("w", "F32", [1]), T.of("v", "F32", [1])])
    with pytest.raises(FedlinkError, match="two files"):
        converted(path)


async def test_export_leaves_nothing_behind_when_it_fails(tmp_path, small_shards):
    model = converted(source(tmp_path / "m.safetensors", [T.of(f"t{i}", "F32", np.ones(20)) for i in range(4)]))
    calls = []

    async def fetch(entry, path):
        calls.append(entry)
        if len(calls) == 2:
            raise FedlinkError(Reason.UNREACHABLE, "gone")
        shutil.copy(model.files[0].path, path)

    with pytest.raises(FedlinkError, match="gone"):
        await export(model.manifest, fetch, tmp_path / "export")
    assert list((tmp_path / "export").iterdir()) == []

    async def wrong(entry, path):
        shutil.copy(model.files[-1].path, path)

    async def garbage(entry, path):
        path.write_bytes(b"garbage")

    for bad in (wrong, garbage):
        with pytest.raises(FedlinkError) as e:
            await export(model.manifest, bad, tmp_path / "export")
        assert e.value.reason is Reason.BAD_MANIFEST
    await exported(model, tmp_path / "export")
    with pytest.raises(FedlinkError, match=r"holds model-00001.* already") as e:
        await exported(model, tmp_path / "export")
    assert e.value.reason is Reason.BAD_CONFIG


async def test_a_tied_name_that_collides_with_a_key_of_the_metadata(tmp_path):
    model = converted(
        source(tmp_path / "m.safetensors", [T.of("w", "F32", [1])], aliases={"format": "w", "fedlink": "w"})
    )
    (path,) = await exported(model, tmp_path / "export")
    assert read_header(path).metadata["format"] == "pt"
    assert converted(path).manifest.aliases == {"format": "w", "fedlink": "w"}


def test_tensors_of_several_windows(tmp_path):
    big = np.random.default_rng(0).standard_normal(400_000)
    path = source(tmp_path / "m.safetensors", [T.of("big", "F64", big), T.of("w", "F32", [1])])
    model = converted(path)
    assert contents(f.path for f in model.files)["big"][2] == big.tobytes()
    assert model.files[0].entry.blob == ref_of(model.files[0].path.read_bytes())


def test_tensors_that_nobody_needs_are_left_out(tmp_path):
    tensors = [T.of("w", "F32", [1, 2]), T.of("a.position_ids", "I64", [0, 1])]
    path = source(tmp_path / "m.safetensors", tensors, {"tied": "a.position_ids", "v": "w"})
    model = converted(path, dropped=["*.position_ids"])
    assert model.manifest.by_name.keys() == {"w"}
    assert model.manifest.aliases == {"v": "w"}
    with pytest.raises(FedlinkError, match="matches no tensor"):
        converted(path, dropped=["x*"])
