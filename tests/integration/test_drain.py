"""A draining server: what it lets go on, what it lets not begin, when it has nothing more to do; as in test_engine."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlink.errors import FedlinkError, Reason
from fedlink.transfer import ImportPurpose, TaskPurpose
from fedserver.rounds.model import Phase, TaskState
from fedserver.runtime.access import Caller
from fedserver.runtime.underway import UnderWay
from tests.support.server import ONE, OPERATOR, QUIET, TWO, Server, server


@pytest.fixture
async def fed(tmp_path: Path) -> AsyncIterator[Server]:
    async with server(tmp_path / "data") as made:
        await made.import_model()
        yield made


async def drained(fed: Server) -> None:
    await fed.until(fed.engine.drained.is_set, "the server to have nothing more to do")


async def not_drained(fed: Server) -> None:
    await asyncio.sleep(0.6)  # the clock has ticked
    assert not fed.engine.drained.is_set()


async def test_with_nothing_under_way_it_is_done_at_once(fed: Server):
    await fed.join("a")
    await fed.create(**ONE, **QUIET)
    poll = asyncio.create_task(fed.parts.board.poll("a", {t.token for t in fed.parts.board.of_client("a")}, 30.0))
    await asyncio.sleep(0.05)
    fed.engine.drain()
    assert await poll is None
    await drained(fed)
    # The task that is there is not handed out any more.
    assert await fed.parts.board.poll("a", set(), 5.0) is None


async def test_an_update_that_comes_in_may_arrive_and_be_judged_and_no_other_is_begun(fed: Server):
    await fed.join("a", "b")
    run = await fed.create(**TWO, **QUIET)
    a, b = await fed.task("a"), await fed.task("b")
    as_a = Caller("a", operator=False)
    await fed.upload(as_a, TaskPurpose(a.token), b"the first file of some")
    fed.engine.drain()
    fed.engine.drain()
    assert str(fed.engine.under_way()) == "waits for 1 upload (a)"
    for caller, purpose in (
        (Caller("b", operator=False), TaskPurpose(b.token)),
        (OPERATOR, ImportPurpose(b"i" * 16)),
    ):
        with pytest.raises(FedlinkError) as e:
            await fed.upload(caller, purpose, b"another one")
        assert (e.value.reason, e.value.retry_after) == (Reason.DRAINING, 2.0)
    await not_drained(fed)
    assert (await fed.complete(a, await fed.send(a))).accepted
    await drained(fed)
    assert [t.state for t in await fed.tasks(run)] == ["accepted", "pending"]


async def test_a_site_that_still_computes_is_not_waited_for_whatever_parts_it_has_sent(fed: Server):
    await fed.join("a")
    await fed.create(**ONE, **QUIET)
    task = await fed.task("a")
    await fed.upload(Caller("a", operator=False), TaskPurpose(task.token), b"what was written first")
    task.activity = "uploading"
    assert fed.engine.under_way().uploads == ("a",)
    task.activity = "computing"
    fed.engine.drain()
    await drained(fed)


async def test_the_version_that_is_being_made_is_committed_and_no_round_begins(fed: Server, monkeypatch: Any):
    await fed.join("a")
    run = await fed.create(rounds=2, **ONE, **QUIET)
    gate, built = asyncio.Event(), fed.parts.versions.built

    @contextlib.asynccontextmanager
    async def held(*args: Any) -> AsyncIterator[Any]:
        await gate.wait()
        async with built(*args) as stored:
            yield stored

    monkeypatch.setattr(fed.parts.versions, "built", held)
    await fed.train("a")
    fed.engine.drain()
    assert str(fed.engine.under_way()) == "waits for the aggregation of run r"
    await not_drained(fed)
    gate.set()
    await drained(fed)
    assert (await fed.run(run)).version == 1
    assert fed.driver(run).round.phase is Phase.SELECT
    assert fed.driver(run).waiting().startswith("the server is draining: nothing begins")
    assert await fed.tasks(run, 2) == []


async def test_a_site_that_went_in_mid_upload_is_waited_for_no_longer_than_its_lease(fed: Server):
    await fed.join("a")
    await fed.create(**ONE, **QUIET)
    task = await fed.task("a")
    await fed.upload(Caller("a", operator=False), TaskPurpose(task.token), b"the first file of some")
    fed.engine.drain()
    await not_drained(fed)
    task.expires = 0.0
    await drained(fed)
    assert task.state is TaskState.AWAY


async def test_who_writes_bytes_is_waited_for(fed: Server):
    writing = ["operator"]
    fed.engine.writers.append(lambda: writing)
    fed.engine.drain()
    assert str(fed.engine.under_way()) == "waits for 1 upload (operator)"
    await not_drained(fed)
    writing.clear()
    await drained(fed)


async def test_no_deadline_runs_out_meanwhile(fed: Server):
    await fed.join("a", "b")
    collecting = await fed.create("collecting", cohort={"min_clients": 2, "deadline": 100}, **QUIET)
    starting = await fed.create("starting", cohort={"min_clients": 3, "start_deadline": 100}, **QUIET)
    await fed.train("a")
    fed.engine.drain()
    for run in (collecting, starting):
        fed.driver(run).round = replace(fed.driver(run).round, deadline_at=time.time() - 1000)
    await asyncio.sleep(0.6)  # the clock has ticked
    assert fed.driver(collecting).round.phase is Phase.COLLECT
    assert fed.driver(starting).row.state == "active"


def test_what_is_under_way_in_a_sentence():
    everything = UnderWay(("ada", "bob"), ("r", "s"))
    assert str(everything) == "waits for 2 uploads (ada, bob) and the aggregations of runs r, s"
    assert everything
    assert str(UnderWay()) == "nothing is under way; the server ends now"
    assert not UnderWay()
