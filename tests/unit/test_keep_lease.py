"""A task's heartbeats end when they are cancelled, at whatever moment that is."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fedclient import work as work_module
from fedclient.spool import Held
from fedclient.tools import Tools
from fedclient.work import Work
from fedlink.errors import FedlinkError, Reason
from tests.support.orders import order


class Answers:
    """A server that hears one heartbeat, and then has the task's result."""

    lease_term = 3.0
    work: Work

    def __init__(self) -> None:
        self.beats = 0

    async def extend(self, *_: Any) -> bool:
        self.beats += 1
        if self.beats > 1:
            raise FedlinkError(Reason.TASK_COMPLETED, "this task is completed")
        self.work.status.enter("uploading")
        return False


async def test_a_cancelled_lease_ends_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_module, "LEAST_BEAT", 0.0)
    for moment in range(20):
        session = Answers()
        tools = SimpleNamespace(session=session, rng=random.Random(1), client="a")
        session.work = work = Work(cast("Tools", tools), Held(order=order()), None, lambda _w, _m: None)
        lease = asyncio.create_task(work.keep_lease())
        for _ in range(moment):
            await asyncio.sleep(0)
        lease.cancel()
        done, _ = await asyncio.wait({lease}, timeout=1.0)
        assert done, f"cancelled after {moment} turns of the loop, it goes on"
    assert session.beats == 2
