"""The server's parts without its sockets: a real database, store and spool, and sites that are function calls."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedlink import PROTOCOL_VERSION
from fedlink.blobs import BlobRef, chunk_digests_of, chunk_spans, ref_of
from fedlink.tensors import Kind
from fedlink.transfer import ImportPurpose, Purpose, TaskPurpose
from fedlink.v1 import coordination_service_pb2 as pb
from fedserver.app import Storage, _build
from fedserver.runtime.access import Caller
from fedserver.runtime.board import OpenTask, Verdict
from fedserver.runtime.completion import Completions, read_claim
from fedserver.runtime.driver import RunDriver
from fedserver.runtime.engine import Engine
from fedserver.runtime.parts import Parts
from fedserver.runtime.recovery import recover
from fedserver.settings import ServerSettings
from fedserver.store.blobs import DirectoryBlobStore
from fedserver.store.database import Database
from fedserver.store.queries import models as model_queries
from fedserver.store.queries import runs as run_queries
from fedserver.store.queries import tasks as task_queries
from fedserver.store.rows import RunRow, TaskRow
from fedserver.store.spool import Spool
from tests.support.shards import T, put, read_safetensors

OPERATOR = Caller("operator", operator=True)
SCHEMA = '{"type": "object", "additionalProperties": false, "properties": {}}'
MODEL = [[T.of("w", "F32", [1.0, 2.0])]]
QUIET = {"evaluation": {"enabled": False}}
TWO = {"cohort": {"min_clients": 2}}
ONE = {"cohort": {"min_clients": 1}}


@dataclass
class Server:
    """One life of a server in a directory."""

    root: Path
    settings: ServerSettings
    database: Database
    store: DirectoryBlobStore
    spool: Spool
    parts: Parts
    engine: Engine
    completions: Completions
    polls: dict[str, list[bytes]] = field(default_factory=dict)

    # --- Operators

    async def import_model(self, name: str = "start") -> None:
        """Bring the two-number model in as an operator would."""
        model = await asyncio.to_thread(put, self.root / "source", Kind.MODEL, MODEL)
        data = model.manifest.serialize()
        purpose = ImportPurpose(os.urandom(16))
        for path in model.files:
            await self.upload(OPERATOR, purpose, path.read_bytes())
        await self.upload(OPERATOR, purpose, data)
        await self.parts.versions.take_in(purpose.id, name, ref_of(data))

    async def create(self, name: str = "r", **spec: Any) -> RunRow:
        """Start a run of workload "w" from model "start"."""
        table = {"name": name, "workload": "w", "rounds": 1, "model": "start", **spec}
        return await self.engine.create(json.dumps(table), os.urandom(16))

    def driver(self, run: RunRow) -> RunDriver:
        """The driver of a live run."""
        found = self.engine.driver(run.id)
        assert found is not None
        return found

    async def run(self, run: RunRow) -> RunRow:
        """The run as it is now."""
        return await self.database.run(lambda c: run_queries.run_by_id(c, run.id))

    async def events(self, run: RunRow) -> list[str]:
        """Kinds of the events so far."""
        return [e.kind for e in await self.database.run(lambda c: run_queries.events_after(c, run.id, 0))]

    async def tasks(self, run: RunRow, number: int = 1, attempt: int = 1) -> list[TaskRow]:
        """The records of a round's training tasks."""
        return await self.database.run(lambda c: task_queries.round_tasks(c, run.id, number, attempt))

    # --- Sites

    async def join(self, *names: str) -> None:
        """Register sites and let the runs hear of it."""
        offer = pb.RegisterClientRequest.WorkloadOffer(
            name="w", settings_schema_json=SCHEMA, abilities=["train", "gradient", "evaluate"]
        )
        for name in names:
            request = pb.RegisterClientRequest(
                instance_id=os.urandom(16), protocol_version=PROTOCOL_VERSION, workloads=[offer]
            )
            await self.parts.sites.register(name, request)

    async def task(self, client: str, kind: str = "train", *, wait: float = 5.0) -> OpenTask:
        """Poll until a task of this kind comes; others are kept as held."""
        held = self.polls.setdefault(client, [])
        while True:
            task = await self.parts.board.poll(client, set(held), wait)
            assert task is not None, f"no {kind} task for {client}"
            await self.engine.revive(task)
            held.append(task.token)
            if task.row.kind == kind:
                return task

    async def upload(self, caller: Caller, purpose: Purpose, data: bytes) -> bytes:
        """Send a blob whole; returns the upload's id."""
        ref, chunks = ref_of(data), chunk_digests_of(data)
        upload_id = await self.parts.access.start_upload(caller, purpose, ref, chunks)
        start = self.spool.committed(upload_id)
        pieces = [memoryview(data)[at : at + n] for at, n in chunk_spans(start, len(data))]
        if pieces:
            self.spool.append(upload_id, start, pieces)
        return upload_id

    async def send(self, task: OpenTask, values: Sequence[float] = (0.5, 0.5)) -> BlobRef:
        """Upload an update for a task; returns its manifest."""
        caller = Caller(task.client, operator=False)
        shards = [[T.of("w", "F32", values)]]
        made = await asyncio.to_thread(put, self.root / "out" / task.token.hex(), Kind.DELTA, shards)
        for path in made.files:
            await self.upload(caller, TaskPurpose(task.token), path.read_bytes())
        data = made.manifest.serialize()
        await self.upload(caller, TaskPurpose(task.token), data)
        return ref_of(data)

    async def complete(
        self, task: OpenTask, update: BlobRef | None = None, *, examples: int = 10, wait: float = 10.0, **metrics: float
    ) -> Verdict | None:
        """Hand in a result."""
        claim = read_claim(update, examples, 1, metrics, seconds=0.1)
        return await self.completions.complete(task.client, task.token, claim, wait)

    async def train(self, *clients: str, values: Sequence[float] = (0.5, 0.5)) -> None:
        """Fetch, send and complete one training task of each site."""
        for client in clients:
            task = await self.task(client)
            verdict = await self.complete(task, await self.send(task, values))
            assert verdict is not None
            assert verdict.accepted, verdict

    async def until(self, look: Callable[[], Any], what: str, seconds: float = 10.0) -> Any:
        """Wait for something to be true; `look` may be a coroutine function."""
        async with asyncio.timeout(seconds):
            while True:
                seen = look()
                if asyncio.iscoroutine(seen):
                    seen = await seen
                if seen:
                    return seen
                await asyncio.sleep(0.01)
        raise AssertionError(what)

    async def version(self, run: RunRow, number: int) -> None:
        """Wait until a version is committed."""

        async def there() -> bool:
            return (await self.run(run)).version >= number

        await self.until(there, f"version {number}")

    async def ended(self, run: RunRow) -> RunRow:
        """Wait until a run has ended."""
        await self.until(lambda: self.engine.driver(run.id) is None, "the end of the run")
        return await self.run(run)


