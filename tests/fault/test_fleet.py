"""Many sites at once: they come back together after an outage, and their uploads leave the server time to answer."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass, field
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
from safetensors.numpy import save

from fedclient.patience import Patience
from fedclient.session import Offer, Session
from fedclient.settings import SiteSettings
from fedclient.spool import Outcome
from fedlink import bulk, rpc
from fedlink.transfer import TaskPurpose
from fedlink.v1 import admin_service_pb2 as admin_pb
from fedlink.v1 import types_pb2 as types_pb
from fedlink.v1.admin_service_pb2_grpc import AdminServiceStub
from fedserver.settings import admin_socket
from tests.support.federation import Federation, arrays_equal
from tests.support.line import Line
from tests.support.peer import SCHEMA, manifest_of

pytestmark = pytest.mark.slow

SITES = 20
OUTAGE = 4.0
LINK = 10e6 / 8
"""Bytes a second."""
FLOATS = 1_000_000
"""Of a model and of an update."""
WORKLOAD = {"work": {"trainer": "none:None"}}


@contextlib.asynccontextmanager
async def session(name: str, server: str) -> AsyncIterator[Session]:
    """A daemon's conversation with the server, without a daemon."""
    site = SiteSettings.model_validate({"name": name, "server": server, "workload": WORKLOAD})
    offer = Offer("work", SCHEMA, ("train", "evaluate"), ("*",))
    async with Session(site, [offer], [], rng=random.Random(name), patience=Patience()) as session:
        await session.open()
        yield session


@pytest.mark.timeout(200)
# Python leaves a socket to its collector that is reset just before a diagnosis would make a handshake on it.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning")
async def test_everybody_is_back_soon_after_a_restart(tmp_path: Path) -> None:
    answered: dict[str, list[float]] = {}

    async def poll_for_ever(name: str) -> None:
        async with session(name, federation.address) as s:
            answered[name] = []
            while True:
                await s.poll([], 1.0)
                answered[name].append(time.monotonic())

    with Federation(tmp_path) as federation:
        await asyncio.to_thread(federation.start_server, max_poll_wait=2.0)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(poll_for_ever(f"site-{i}")) for i in range(SITES)]
            while len(answered) < SITES or not all(answered.values()):
                await asyncio.sleep(0.1)
            await asyncio.to_thread(federation.kill_server)
            await asyncio.sleep(OUTAGE)
            await asyncio.to_thread(federation.start_server)
            back = time.monotonic()
            while not all(times[-1] > back for times in answered.values()):
                await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()
    waits = sorted(next(t for t in times if t > back) - back for times in answered.values())
    print("seconds until each was back:", [round(w, 1) for w in waits])
    assert waits[-1] < 10
    # Not all at the same moment.
    assert waits[-1] - waits[0] > 0.3


@dataclass
class Uploader:
    """A site on a slow link, with an update to send.

    Attributes:
        latencies: seconds that each of its control calls took while it was sending.
        seconds: that its uploads took.
    """

    session: Session
    directory: Path
    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    async def take_task(self) -> None:
        while not (order := (await self.session.poll([], 2.0)).order):
            pass
        self.token = order.token

    async def send(self, value: float) -> None:
        """Send an update, with heartbeats meanwhile."""
        beats = asyncio.create_task(self._beat())
        began = time.monotonic()
        data = save({"w": np.full(FLOATS, value, np.float32)})
        manifest = manifest_of(data, types_pb.Manifest.KIND_DELTA).SerializeToString()
        for name, content in (("update", data), ("manifest", manifest)):
            path = self.directory / name
            path.write_bytes(content)
            ref, digests = bulk.hash_file(path)
            await bulk.upload_file(
                self.session.bulk, path, ref, digests, TaskPurpose(self.token), metadata=self.session.metadata
            )
        self.seconds = time.monotonic() - began
        beats.cancel()
        await asyncio.gather(beats, return_exceptions=True)
        outcome = Outcome(num_examples=1, steps=1, metrics={}, compute_seconds=0.0, files=())
        verdict = await self.session.complete(self.token, outcome, ref)
        assert verdict.accepted, verdict

    async def _beat(self) -> None:
        while True:
            await self._timed(self.session.extend(self.token, "uploading", 0, 1))
            await self._timed(self.session.poll([self.token], 0.0))
            await asyncio.sleep(0.3)

    async def _timed(self, call: Awaitable[object]) -> None:
        began = time.monotonic()
        await call
        self.latencies.append(time.monotonic() - began)


async def look_at_the_run(federation: Federation, latencies: list[float]) -> None:
    """Be an operator who looks all the time."""
    path = f"unix:{admin_socket(federation.data_dir)}"
    async with grpc.aio.insecure_channel(path, options=rpc.channel_options()) as channel:
        stub = AdminServiceStub(channel)
        while True:
            began = time.monotonic()
            await stub.GetRun(admin_pb.GetRunRequest(run="r"), timeout=60)
            latencies.append(time.monotonic() - began)
            await asyncio.sleep(0.05)


@pytest.mark.timeout(200)
async def test_control_calls_are_answered_while_everybody_uploads(tmp_path: Path) -> None:
    looks: list[float] = []
    async with contextlib.AsyncExitStack() as stack:
        federation = stack.enter_context(Federation(tmp_path))
        await asyncio.to_thread(federation.start_server)
        start = {"w": np.zeros(FLOATS, np.float32)}
        await asyncio.to_thread(federation.import_model, "start", start)
        await asyncio.to_thread(
            federation.create_run,
            "r",
            workload="work",
            model="start",
            cohort={"min_clients": SITES},
            evaluation={"enabled": False},
        )
        lines = [stack.enter_context(Line(federation.address)) for _ in range(SITES)]
        sites = []
        for number, line in enumerate(lines):
            line.throttle(LINK)
            directory = tmp_path / str(number)
            directory.mkdir()
            sites.append(Uploader(await stack.enter_async_context(session(f"site-{number}", line.address)), directory))
        await asyncio.gather(*(site.take_task() for site in sites))
        looking = asyncio.create_task(look_at_the_run(federation, looks))
        await asyncio.gather(*(site.send(float(number)) for number, site in enumerate(sites)))
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await asyncio.to_thread(federation.until_version, "r", 1)
        got = await asyncio.to_thread(federation.export, "r@1")
        arrays_equal(got, {"w": np.full(FLOATS, np.mean(range(SITES)), np.float32)})
    for what, found in (("sites", [x for s in sites for x in s.latencies]), ("operator", looks)):
        p50, p99, last = np.quantile(found, [0.5, 0.99, 1.0])
        print(f"{len(found)} calls of {what}: p50 {p50:.3f} s, p99 {p99:.3f} s, longest {last:.3f} s")
        assert p99 < 1.0
    times = sorted(site.seconds for site in sites)
    print("seconds of the uploads:", [round(t, 1) for t in times])
    # Nobody waited until others had done.
    assert times[-1] < 2 * times[0] + 3
