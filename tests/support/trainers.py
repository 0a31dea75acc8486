"""Sites, model directories and jobs for tests of the training runtime."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedclient.launch import Job, JobKind, Progress, Result, Trainer, Write
from fedclient.settings import SiteSettings, WorkloadSettings
from fedclient.trainer.layout import write_layout
from fedlink.base import read_base
from fedlink.tensors import Role, TensorSpec, apply_metadata, arithmetic_dtype, read_array, read_header

SITE_FILES = Path(__file__).parent / "classes"


def make_site(directory: Path, trainer: str = "toy:Toy", **workload: Any) -> SiteSettings:
    """A site whose workload "w" is one of the classes in tests/support/classes."""
    directory.mkdir(parents=True, exist_ok=True)
    for source in SITE_FILES.glob("*.py"):
        shutil.copy(source, directory)
    data = {} if trainer.endswith(".py") else {"data": {"pids": "pids"}}
    settings = WorkloadSettings(trainer=trainer, **({"stall_after": 30.0} | data | workload))
    return SiteSettings(name="site-1", workload={"w": settings}, directory=directory, state_dir=directory / "state")


def make_trainer(site: SiteSettings) -> Trainer:
    return Trainer(site, "w", "cpu", site.state_dir)


async def init(trainer: Trainer, directory: Path, seed: int = 0) -> Path:
    """A model directory with what the workload's class builds."""
    directory.mkdir(parents=True)
    result = await trainer.run(Job(JobKind.INIT, seed=seed, out_dir=directory), ignore)
    # Small files may lie beside the weights.
    describe_model(directory, [path.name for path in result.files if path.suffix == ".safetensors"])
    return directory


def describe_model(directory: Path, files: list[str]) -> None:
    """Write model.json as the daemon does, roles, aliases and base from the files' metadata."""
    found, aliases, base = [], {}, ()
    for name in files:
        header = read_header(directory / name)
        stored, tied = apply_metadata(header)
        found.append((name, stored))
        aliases |= tied
        base = base or read_base(header)
    write_layout(directory, found, aliases, base)


def ignore(_: Progress) -> None:
    """No one wants to know."""


async def train(
    trainer: Trainer,
    model: Path,
    out: Path,
    *,
    write: Write = Write.DELTA,
    on_progress: Callable[[Progress], None] = ignore,
    **job: Any,
) -> Result:
    out.mkdir(parents=True)
    given = {"kind": JobKind.TRAIN, "client": "site-1", "run": "r", "round": 1, "model_dir": model, "out_dir": out}
    return await trainer.run(Job(**(given | {"write": write} | job)), on_progress)


async def evaluate(trainer: Trainer, model: Path, out: Path, **job: Any) -> Result:
    out.mkdir(parents=True, exist_ok=True)
    given = {"kind": JobKind.EVALUATE, "client": "site-1", "run": "r", "model_dir": model, "out_dir": out}
    return await trainer.run(Job(**(given | job)), ignore)


def raw_tensors(*paths: Path) -> dict[str, tuple[TensorSpec, bytes]]:
    """Every tensor of some files: spec and bytes."""
    found = {}
    for path in paths:
        with path.open("rb") as f:
            for stored in read_header(path).tensors:
                found[stored.spec.name] = (stored.spec, read_array(f.fileno(), stored).tobytes())
    return found


def arrays(*paths: Path) -> dict[str, np.ndarray]:
    """Every tensor of some files as numbers."""
    return {
        name: np.frombuffer(data, arithmetic_dtype(spec.dtype)).reshape(spec.shape)
        for name, (spec, data) in raw_tensors(*paths).items()
    }


def model_files(directory: Path) -> list[Path]:
    table = json.loads((directory / "model.json").read_text())
    return [directory / name for name in table["files"]]


def role(directory: Path, name: str) -> Role:
    return Role(json.loads((directory / "model.json").read_text())["roles"][name])