@contextlib.asynccontextmanager
async def server(root: Path, **settings: Any) -> AsyncIterator[Server]:
    """A server's life, from recovery to the end; what was committed stays in `root`, as after SIGKILL."""
    made = ServerSettings(data_dir=root, **settings)
    root.mkdir(exist_ok=True)
    storage = Storage.at(made)
    store, spool = storage.store, storage.spool
    database = Database(made.database_url, disk=storage.disk)
    database.open()
    await recover(database, store, spool, root / "tmp")
    parts, engine = _build(made, database, storage)
    await parts.sites.load()
    await engine.start()
    completions = Completions(database, engine, parts.board, parts.access, parts.versions)
    try:
        yield Server(root, made, database, store, spool, parts, engine, completions)
    finally:
        await engine.close()
        database.close()


async def weights(fed: Server, run: RunRow, version: int) -> list[float]:
    """The weights of a version."""
    _, ref, _ = await fed.parts.versions.find(f"{run.name}@{version}")
    (path,) = fed.parts.versions.files_of(ref.digest).files
    return np.frombuffer(read_safetensors(path)["w"][2], np.float32).tolist()


def spooled(fed: Server) -> int:
    """How many uploads lie in the spool."""
    return len(list(fed.spool.ids()))


async def stored_is_needed(fed: Server) -> bool:
    """Whether what is stored is what something refers to."""
    needed = await fed.database.run(model_queries.needed)
    return set(fed.store.digests()) == needed


async def evaluate(fed: Server, version: int, **accuracy: float) -> None:
    """Fetch and complete the evaluation of a version."""
    for client, value in accuracy.items():
        task = await fed.task(client, "evaluate")
        assert task.row.version == version
        assert (await fed.complete(task, accuracy=value)).accepted
