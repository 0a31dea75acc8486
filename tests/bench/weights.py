"""The benchmark's weights on disk: the first model, and how far each version is from the exact average."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlink.manifest import Manifest
from fedlink.tensors import ShardWriter, TensorSpec, raw_bytes, read_array
from tests.bench.workload import check, initial, shapes


def size(model: str) -> int:
    """Bytes of a model's tensors."""
    return sum(TensorSpec(name, "F32", shape).nbytes for name, shape in shapes(model).items())


def write_initial(model: str, path: Path) -> None:
    """Write `initial(model)` as safetensors, letting each array go once it is written."""
    state = initial(model)
    specs = [TensorSpec(name, "F32", array.shape) for name, array in state.items()]
    with ShardWriter(path, specs) as writer:
        for spec in specs:
            writer.write(spec.name, raw_bytes(state.pop(spec.name)))


@dataclass(frozen=True)
class Version:
    """One version's files under names of the benchmark's own, so that they outlive their retirement."""

    manifest: Manifest
    files: list[Path]

    @classmethod
    def hold(cls, data_dir: Path, manifest: bytes, target: Path) -> Version:
        """Link a version's blobs, named by their digests, from a server's data directory."""
        target.mkdir(parents=True)
        parsed = Manifest.parse(blob(data_dir, manifest).read_bytes())
        files = []
        for file in parsed.files:
            files.append(target / file.name)
            os.link(blob(data_dir, file.blob.digest), files[-1])
        return cls(parsed, files)

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        entry = self.manifest.by_name[name]
        with self.files[entry.file].open("rb") as f:
            return read_array(f.fileno(), entry.stored)

    def release(self) -> None:
        """Give the names up."""
        for file in self.files:
            file.unlink()


def blob(data_dir: Path, digest: bytes) -> Path:
    """Where a server keeps a committed blob."""
    return data_dir / "blobs" / digest.hex()[:2] / digest.hex()


def deviation(before: Version, after: Version, clients: int) -> dict[str, float]:
    """`workload.check` tensor by tensor, so that a few tensors are in memory and not two models.

    Returns:
        "deviation", and "float32_step": the distance of two float32 numbers at the largest weight.
    """
    assert before.manifest.by_name.keys() == after.manifest.by_name.keys()
    worst = largest = 0.0
    for name in before.manifest.by_name:
        x, y = before.read(name), after.read(name)
        worst = max(worst, check({name: x}, {name: y}, clients))
        largest = max(largest, float(np.abs(y).max()))
    return {"deviation": worst, "float32_step": float(np.spacing(np.float32(largest)))}
