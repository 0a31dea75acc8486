"""A run goes on after a restart, wherever it was; as in test_engine, with several lives of one server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedlink.blobs import Buffer
from fedlink.errors import FedlinkError, Reason
from fedserver.rounds.model import Phase, TaskState
from fedserver.store.queries import models as model_queries
from fedserver.store.queries import runs as run_queries
from fedserver.store.queries import tasks as task_queries
from fedserver.store.rows import RunRow, TaskRow
from tests.support.server import ONE, QUIET, TWO, Server, evaluate, server, spooled, stored_is_needed, weights


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "again"


async def test_a_round_goes_on_after_a_restart_in_every_phase(data: Path, monkeypatch):
    async with server(data) as fed:
        await fed.import_model()
        run = await fed.create(**TWO, **QUIET)
    async with server(data) as fed:  # SELECT
        assert "waits for 2 more sites" in fed.driver(run).waiting()
        await fed.join("a", "b")
        await fed.train("a")
    async with server(data) as fed:  # COLLECT
        assert fed.driver(run).round.accepted == ("a",)
        await fed.join("b")
        monkeypatch.setattr(fed.driver(run)._aggregation, "_attempt", lambda _: asyncio.sleep(3600))
        await fed.train("b")
        assert fed.driver(run).round.phase is Phase.AGGREGATE
    async with server(data) as fed:  # AGGREGATE
        after = await fed.ended(run)
        assert (after.state, after.version) == ("completed", 1)
        assert await weights(fed, run, 1) == [1.5, 2.5]
        assert spooled(fed) == 0
    async with server(data) as fed:
        assert fed.engine.driver(run.id) is None
        assert await stored_is_needed(fed)


async def test_a_deadline_that_passed_while_the_server_was_down_leaves_a_term(data: Path):
    async with server(data) as fed:
        await fed.import_model()
        await fed.join("a", "b")
        run = await fed.create(cohort={"min_clients": 2, "deadline": 0.5}, **QUIET)
        await fed.train("a")
    await asyncio.sleep(0.6)
    async with server(data) as fed:
        await asyncio.sleep(0.5)  # the clock has ticked
        await fed.join("b")
        await fed.train("b")
        assert (await fed.ended(run)).version == 1


async def test_updates_of_a_round_that_ended_just_before_a_crash_are_deleted(data: Path, monkeypatch):
    async with server(data) as fed:
        await fed.import_model()
        await fed.join("a")
        run = await fed.create(rounds=2, **ONE, **QUIET)
        monkeypatch.setattr(fed.driver(run).tidying, "drop_updates", lambda _: asyncio.sleep(3600))
        await fed.train("a")
        await fed.version(run, 1)
        assert spooled(fed) == 2
    async with server(data) as fed:
        assert spooled(fed) == 0
        assert fed.driver(run).round.number == 2


async def test_versions_of_a_run_that_ended_just_before_a_crash_are_retired(data: Path, monkeypatch):
    async with server(data) as fed:
        await fed.import_model()
        await fed.join("a")
        run = await fed.create(rounds=3, retention={"keep_versions": 1}, **ONE, **QUIET)
        monkeypatch.setattr(fed.driver(run).tidying, "retire", lambda: None)
        for _ in range(3):
            await fed.train("a")
        await fed.ended(run)
        assert await kept_versions(fed, run) == [0, 1, 2, 3]
    async with server(data) as fed:
        await fed.until(lambda: not fed.engine._leavings, "old versions are gone")
        assert await kept_versions(fed, run) == [3]
        assert await stored_is_needed(fed)


async def kept_versions(fed: Server, run: RunRow) -> list[int]:
    return [v.number for v in await fed.database.run(lambda c: run_queries.list_versions(c, run.id))]


async def test_a_run_fails_in_the_instant_its_last_attempt_does(data: Path, monkeypatch):
    async with server(data) as fed:
        await fed.import_model()
        await fed.join("a")
        run = await fed.create(cohort={"min_clients": 1, "round_attempts": 2, "task_retries": 0}, **QUIET)
        first = await fed.task("a")
        await fed.engine.driver_of(first).task_ended(first, TaskState.FAILED, {"reason": "CRASHED"})
        assert fed.driver(run).round.attempt == 2
    # Attempts of an earlier life count, and the crash comes before anything but the round's failure is done.
    async with server(data) as fed:
        await fed.join("a")
        monkeypatch.setattr(fed.driver(run), "_leave", lambda: asyncio.sleep(0))
        second = await fed.task("a")
        await fed.engine.driver_of(second).task_ended(second, TaskState.FAILED, {"reason": "CRASHED"})
    async with server(data) as fed:
        assert fed.engine.driver(run.id) is None
        after = await fed.engine.find(run.name)
        assert (after.state, after.reason.split(",")[0]) == ("failed", "round 1 failed 2 times")
        assert (await fed.events(run))[-2:] == ["round_failed", "run_ended"]


async def test_an_update_lost_with_the_power_is_asked_for_until_it_is_there(data: Path):
    async with server(data) as fed:
        await fed.import_model()
        await fed.join("a", "b")
        run = await fed.create(**TWO, **QUIET)
        await fed.train("a")
        token = fed.polls["a"][0]
        for upload_id in fed.spool.ids():
            fed.spool.path(upload_id).write_bytes(b"")
        await fed.database.run(lambda c: model_queries.set_meta(c, "boot_id", "another boot"))
    # The machine comes up, and the server is killed once more before the site has come back.
    for _ in range(2):
        async with server(data) as fed:
            assert [t.state for t in await fed.tasks(run)] == ["pending", "pending"]
            task = await fed.parts.board.poll("a", {token}, 0.0)
            assert task is not None
            assert task.token == token
    async with server(data) as fed:
        await fed.join("a", "b")
        await fed.train("a", "b")
        assert (await fed.ended(run)).version == 1
        assert [t.reason for t in await fed.tasks(run)] == ["", ""]


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["data", "chunks", "manifest", "slots"])
async def test_an_update_that_rots_before_it_is_added_up_is_sent_again(data: Path, what: str):
    async with server(data, lease_term=30.0) as fed:
        await fed.import_model()
        await fed.join("a", "b")
        run = await fed.create(cohort={"min_clients": 2, "deadline": 600}, **QUIET)
        await fed.train("a")
        (task,) = fed.polls["a"]
        uploads = await fed.database.run(task_queries.all_uploads)
        (row,) = [t for t in await fed.tasks(run) if t.client == "a"]
        paths = {u.digest == row.update_digest: fed.spool.path(u.id) for u in uploads}
        if what == "slots":
            for u in uploads:
                fed.spool.delete(u.id)
        else:
            flip({"data": paths[False], "chunks": paths[False].with_name("chunks"), "manifest": paths[True]}[what])
        await fed.train("b")
        found = await fed.until(lambda: fed.parts.board.get(task), "the task to be open again")
        assert fed.driver(run).round.phase is Phase.COLLECT
        assert fed.driver(run).round.accepted == ("b",)
        fed.polls["a"].clear()
        await fed.train("a")
        assert (await fed.ended(run)).version == 1
        assert await weights(fed, run, 1) == [1.5, 2.5]
        assert "task_reopened" in await fed.events(run)
        assert found.reopened is False


async def test_a_manifest_that_rots_before_it_is_looked_at_is_sent_again(data: Path):
    async with server(data) as fed:
        await fed.import_model()
        await fed.join("a")
        run = await fed.create(**ONE, **QUIET)
        task = await fed.task("a")
        update = await fed.send(task)
        for upload in await fed.database.run(task_queries.all_uploads):
            if upload.digest == update.digest:
                flip(fed.spool.path(upload.id))
        with pytest.raises(FedlinkError) as e:
            await fed.complete(task, update)
        assert e.value.reason is Reason.BLOB_MISSING
        assert (await fed.complete(task, await fed.send(task))).accepted
        assert (await fed.ended(run)).version == 1


async def test_other_runs_go_on_while_an_update_is_hashed_anew(data: Path, monkeypatch):
    async with server(data) as fed:
        await fed.import_model()
        await fed.join("a")
        run = await fed.create(**ONE, **QUIET)
        begun, done, reverify = asyncio.Event(), asyncio.Event(), fed.parts.versions.reverify

        async def slowly(task: TaskRow) -> None:
            begun.set()
            await done.wait()
            await reverify(task)

        monkeypatch.setattr(fed.parts.versions, "reverify", slowly)
        task = await fed.task("a")
        update = await fed.send(task)
        monkeypatch.setattr(fed.driver(run)._aggregation, "_attempt", lambda _: asyncio.sleep(0.2))
        assert (await fed.complete(task, update)).accepted
        for upload in await fed.database.run(task_queries.all_uploads):
            flip(fed.spool.path(upload.id))
        monkeypatch.delattr(fed.driver(run)._aggregation, "_attempt")
        await begun.wait()
        async with asyncio.timeout(5):
            await fed.driver(run).tick(0.0)
        done.set()
        await fed.train("a")
        assert (await fed.ended(run)).version == 1


async def test_an_update_that_rots_again_and_again_fails_the_round_by_name(data: Path):
    async with server(data) as fed:
        await fed.import_model()
        await fed.join("a")
        run = await fed.create(cohort={"min_clients": 1, "round_attempts": 1}, **QUIET)
        real = fed.spool.append

        def rotting(upload_id: bytes, offset: int, chunks: Sequence[Buffer]) -> int:
            end = real(upload_id, offset, chunks)
            if bytes(chunks[0][8:9]) == b"{":  # a safetensors file
                flip(fed.spool.path(upload_id))
            return end

        fed.spool.append = rotting
        for _ in range(4):
            fed.polls.get("a", []).clear()
            task = await fed.task("a")
            await fed.complete(task, await fed.send(task))
        after = await fed.ended(run)
        assert after.state == "failed"
        assert "of the update of client 'a'" in after.reason
        assert "damaged on the server's disk" in after.reason


async def test_a_run_that_waits_for_an_evaluation_waits_on_after_a_restart(data: Path):
    async with server(data) as fed:
        await fed.import_model()
        await fed.join("a")
        run = await fed.create(**ONE)
        await evaluate(fed, 0, a=0.1)
        await fed.train("a")
        await fed.until(lambda: fed.driver(run).row.state == "finishing", "finishing")
    async with server(data) as fed:
        assert "evaluation" in fed.driver(run).waiting()
        await fed.join("a")
        await evaluate(fed, 1, a=0.7)
        after = await fed.ended(run)
        assert (after.state, after.best_version) == ("completed", 1)
