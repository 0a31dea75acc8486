"""Models and updates on disk, written and read without the product's own reader and writer."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fedlink.blobs import chunk_digests_of, ref_of
from fedlink.manifest import FileEntry, manifest_of_files
from fedlink.tensors import Kind, Role, read_header
from fedserver.aggregation.pipeline import Contribution, ModelFiles

NUMPY: Mapping[str, Any] = {
    "BOOL": np.bool_,
    **{f"{k}{n}": np.dtype(f"{'uint' if k == 'U' else 'int'}{n}") for k in "UI" for n in (8, 16, 32, 64)},
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "C64": np.complex64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
"""numpy dtypes by safetensors name; the packed ones are missing."""


@dataclass(frozen=True)
class T:
    """A tensor as a test states it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes
    role: Role = Role.PARAMETER

    @classmethod
    def of(cls, name: str, dtype: str, values: Any, role: Role = Role.PARAMETER) -> T:
        array = np.asarray(values).astype(NUMPY[dtype])
        return cls(name, dtype, array.shape, array.tobytes(), role)

    @property
    def array(self) -> npt.NDArray[Any]:
        return np.frombuffer(self.data, NUMPY[self.dtype]).reshape(self.shape)


def write_safetensors(path: Path, tensors: Sequence[T], metadata: Mapping[str, str] | None = None) -> None:
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for t in tensors:
        table[t.name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, at + len(t.data)]}
        at += len(t.data)
    head = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"".join(t.data for t in tensors))


def read_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + n])
    table.pop("__metadata__", None)
    body = data[8 + n :]
    return {k: (v["dtype"], tuple(v["shape"]), body[slice(*v["data_offsets"])]) for k, v in table.items()}


def put(
    directory: Path,
    kind: Kind,
    shards: Sequence[Sequence[T]],
    aliases: Mapping[str, str] | None = None,
) -> ModelFiles:
    """Write shards and make their manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    files, paths, lists = [], [], []
    for i, tensors in enumerate(shards):
        path = directory / f"part-{i}.safetensors"
        write_safetensors(path, tensors)
        files.append((FileEntry(path.name, ref_of(path.read_bytes())), read_header(path)))
        paths.append(path)
        lists.append(listed(path, chunk_digests_of(path.read_bytes())))
    roles = {t.name: t.role for shard in shards for t in shard}
    return ModelFiles(manifest_of_files(kind, files, roles, aliases), paths, lists)


def listed(path: Path, chunk_digests: bytes) -> Path:
    """Write a file's chunk list beside it."""
    beside = path.with_name(path.name + ".chunks")
    beside.write_bytes(chunk_digests)
    return beside


def contribution(
    directory: Path, client: str, examples: int, kind: Kind, shards: Sequence[Sequence[T]]
) -> Contribution:
    made = put(directory / client, kind, shards)
    return Contribution(client, examples, made.manifest, made.files, made.lists)


def get(model: ModelFiles) -> dict[str, T]:
    """Every tensor of a model, read back; fails if the manifest and the files disagree."""
    found = {}
    for index, path in enumerate(model.files):
        assert ref_of(path.read_bytes()) == model.manifest.files[index].blob
        model.manifest.check_header(index, read_header(path))
        for name, (dtype, shape, data) in read_safetensors(path).items():
            found[name] = T(name, dtype, shape, data, model.manifest.by_name[name].spec.role)
    assert found.keys() == model.manifest.by_name.keys()
    return found
