"""Rounds, leases and what operators ask for, against a real database, blob store and spool; without sockets."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from fedlink.blobs import ref_of
from fedlink.errors import FedlinkError, Reason
from fedserver.rounds.model import Phase, TaskState
from fedserver.runtime import aggregation, board, records, tidying
from fedserver.store.disk import Disk
from fedserver.store.queries import runs as run_queries
from fedserver.store.rows import UploadRow
from tests.support.server import (
    ONE,
    QUIET,
    TWO,
    Server,
    server,
    spooled,
    stored_is_needed,
    weights,
)


@pytest.fixture
async def fed(tmp_path: Path) -> AsyncIterator[Server]:
    async with server(tmp_path / "data") as made:
        await made.import_model()
        yield made


# --- A round


async def test_a_round_from_tasks_to_a_version(fed: Server):
    await fed.join("a", "b")
    run = await fed.create(**TWO, **QUIET)
    a, b = await fed.task("a"), await fed.task("b")
    assert "waits for a" in fed.driver(run).waiting()
    assert (await fed.complete(a, await fed.send(a, (1.0, 0.0)), examples=30)).accepted
    assert (await fed.complete(b, await fed.send(b, (0.0, 4.0)), examples=10)).accepted
    after = await fed.ended(run)
    assert (after.state, after.version, after.reason) == ("completed", 1, "all rounds are done")
    assert await weights(fed, run, 1) == [1.75, 3.0]
    assert spooled(fed) == 0
    await fed.until(lambda: stored_is_needed(fed), "nothing stored in vain")
    assert await fed.events(run) == [
        "run_created",
        "round_started",
        "task_accepted",
        "task_accepted",
        "round_closed",
        "round_committed",
        "run_ended",
    ]


async def test_a_round_s_seconds_do_not_count_the_wait_for_sites(fed: Server):
    run = await fed.create(**ONE, **QUIET)
    await asyncio.sleep(0.3)
    await fed.join("a")
    await fed.train("a")
    await fed.ended(run)
    events = await fed.database.run(lambda c: run_queries.events_after(c, run.id, 0))
    committed = next(e for e in events if e.kind == "round_committed")
    task = (await fed.tasks(run))[0]
    assert json.loads(committed.data)["seconds"] == pytest.approx(committed.time - task.issued, abs=0.001)
    assert committed.time - run.created > committed.time - task.issued + 0.3


async def test_a_repeat_gives_the_same_verdict_and_other_content_none(fed: Server):
    await fed.join("a", "b")
    run = await fed.create(**TWO, **QUIET)
    a = await fed.task("a")
    update = await fed.send(a)
    first, second = await asyncio.gather(fed.complete(a, update), fed.complete(a, update))
    assert first == second == await fed.complete(a, update)
    with pytest.raises(FedlinkError) as e:
        await fed.complete(a, update, examples=11)
    assert e.value.reason is Reason.TASK_COMPLETED
    assert [t.state for t in await fed.tasks(run)] == ["accepted", "pending"]


async def test_two_results_at_once_for_one_task_are_not_mixed_up(fed: Server):
    await fed.join("a", "b")
    await fed.create(**TWO, **QUIET)
    a = await fed.task("a")
    update = await fed.send(a)
    outcomes = await asyncio.gather(
        fed.complete(a, update, examples=10), fed.complete(a, update, examples=11), return_exceptions=True
    )
    assert sorted(type(o).__name__ for o in outcomes) == ["FedlinkError", "Verdict"]


async def test_what_is_missing_may_be_sent_and_the_task_goes_on(fed: Server):
    await fed.join("a")
    run = await fed.create(**ONE, **QUIET)
    a = await fed.task("a")
    unknown = ref_of(b"never sent")
    with pytest.raises(FedlinkError) as e:
        await fed.complete(a, unknown)
    assert e.value.reason is Reason.BLOB_MISSING
    assert a.state is TaskState.RUNNING
    assert (await fed.complete(a, await fed.send(a))).accepted
    assert (await fed.ended(run)).version == 1


async def test_a_refused_update_is_named_and_the_round_goes_on_without_it(fed: Server):
    await fed.join("a", "b")
    run = await fed.create(**ONE, **QUIET)
    a, b = await fed.task("a"), await fed.task("b")
    verdict = await fed.complete(a, await fed.send(a, (float("nan"), 1.0)))
    assert (verdict.accepted, verdict.reason, verdict.tensor) == (False, "NOT_FINITE", "w")
    assert (await fed.complete(b, await fed.send(b))).accepted
    assert (await fed.ended(run)).version == 1
    assert [t.state for t in await fed.tasks(run)] == ["refused", "accepted"]


async def test_a_run_that_the_disk_cannot_hold_is_refused_with_what_is_missing(fed: Server, monkeypatch):
    await fed.join("a", "b", "c")
    monkeypatch.setattr(Disk, "room", property(lambda _: 40_000))
    await fed.create()
    with pytest.raises(FedlinkError) as e:
        await fed.create(name="hoarder", rounds=50, retention={"keep_updates": True})
    assert e.value.reason is Reason.BAD_RUN
    assert (
        "takes up to 150 updates of 8.7 kB and 4 versions of 8 B, 1.3 MB in all, and 40.0 kB are free"
        in e.value.message
    )
    assert "make room for 1.3 MB more" in e.value.message
    await fed.create(name="modest", rounds=50, cohort={"select": "count", "count": 2})


async def test_a_site_that_works_for_one_run_is_said_to_by_the_other(fed: Server):
    await fed.join("a")
    first = await fed.create(**ONE, **QUIET)
    second = await fed.create(name="second", **ONE, **QUIET)
    task = await fed.task("a")
    assert task.run.id == first.id
    assert f"waits for a (busy with run {first.name}; this task waits" in fed.driver(second).waiting()


async def test_a_site_that_measures_a_version_before_it_trains_is_said_to(fed: Server):
    await fed.join("a")
    run = await fed.create(**ONE)
    await fed.task("a", "evaluate")
    assert "waits for a (busy with the evaluation of version 0; this task waits" in fed.driver(run).waiting()


async def test_a_failed_round_is_tried_again_and_then_fails_the_run(fed: Server):
    await fed.join("a")
    run = await fed.create(cohort={"min_clients": 1, "round_attempts": 2}, **QUIET)
    for _ in range(2):
        task = await fed.task("a")
        driver = fed.engine.driver_of(task)
        assert await driver.task_ended(task, TaskState.FAILED, {"reason": "EXCEPTION"})
    after = await fed.ended(run)
    assert after.state == "failed"
    assert "failed 2 times" in after.reason
    assert f"of a (failed); `fedserver round show {run.name} 1 --attempt 2` says why" in after.reason
    assert spooled(fed) == 0


async def test_a_new_attempt_has_a_new_token_and_is_held_back(fed: Server, monkeypatch):
    monkeypatch.setattr(board, "RETRY_BASE", 0.5)
    await fed.join("a")
    run = await fed.create(**ONE, **QUIET)
    first = await fed.task("a")
    await fed.engine.driver_of(first).task_ended(first, TaskState.FAILED, {"reason": "CRASHED"}, retryable=True)
    assert "a (failed; its next attempt begins in" in fed.engine.driver_of(fed.parts.board.of_client("a")[0]).waiting()
    failed = time.monotonic()
    second = await fed.task("a")
    assert time.monotonic() - failed > 0.2
    assert (second.row.attempt, second.token == first.token) == (2, False)
    await fed.complete(second, await fed.send(second))
    assert (await fed.ended(run)).version == 1


async def test_an_aggregation_that_fails_fails_the_round_and_not_the_run(fed: Server, monkeypatch):
    await fed.join("a")
    run = await fed.create(**ONE, **QUIET)
    adopt = fed.store.adopt
    monkeypatch.setattr(fed.store, "adopt", lambda *_: (_ for _ in ()).throw(KeyError("a defect")))
    await fed.train("a")
    await fed.until(lambda: fed.driver(run).round.attempt == 2, "the second attempt")
    monkeypatch.setattr(fed.store, "adopt", adopt)
    await fed.train("a")
    assert (await fed.ended(run)).version == 1


LOCKED = OperationalError("UPDATE", {}, sqlite3.OperationalError("database is locked"))


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError(), LOCKED])
@pytest.mark.parametrize("where", ["store", "commit"])
async def test_what_may_pass_is_waited_for_with_the_updates_kept(fed: Server, monkeypatch, error, where):
    monkeypatch.setattr(aggregation, "_TRY_AGAIN_SECONDS", 0.2)
    await fed.join("a")
    run = await fed.create(cohort={"min_clients": 1, "round_attempts": 1}, **QUIET)
    driver, tries = fed.driver(run), []

    def refused(*_: Any) -> None:
        tries.append(1)
        raise error

    async def refused_later(*_: Any) -> None:
        refused()

    patched = (fed.store, "adopt", refused) if where == "store" else (driver, "_commit_version", refused_later)
    monkeypatch.setattr(*patched)
    await fed.train("a")
    await fed.until(lambda: len(tries) == 3, "three attempts")
    assert spooled(fed) == 2
    assert type(error).__name__ in driver.waiting()
    assert "tried again" in driver.waiting()
    fed.engine.drain()
    await asyncio.wait_for(fed.engine.drained.wait(), 5)  # nobody knows how long that would be
    fed.parts.board.draining = False
    monkeypatch.undo()
    ended = await fed.ended(run)
    assert (ended.state, ended.version) == ("completed", 1)
    assert spooled(fed) == 0


async def test_a_database_that_is_locked_at_the_end_keeps_neither_the_run_nor_its_updates(fed: Server, monkeypatch):
    monkeypatch.setattr(tidying, "_TRY_AGAIN_SECONDS", 0.1)
    await fed.join("a")
    run = await fed.create(**ONE, **QUIET)
    forget, refusals = records.forget_updates, iter([LOCKED, LOCKED])

    def locked(*args: Any) -> list[UploadRow]:
        for refusal in refusals:
            raise refusal
        return forget(*args)

    monkeypatch.setattr(records, "forget_updates", locked)
    await fed.train("a")
    assert (await fed.ended(run)).state == "completed"
    await fed.until(lambda: spooled(fed) == 0, "the updates to be deleted")


async def test_a_commit_that_fails_leaves_nothing_behind_and_no_run_hanging(fed: Server, monkeypatch):
    await fed.join("a")
    run = await fed.create(**ONE, **QUIET)
    driver = fed.driver(run)

    async def broken(*_: Any) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(driver, "_commit_version", broken)
    await fed.train("a")
    await fed.until(lambda: driver.round and driver.round.attempt == 2, "the second attempt")
    assert await stored_is_needed(fed)
    monkeypatch.undo()
    await fed.train("a")
    assert (await fed.ended(run)).version == 1


async def test_a_transition_that_an_error_stopped_is_taken_up_again(fed: Server, monkeypatch):
    await fed.join("a")
    run = await fed.create(**ONE, **QUIET)
    driver = fed.driver(run)
    opening = driver._open_round
    failures = iter([OSError("full")])

    async def sometimes(number: int) -> None:
        for failure in failures:
            raise failure
        await opening(number)

    monkeypatch.setattr(driver, "_open_round", sometimes)
    task = await fed.task("a")
    with pytest.raises(OSError, match="full"):
        await driver.task_ended(task, TaskState.FAILED, {"reason": "EXCEPTION"})
    await fed.until(lambda: driver.round and driver.round.attempt == 2, "the second attempt")


# --- Leases


async def test_a_site_that_leaves_is_not_waited_for_and_may_come_back(fed: Server):
    await fed.join("a", "b")
    await fed.create(cohort={"min_clients": 2, "quorum": 2}, **QUIET)
    a = await fed.task("a")
    await fed.engine.release("a")
    assert a.state is TaskState.AWAY
    await fed.engine.revive(a)
    assert a.state is TaskState.RUNNING


async def test_a_lapse_that_comes_late_does_not_send_a_living_site_away(fed: Server):
    await fed.join("a", "b")
    run = await fed.create(**TWO, **QUIET)
    a = await fed.task("a")
    a.expires = 0.0
    assert fed.parts.board.lapsed({"a"}) == [a]
    # The heartbeat comes between the clock's look and its word.
    fed.parts.board.extend(a)
    await fed.driver(run).task_lapsed(a)
    assert a.state is TaskState.RUNNING
    a.expires = 0.0
    await fed.driver(run).task_lapsed(a)
    assert a.state is TaskState.AWAY


async def test_an_update_that_is_being_checked_stays_that(fed: Server, monkeypatch):
    await fed.join("a", "b")
    run = await fed.create(**TWO, **QUIET)
    a = await fed.task("a")
    update = await fed.send(a)
    gate = asyncio.Event()
    judge = fed.completions._check_update

    async def slow(task: Any, claim: Any) -> Any:
        await fed.driver(run).task_changed(task, TaskState.CHECKING)
        await gate.wait()
        return await judge(task, claim)

    monkeypatch.setattr(fed.completions, "_check_update", slow)
    assert await fed.complete(a, update, wait=0.05) is None
    await fed.driver(run).task_changed(a, TaskState.AWAY)
    await fed.driver(run).task_changed(a, TaskState.RUNNING)
    assert a.state is TaskState.CHECKING
    gate.set()
    assert (await fed.complete(a, update)).accepted


async def test_revoking_a_client_ends_its_tasks(fed: Server):
    await fed.join("a", "b")
    run = await fed.create(**ONE, **QUIET)
    a, b = await fed.task("a"), await fed.task("b")
    await fed.parts.sites.revoke("a")
    await fed.engine.revoke("a")
    await fed.complete(b, await fed.send(b))
    assert (await fed.ended(run)).version == 1
    rows = {t.client: t for t in await fed.tasks(run)}
    assert (rows["a"].state, rows["a"].reason) == ("failed", "CLIENT_REVOKED")
    with pytest.raises(FedlinkError):
        await fed.complete(a, ref_of(b"x"))


# --- What operators ask for


async def test_the_same_request_twice_makes_one_run(fed: Server):
    request = os.urandom(16)
    text = '{"name": "r", "workload": "w", "rounds": 1, "model": "start"}'
    first, second = await asyncio.gather(fed.engine.create(text, request), fed.engine.create(text, request))
    assert first.id == second.id
    with pytest.raises(FedlinkError) as e:
        await fed.engine.create(text, os.urandom(16))
    assert e.value.reason is Reason.RUN_EXISTS


async def test_pausing_twice_is_pausing_once(fed: Server):
    run = await fed.create(**ONE, **QUIET)
    for paused in (True, True, False, False):
        await fed.driver(run).set_paused(paused=paused)
    assert [k for k in await fed.events(run) if k != "run_created"] == ["run_paused", "run_resumed"]


async def test_a_paused_run_finishes_its_round_and_begins_no_other(fed: Server):
    await fed.join("a")
    run = await fed.create(rounds=2, **ONE, **QUIET)
    await fed.task("a")
    fed.polls.clear()
    await fed.driver(run).set_paused(paused=True)
    await fed.train("a")
    await fed.version(run, 1)
    await asyncio.sleep(0.4)
    assert fed.driver(run).round.phase is Phase.SELECT
    assert "paused" in fed.driver(run).waiting()
    await fed.driver(run).set_paused(paused=False)
    await fed.train("a")
    assert (await fed.ended(run)).version == 2


async def test_stopping_in_mid_round_leaves_no_bytes_and_a_record(fed: Server):
    await fed.join("a", "b")
    run = await fed.create(**TWO, **QUIET)
    await fed.train("a")
    b = await fed.task("b")
    await fed.driver(run).stop()
    after = await fed.ended(run)
    assert (after.state, after.version) == ("stopped", 0)
    assert spooled(fed) == 0
    with pytest.raises(FedlinkError) as e:
        await fed.complete(b, ref_of(b"x"))
    assert e.value.reason is Reason.ROUND_CLOSED


async def test_an_ended_run_that_is_extended_twice_at_once_goes_on_once(fed: Server):
    await fed.join("a")
    run = await fed.create(**ONE, **QUIET)
    await fed.train("a")
    await fed.ended(run)
    await asyncio.gather(*(fed.engine.extend("r", 2) for _ in range(3)))
    assert (await fed.events(run)).count("run_extended") == 1
    await fed.train("a")
    after = await fed.ended(run)
    assert (after.state, after.version, after.rounds) == ("completed", 2, 2)
    assert [t.attempt for t in await fed.tasks(run, 2)] == [1]
    with pytest.raises(FedlinkError) as e:
        await fed.engine.extend("r", 1)
    assert e.value.reason is Reason.RUN_STATE


async def test_the_number_of_rounds_is_absolute_and_may_fall_to_what_is_done(fed: Server):
    await fed.join("a")
    run = await fed.create(rounds=3, **ONE, **QUIET)
    task = await fed.task("a")
    await fed.parts.sites.deregister(fed.parts.sites.find("a"), fed.parts.sites.find("a").row.session)
    await fed.complete(task, await fed.send(task))
    await fed.until(lambda: (r := fed.driver(run).round) is not None and r.number == 2, "round 2")
    for _ in range(2):
        assert (await fed.engine.extend("r", 2)).rounds == 2
    assert (await fed.events(run)).count("run_extended") == 1
    assert fed.driver(run).round.phase is Phase.SELECT
    await fed.engine.extend("r", 1)
    after = await fed.ended(run)
    assert (after.state, after.version, after.rounds) == ("completed", 1, 1)


async def test_below_the_quorum_an_operator_cannot_close(fed: Server):
    await fed.join("a", "b", "c")
    run = await fed.create(cohort={"min_clients": 2}, **QUIET)
    await fed.train("a")
    with pytest.raises(FedlinkError) as e:
        await fed.driver(run).close_round()
    assert e.value.reason is Reason.BELOW_QUORUM
    await fed.train("b")
    await fed.driver(run).close_round()
    await fed.ended(run)
    assert [t.state for t in await fed.tasks(run)] == ["accepted", "accepted", "closed"]


async def test_a_caller_that_hangs_up_does_not_stop_a_transition_half_way(fed: Server):
    run = await fed.create(**ONE, **QUIET)
    call = asyncio.ensure_future(fed.driver(run).stop())
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (await fed.ended(run)).state == "stopped"


# --- Watching


async def test_watchers_see_every_event_once_and_the_end(fed: Server):
    await fed.join("a")
    run = await fed.create(**ONE, **QUIET)

    async def watch(after: int) -> list[int]:
        return [e.sequence async for e in fed.parts.feed.follow(run.id, after)]

    watching = [asyncio.create_task(watch(0)) for _ in range(3)]
    await fed.train("a")
    seen = await asyncio.gather(*watching)
    assert seen[0] == seen[1] == seen[2] == sorted(set(seen[0]))
    assert await watch(seen[0][1]) == seen[0][2:]
    assert fed.parts.feed._watchers == {}
