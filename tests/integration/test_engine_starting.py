"""Rounds whose sites do not come, and rounds, tasks and versions around a restart; as in test_engine_restarts."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedserver.rounds.model import Phase
from fedserver.runtime import records
from fedserver.store.queries import runs as run_queries
from fedserver.store.queries import tasks as task_queries
from tests.support.server import QUIET, Server, evaluate, server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "again"


def come_back(fed: Server, *names: str) -> None:
    """Let sites be heard of again under their sessions of before the restart."""
    for name in names:
        site = fed.parts.sites.find(name)
        assert site is not None
        fed.parts.sites.check_session(name, site.row.session or b"")


def end_grace(fed: Server) -> None:
    """Let the term be over that sites have to come back in."""
    fed.parts.sites._grace_ends = 0.0


async def evaluators(fed: Server, run: Any, version: int) -> list[str]:
    rows = await fed.database.run(lambda c: task_queries.evaluation_tasks(c, run.id, version))
    return sorted(r.client for r in rows)


async def test_a_run_whose_round_finds_too_few_sites_fails_once_and_for_good(data: Path):
    async with server(data) as fed:
        await fed.import_model()
        await fed.join("a", "gone")
        gone = fed.parts.sites.find("gone")
        assert gone is not None
        await fed.parts.sites.deregister(gone, gone.row.session or b"")
        run = await fed.create(cohort={"min_clients": 3, "start_deadline": 0.6, "round_attempts": 5}, **QUIET)
        assert "; if they do not, the run fails in" in fed.driver(run).waiting()
        after = await fed.ended(run)
        assert after.state == "failed"
        assert after.reason.startswith("round 1 could not start: 1 of 3 sites (a) were there when its start_deadline")
        assert "not connected: gone (away for" in after.reason
        assert await fed.events(run) == ["run_created", "round_failed", "run_ended"]


async def test_a_start_deadline_is_kept_over_a_restart_and_leaves_a_term(data: Path):
    async with server(data) as fed:
        await fed.import_model()
        run = await fed.create(cohort={"min_clients": 1, "start_deadline": 100}, **QUIET)
        opened = fed.driver(run).round.deadline_at
    async with server(data) as fed:
        assert fed.driver(run).round.deadline_at == opened
        late = replace(fed.driver(run).round, deadline_at=time.time() - 1000)
        await fed.database.run(lambda c: records.save_round(c, run.id, late))
    async with server(data) as fed:
        assert fed.driver(run).round.deadline_at > time.time() + fed.settings.lease_term / 2
        fed.driver(run).round = replace(late, deadline_at=time.time())
        assert "could not start" in (await fed.ended(run)).reason


async def test_a_paused_run_does_not_fail_and_has_its_time_anew_when_it_is_resumed(data: Path):
    async with server(data) as fed:
        await fed.import_model()
        run = await fed.create(cohort={"min_clients": 1, "start_deadline": 100}, **QUIET)
        await fed.driver(run).set_paused(paused=True)
        fed.driver(run).round = replace(fed.driver(run).round, deadline_at=time.time() - 1000)
        await asyncio.sleep(0.6)  # the clock has ticked
        assert fed.driver(run).row.state == "paused"
        await fed.driver(run).set_paused(paused=False)
        assert fed.driver(run).round.deadline_at > time.time() + 50
        recorded = await fed.database.run(lambda c: run_queries.newest_round(c, run.id))
        assert recorded.deadline_at == fed.driver(run).round.deadline_at
        await fed.join("a")
        await fed.train("a")
        assert (await fed.ended(run)).version == 1


async def test_after_a_restart_no_round_begins_without_the_sites_that_were_there(data: Path):
    async with server(data) as fed:
        await fed.import_model()
        await fed.join("a", "b", "c", "d")
    async with server(data) as fed:
        run = await fed.create(cohort={"min_clients": 2}, **QUIET)
        come_back(fed, "a", "b")
        await fed.until(lambda: "has 2 sites (a, b) and waits for c, d" in fed.driver(run).waiting(), "the two")
        come_back(fed, "c")
        await asyncio.sleep(0.6)  # the sites were looked at
        assert fed.driver(run).round.phase is Phase.SELECT
        end_grace(fed)
        await fed.until(lambda: fed.driver(run).round.phase is Phase.COLLECT, "the round")
        assert sorted(fed.driver(run).round.tasks) == ["a", "b", "c"]
        await fed.driver(run).stop()
    # The one that did not come back is not waited for again.
    async with server(data) as fed:
        run = await fed.create("again", cohort={"min_clients": 2}, **QUIET)
        come_back(fed, "a", "b", "c")
        await fed.until(lambda: fed.driver(run).round.phase is Phase.COLLECT, "the round")


async def test_a_site_that_leaves_while_it_is_waited_for_is_not_waited_for_any_more(data: Path):
    async with server(data) as fed:
        await fed.import_model()
        await fed.join("a", "b")
    async with server(data) as fed:
        run = await fed.create(cohort={"min_clients": 1}, **QUIET)
        come_back(fed, "a")
        await asyncio.sleep(0.3)
        assert fed.driver(run).round.phase is Phase.SELECT
        await fed.parts.sites.revoke("b")
        await fed.until(lambda: fed.driver(run).round.phase is Phase.COLLECT, "the round")
        assert sorted(fed.driver(run).round.tasks) == ["a"]


async def test_a_version_made_just_after_a_restart_is_measured_by_the_sites_that_were_there(
    data: Path, monkeypatch: Any
):
    async with server(data) as fed:
        await fed.import_model()
        await fed.join("a", "b", "c")
        run = await fed.create(cohort={"min_clients": 3})
        await evaluate(fed, 0, a=0.1, b=0.1, c=0.1)
        monkeypatch.setattr(fed.driver(run)._aggregation, "_attempt", lambda _: asyncio.sleep(3600))
        await fed.train("a", "b", "c")
    async with server(data) as fed:
        # Nobody is back yet when the aggregation is done again.
        await fed.version(run, 1)
        assert await evaluators(fed, run, 1) == ["a", "b", "c"]
        come_back(fed, "a", "b", "c")
        await evaluate(fed, 1, a=0.9, b=0.3)
        assert (await fed.run(run)).best_version == 0
        await evaluate(fed, 1, c=0.3)
        assert (await fed.ended(run)).best_version == 1
        version = await fed.database.run(lambda c: task_queries.evaluation_tasks(c, run.id, 1))
        assert [t.state for t in version] == ["accepted"] * 3


async def test_a_site_that_does_not_come_back_holds_an_evaluation_up_for_a_term_only(data: Path, monkeypatch: Any):
    async with server(data) as fed:
        await fed.import_model()
        await fed.join("a", "b")
        run = await fed.create(cohort={"min_clients": 2})
        await evaluate(fed, 0, a=0.1, b=0.1)
        monkeypatch.setattr(fed.driver(run)._aggregation, "_attempt", lambda _: asyncio.sleep(3600))
        await fed.train("a", "b")
    async with server(data) as fed:
        await fed.version(run, 1)
        come_back(fed, "a")
        await evaluate(fed, 1, a=0.9)
        end_grace(fed)
        for task in fed.parts.board.of_client("b"):
            task.expires = 0.0
        assert (await fed.ended(run)).best_version == 1
