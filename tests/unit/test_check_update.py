"""Every rule an update can break, refused by name."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace

import numpy as np
import pytest

from fedlink.blobs import ref_of
from fedlink.errors import FedlinkError, Reason
from fedlink.manifest import FileEntry, Manifest, TensorEntry
from fedlink.tensors import DTYPES, Kind, Role, Stored, TensorSpec
from fedserver.aggregation.check import check_update
from tests.support.shards import T, put

B, F = Role.BUFFER, Role.FROZEN
MODEL = [
    [
        T.of("w", "F32", np.ones((2, 3))),
        T.of("d", "F64", 1.0),
        T.of("mean", "F16", [1, 2], B),
        T.of("flag", "BOOL", [0, 1], B),
    ],
    [T.of("count", "I64", 7, B), T.of("h", "BF16", np.ones(5)), T.of("none", "F32", np.ones((0, 4)))],
    [T.of("base", "F32", np.ones(4), F)],
]
UPDATE = [
    [T.of("d", "F64", 0.5), T.of("flag", "BOOL", [1, 0], B), T.of("none", "F32", np.ones((0, 4)))],
    [
        T.of("w", "F32", np.ones((2, 3))),
        T.of("mean", "F16", [1, 2], B),
        T.of("count", "I64", 8, B),
        T.of("h", "F32", np.ones(5)),
    ],
]


@pytest.fixture
def model(tmp_path):
    return put(tmp_path / "model", Kind.MODEL, MODEL, {"head": "w"}).manifest


def changed(name, **fields):
    return [[replace(t, **fields) if t.name == name else t for t in shard] for shard in UPDATE]


def values(name, array):
    return changed(name, data=np.asarray(array).tobytes())


def check(model, tmp_path, shards, *, kind=Kind.DELTA, update_dtype="F32", max_bytes=4 << 20, sent=Kind.DELTA):
    update = put(tmp_path / "update", sent, shards)
    check_update(model, update.manifest, update.files, kind=kind, update_dtype=update_dtype, max_bytes=max_bytes)


def refused(model, tmp_path, shards, reason, tensor=None, **options):
    with pytest.raises(FedlinkError) as e:
        check(model, tmp_path, shards, **options)
    assert e.value.reason is reason
    assert e.value.metadata.get("tensor") == tensor
    assert tensor is None or repr(tensor) in e.value.message


def test_a_right_update_passes_in_whatever_files_it_comes(model, tmp_path):
    check(model, tmp_path, UPDATE)
    check(model, tmp_path, [[t] for shard in reversed(UPDATE) for t in reversed(shard)])
    check(model, tmp_path, [*UPDATE, []], sent=Kind.GRADIENT, kind=Kind.GRADIENT)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_deltas_travel_in_the_runs_dtype_but_float64(model, tmp_path, dtype):
    narrow = changed("w", dtype=dtype, data=bytes(12))
    narrow = [[replace(t, dtype=dtype, data=bytes(10)) if t.name == "h" else t for t in s] for s in narrow]
    none = [[replace(t, dtype=dtype) if t.name == "none" else t for t in s] for s in narrow]
    check(model, tmp_path, none, update_dtype=dtype)
    refused(model, tmp_path, narrow, Reason.DTYPE_MISMATCH, "none", update_dtype=dtype)


def test_kind_and_size(model, tmp_path):
    refused(model, tmp_path, UPDATE, Reason.BAD_MANIFEST, sent=Kind.GRADIENT)
    refused(model, tmp_path, UPDATE, Reason.BAD_MANIFEST, sent=Kind.MODEL)
    size = put(tmp_path / "update", Kind.DELTA, UPDATE).manifest.total_size
    check(model, tmp_path, UPDATE, max_bytes=size)
    refused(model, tmp_path, UPDATE, Reason.TOO_LARGE, max_bytes=size - 1)


@pytest.mark.parametrize("name", ["w", "d", "mean", "flag", "count", "h", "none"])
def test_missing(model, tmp_path, name):
    shards = [[t for t in shard if t.name != name] for shard in UPDATE]
    refused(model, tmp_path, shards, Reason.TENSOR_MISSING, name)


def test_unexpected(model, tmp_path):
    for name, why in {"base": "frozen", "head": "tied to 'w'", "other": "not in the model"}.items():
        with pytest.raises(FedlinkError, match=why) as e:
            check(model, tmp_path, [*UPDATE, [T.of(name, "F32", np.ones(4))]])
        assert e.value.reason is Reason.TENSOR_UNEXPECTED
        assert e.value.metadata == {"tensor": name}


def test_shape_dtype_role(model, tmp_path):
    refused(model, tmp_path, changed("w", shape=(3, 2)), Reason.SHAPE_MISMATCH, "w")
    refused(model, tmp_path, changed("w", shape=(6,)), Reason.SHAPE_MISMATCH, "w")
    refused(model, tmp_path, changed("d", shape=(1,)), Reason.SHAPE_MISMATCH, "d")
    refused(model, tmp_path, changed("none", shape=(4, 0)), Reason.SHAPE_MISMATCH, "none")
    refused(model, tmp_path, changed("d", dtype="F32", data=bytes(4)), Reason.DTYPE_MISMATCH, "d")
    refused(model, tmp_path, changed("h", dtype="BF16", data=bytes(10)), Reason.DTYPE_MISMATCH, "h")
    refused(model, tmp_path, changed("w", dtype="I32", role=B), Reason.DTYPE_MISMATCH, "w")
    refused(model, tmp_path, changed("mean", dtype="BF16"), Reason.DTYPE_MISMATCH, "mean")
    refused(model, tmp_path, changed("count", dtype="U64"), Reason.DTYPE_MISMATCH, "count")
    refused(model, tmp_path, changed("w", role=B), Reason.BAD_MANIFEST, "w")
    refused(model, tmp_path, changed("mean", role=Role.PARAMETER), Reason.BAD_MANIFEST, "mean")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(model, tmp_path, bad):
    refused(model, tmp_path, values("w", np.array([0, 0, 0, 0, 0, bad], "<f4")), Reason.NOT_FINITE, "w")
    refused(model, tmp_path, values("d", np.array(bad, "<f8")), Reason.NOT_FINITE, "d")
    refused(model, tmp_path, values("mean", np.array([bad, 0], "<f2")), Reason.NOT_FINITE, "mean")


def test_a_boolean_is_0_or_1(model, tmp_path):
    refused(model, tmp_path, values("flag", np.array([0, 2], np.uint8)), Reason.NOT_FINITE, "flag")


@pytest.mark.parametrize("dtype", [d.name for d in DTYPES.values() if d.floating])
def test_the_last_element_of_a_tensor_of_several_windows_is_seen(tmp_path, dtype):
    size = DTYPES[dtype].bits // 8
    n = (2 << 20) // size + 3
    model = put(tmp_path / "model", Kind.MODEL, [[T("w", dtype, (n,), bytes(n * size), B)]]).manifest
    check(model, tmp_path, [[T("w", dtype, (n,), bytes(n * size), B)]])
    bad = bytes(n * size - 1) + b"\xff" if size == 1 else bytes(n * size - 2) + b"\xff\x7f"
    refused(model, tmp_path, [[T("w", dtype, (n,), bad, B)]], Reason.NOT_FINITE, "w")


def test_a_file_that_contradicts_its_manifest(model, tmp_path):
    honest = put(tmp_path / "a", Kind.DELTA, UPDATE)
    other = put(tmp_path / "b", Kind.DELTA, changed("count", dtype="U64"))
    for name, path in (("count", other.files[1]), (None, tmp_path / "short"), (None, tmp_path / "long")):
        (tmp_path / "short").write_bytes(honest.files[1].read_bytes()[:-1])
        (tmp_path / "long").write_bytes(honest.files[1].read_bytes() + b"\0")
        with pytest.raises(FedlinkError) as e:
            check_update(
                model, honest.manifest, [honest.files[0], path], kind=Kind.DELTA, update_dtype="F32", max_bytes=1 << 20
            )
        assert e.value.reason is Reason.BAD_MANIFEST
        assert e.value.metadata.get("tensor") == name
    with pytest.raises(FedlinkError, match="names 2 files"):
        check_update(model, honest.manifest, honest.files[:1], kind=Kind.DELTA, update_dtype="F32", max_bytes=1 << 20)


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"\xff" * 64, b"pickle" * 20, struct.pack("<Q", 10) + b"not json{}"])
def test_garbage_is_refused_by_the_files_name(tmp_path, data):
    path = tmp_path / "u"
    path.write_bytes(data)
    model = Manifest(
        Kind.MODEL,
        (
            FileEntry(
                "m",
                ref_of(b""),
            ),
        ),
        (),
        {},
    )
    update = Manifest(Kind.DELTA, (FileEntry("u", ref_of(data)),), (), {})
    with pytest.raises(FedlinkError, match="file u of the update") as e:
        check_update(model, update, [path], kind=Kind.DELTA, update_dtype="F32", max_bytes=1 << 20)
    assert e.value.reason is Reason.BAD_MANIFEST


def test_a_header_inflated_by_metadata_is_not_parsed(tmp_path):
    head = json.dumps({"__metadata__": {"x": "[" * (1 << 20)}}).encode()
    path = tmp_path / "u"
    path.write_bytes(struct.pack("<Q", len(head)) + head)
    model = Manifest(Kind.MODEL, (), (), {})
    update = Manifest(Kind.DELTA, (FileEntry("u", ref_of(path.read_bytes())),), (), {})
    with pytest.raises(FedlinkError, match="cannot need so much"):
        check_update(model, update, [path], kind=Kind.DELTA, update_dtype="F32", max_bytes=1 << 22)


def test_the_longest_honest_header_is_parsed(tmp_path):
    names = ["\N{GRINNING FACE}" * 128, "\x01" * 512, "é" * 256]
    shards = [[T(name, "F32", (1,) * 32, bytes(4)) for name in names]]
    model = put(tmp_path / "model", Kind.MODEL, shards).manifest
    check(model, tmp_path, shards)


def test_a_hostile_manifest_of_many_files_is_checked_in_linear_time(tmp_path):
    head = struct.pack("<Q", 2) + b"{}"
    (tmp_path / "empty").write_bytes(head)
    files = tuple(FileEntry(f"f{i}", ref_of(head)) for i in range(4000))
    tensors = tuple(TensorEntry(Stored(TensorSpec(f"t{i}", "F32", (0,)), len(head)), i % 4000) for i in range(60_000))
    update = Manifest(Kind.DELTA, files, tensors, {})
    model = Manifest(Kind.MODEL, files, tensors, {})
    with pytest.raises(FedlinkError, match="disagree about tensor"):
        check_update(model, update, [tmp_path / "empty"] * 4000, kind=Kind.DELTA, update_dtype="F32", max_bytes=1 << 20)


def test_a_file_gone_is_the_servers_own_error(model, tmp_path):
    update = put(tmp_path / "update", Kind.DELTA, UPDATE)
    shutil.rmtree(tmp_path / "update")
    with pytest.raises(OSError, match="update"):
        check_update(model, update.manifest, update.files, kind=Kind.DELTA, update_dtype="F32", max_bytes=1 << 20)


def test_a_check_ends_when_its_verdict_is_not_wanted_any_more(tmp_path):
    shards = [[T.of("w", "F32", np.ones(1 << 20))]]
    model = put(tmp_path / "model", Kind.MODEL, shards).manifest
    looks = []

    def unwanted():
        looks.append(None)
        return len(looks) == 3

    update = put(tmp_path / "update", Kind.DELTA, shards)
    with pytest.raises(FedlinkError) as e:
        check_update(
            model,
            update.manifest,
            update.files,
            kind=Kind.DELTA,
            update_dtype="F32",
            max_bytes=8 << 20,
            unwanted=unwanted,
        )
    assert e.value.reason is Reason.DRAINING
    assert len(looks) == 3
