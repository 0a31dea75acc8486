"""A site with the `Adder` workload, and tasks for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedclient.agent import Agent
from fedclient.settings import SiteSettings, load_site
from fedlink.tensors import Kind
from fedlink.v1 import coordination_service_pb2 as pb
from fedlink.v1 import types_pb2 as types_pb
from tests.support.fake_server import FakeServer
from tests.support.shards import T, put

WORKLOADS = Path(__file__).parent / "workloads"


class Site:
    """A directory with a site.toml; its workload "adder" is a class of tests/support/workloads."""

    def __init__(
        self,
        directory: Path,
        server: str,
        *,
        size: int = 4,
        extra: str = "",
        workload: str = "",
        trainer: str = "adder:Adder",
    ) -> None:
        self.directory = directory
        self.control = directory / "control"
        self.control.mkdir(parents=True, exist_ok=True)
        module = f"{trainer.partition(':')[0]}.py"
        (directory / module).write_bytes((WORKLOADS / module).read_bytes())
        self.config = directory / "site.toml"
        self.config.write_text(
            f"""
name = "site"
server = "{server}"
devices = ["cpu"]
{extra}
[workload.adder]
trainer = "{trainer}"
{workload}
[workload.adder.data]
control = "control"
size = {size}
"""
        )

    @property
    def settings(self) -> SiteSettings:
        return load_site(self.config)

    def set(self, name: str) -> None:
        """Steer the workload."""
        (self.control / name).touch()

    def clear(self, name: str) -> None:
        (self.control / name).unlink()

    @property
    def trained(self) -> list[str]:
        """One line for each training begun."""
        return self._lines("trained")

    @property
    def steps(self) -> list[int]:
        """Every step taken, by its number in its training."""
        return [int(line) for line in self._lines("steps")]

    @property
    def checkpoints(self) -> list[str]:
        """What there is of checkpoints."""
        directory = self.directory / "fedclient-state" / "checkpoints"
        return sorted(str(path.relative_to(directory)) for path in directory.glob("*/*"))

    @property
    def loaded(self) -> list[str]:
        """Every tensor that `Watched` was given, by name."""
        return self._lines("loaded")

    @property
    def built(self) -> list[str]:
        """The trainer's process for each model that `Watched` built."""
        return self._lines("built")

    def _lines(self, name: str) -> list[str]:
        path = self.control / name
        return path.read_text().splitlines() if path.exists() else []


def add_model(server: FakeServer, directory: Path, *, size: int = 4, start: float = 0.0) -> types_pb.BlobRef:
    """Make a model for `Adder` readable; two shards."""
    shards = [
        [T.of("w", "F32", np.full(size, start))],
        [T.of("b", "F32", np.full(2, start))],
    ]
    model = put(directory, Kind.MODEL, shards)
    for path in model.files:
        server.add_blob(path.read_bytes())
    return server.add_blob(model.manifest.serialize())


def train_task(model: types_pb.BlobRef, **fields: Any) -> pb.Task:
    """A training task."""
    work = pb.TrainWork(
        update=fields.pop("update", types_pb.Manifest.KIND_DELTA),
        update_dtype=types_pb.DTYPE_F32,
        max_update_bytes=fields.pop("max_update_bytes", 1 << 30),
    )
    return pb.Task(**_common(model, fields), train=work)


def evaluate_task(model: types_pb.BlobRef, **fields: Any) -> pb.Task:
    """An evaluation task."""
    return pb.Task(**_common(model, fields), evaluate=pb.EvaluateWork())


def _common(model: types_pb.BlobRef, fields: Mapping[str, Any]) -> dict[str, Any]:
    common = {"token": os.urandom(16), "run": "r1", "round": 1, "attempt": 1, "workload": "adder", "seed": 1}
    return {**common, "settings_json": "{}", "model": model, **fields}


@contextlib.asynccontextmanager
async def running(site: Site) -> AsyncIterator[Agent]:
    """A daemon; at the end it is drained and must have ended well."""
    agent = Agent(site.settings)
    task = asyncio.create_task(agent.run())
    try:
        yield agent
        agent.drain()
        await asyncio.wait_for(task, 20)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def killed(site: Site) -> AsyncIterator[None]:
    """A daemon that is torn down without notice at the end, its state directory as it is."""
    task = asyncio.create_task(Agent(site.settings).run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def values(server: FakeServer, request: pb.CompleteTaskRequest) -> dict[str, list[float]]:
    manifest, files = server.update_of(request)
    out = {}
    for entry in manifest.tensors:
        data = np.frombuffer(files[entry.file], np.float32, entry.spec.elements, entry.stored.offset)
        out[entry.spec.name] = data.tolist()
    return out


def journal(site: Site) -> list[dict]:
    return [json.loads(p.read_text()) for p in (site.directory / "fedclient-state" / "journal").glob("*.json")]
