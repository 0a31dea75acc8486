"""What becomes of versions and uploads: evaluation, what stays on the disk, who may reach what; as in test_engine."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fedlink.blobs import ref_of
from fedlink.errors import FedlinkError, Reason
from fedlink.transfer import TaskPurpose
from fedserver.runtime import tidying, versions
from fedserver.runtime.access import Caller
from fedserver.store.queries import runs as run_queries
from fedserver.store.queries import tasks as task_queries
from tests.support.server import ONE, OPERATOR, QUIET, TWO, Server, evaluate, server, spooled, stored_is_needed, weights


@pytest.fixture
async def fed(tmp_path: Path) -> AsyncIterator[Server]:
    async with server(tmp_path / "data") as made:
        await made.import_model()
        yield made


# --- Evaluation


async def test_every_version_is_measured_and_the_best_is_marked(fed: Server):
    await fed.join("a", "b")
    run = await fed.create(**TWO)
    await evaluate(fed, 0, a=0.9, b=0.7)
    await fed.train("a", "b")
    await fed.version(run, 1)
    await fed.until(lambda: fed.driver(run).row.state == "finishing", "finishing")
    assert "evaluation of the newest version by a" in fed.driver(run).waiting()
    await evaluate(fed, 1, a=0.5, b=0.5)
    after = await fed.ended(run)
    assert (after.state, after.best_version) == ("completed", 0)
    versions = await fed.database.run(lambda c: run_queries.list_versions(c, run.id))
    assert [v.means["accuracy"] for v in versions] == [pytest.approx(0.8), pytest.approx(0.5)]


async def test_a_run_stops_at_its_target_and_goes_on_when_it_is_extended(fed: Server):
    await fed.join("a")
    run = await fed.create(rounds=9, stop={"target": 0.8}, **ONE)
    await evaluate(fed, 0, a=0.1)
    await fed.train("a")
    await evaluate(fed, 1, a=0.85)
    after = await fed.ended(run)
    assert (after.state, after.version) == ("completed", 1)
    assert "accuracy reached 0.8" in after.reason
    await fed.engine.extend("r", 9 + 1)
    await fed.train("a")
    await evaluate(fed, 2, a=0.1)
    await fed.until(lambda: fed.driver(run).round is not None, "round 3")
    assert fed.driver(run).round.number == 3


async def test_nothing_happens_in_a_run_after_it_has_ended(fed: Server):
    await fed.join("a")
    run = await fed.create(rounds=2, **ONE)
    await fed.train("a")
    await fed.version(run, 1)
    driven = fed.driver(run)
    await driven.stop()
    await driven.tick(1e12)
    assert (await fed.events(run))[-1] == "run_ended"


# --- Disk


async def test_old_versions_go_and_the_newest_and_the_best_stay(fed: Server):
    await fed.join("a")
    run = await fed.create(rounds=6, retention={"keep_versions": 2}, **ONE)
    for version, value in enumerate((0.1, 0.2, 0.9, 0.3, 0.4, 0.5)):
        await evaluate(fed, version, a=value)
        await fed.train("a")
        await fed.version(run, version + 1)
    await evaluate(fed, 6, a=0.5)
    after = await fed.ended(run)
    assert after.best_version == 2

    async def kept() -> bool:
        versions = await fed.database.run(lambda c: run_queries.list_versions(c, run.id))
        return [v.number for v in versions] == [2, 5, 6] and await stored_is_needed(fed)

    await fed.until(kept, "retirement")
    assert await weights(fed, run, 2) == [2.0, 3.0]


async def test_a_version_that_may_yet_be_the_best_is_kept(fed: Server):
    await fed.join("a", "slow")
    run = await fed.create(rounds=4, retention={"keep_versions": 1}, cohort={"min_clients": 1, "target": 1})
    measuring = await fed.task("slow", "evaluate")
    for number in (1, 2):
        await fed.train("a")
        await fed.version(run, number)
    await fed.parts.versions.retire(run.id)
    assert 0 in [v.number for v in await fed.database.run(lambda c: run_queries.list_versions(c, run.id))]
    assert (await fed.complete(measuring, accuracy=1.0)).accepted


async def test_a_version_that_is_being_read_is_not_retired(fed: Server, monkeypatch):
    monkeypatch.setattr(versions, "READ_SECONDS", 2.0)
    monkeypatch.setattr(tidying, "READ_SECONDS", 0.1)
    await fed.join("a")
    run = await fed.create(rounds=4, retention={"keep_versions": 1}, **ONE, **QUIET)
    await fed.train("a")
    await fed.version(run, 1)
    _, manifest, _ = await fed.parts.versions.find("r@1")
    files = [manifest, *(f.blob for f in fed.parts.versions.read_manifest(manifest.digest).files)]
    access = fed.parts.access
    assert await access.readable(OPERATOR, b"", manifest.digest) == manifest
    for number in (2, 3, 4):
        await fed.train("a")
        await fed.version(run, number)
        # What an export asks for next is there, round after round.
        for ref in files:
            assert await access.readable(OPERATOR, b"", ref.digest) == ref

    async def gone() -> bool:
        return not fed.store.contains(manifest.digest) and await stored_is_needed(fed)

    await fed.until(gone, "the version to go when nobody reads it any more")


async def test_a_run_created_from_a_version_as_it_is_retired_has_all_of_it_or_is_refused(fed: Server):
    await fed.join("a")
    run = await fed.create(rounds=8, retention={"keep_versions": 1}, **ONE, **QUIET)
    created, refusals = [], []
    for number in range(1, 9):
        training = asyncio.create_task(fed.train("a"))
        # Again and again while the next version is committed and this one retired.
        for attempt in range(50):
            try:
                created.append(await fed.create(f"c{number}-{attempt}", workload="x", model=f"r@{number - 1}", **ONE))
            except FedlinkError as e:
                refusals.append(e.reason)
                break
        await training
        await fed.version(run, number)
    await fed.ended(run)
    assert created
    assert set(refusals) == {Reason.MODEL_NOT_FOUND}
    for each in created:
        row = await fed.database.run(lambda c, each=each: run_queries.version(c, each.id, 0))
        for digest in (row.digest, *(f.blob.digest for f in fed.parts.versions.read_manifest(row.digest).files)):
            fed.store.verify(digest)
    await fed.until(lambda: stored_is_needed(fed), "what nobody needs to go")


async def test_of_updates_that_are_kept_nothing_is_kept_in_memory(fed: Server):
    await fed.join("a")
    run = await fed.create(rounds=3, retention={"keep_updates": True}, **ONE, **QUIET)
    for number in (1, 2, 3):
        task = await fed.task("a")
        update = await fed.send(task)
        assert len(fed.parts.access._tasks) == 2
        await fed.complete(task, update)
        del task
        await fed.version(run, number)
        # Whatever was under way as the version was committed may have its last step before it.
        async with asyncio.timeout(10):
            gc.collect()
            while len(fed.parts.access._tasks):
                await asyncio.sleep(0.01)
                gc.collect()
    assert spooled(fed) == 6


async def test_an_upload_that_begins_as_its_round_closes_leaves_nothing(fed: Server, monkeypatch):
    await fed.join("a")
    run = await fed.create(**ONE, **QUIET)
    task = await fed.task("a")
    making = fed.parts.access._make_slot

    def late(*args: Any) -> None:
        making(*args)
        asyncio.run_coroutine_threadsafe(fed.driver(run).stop(), loop).result(10)

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(fed.parts.access, "_make_slot", late)
    with pytest.raises(FedlinkError) as e:
        await fed.upload(Caller("a", operator=False), TaskPurpose(task.token), b"x" * 100)
    assert e.value.reason is Reason.ROUND_CLOSED
    assert spooled(fed) == 0
    assert await fed.database.run(task_queries.all_uploads) == []


async def test_importing_twice_is_importing_once(fed: Server):
    await fed.import_model()
    await fed.import_model("other")
    assert spooled(fed) == 0
    assert await fed.database.run(task_queries.all_uploads) == []
    await fed.create("taken", **ONE)
    with pytest.raises(FedlinkError) as e:
        await fed.import_model("taken")
    assert e.value.reason is Reason.MODEL_EXISTS


# --- Rights


async def test_a_site_reaches_only_what_its_tasks_refer_to(fed: Server):
    await fed.join("a", "b")
    await fed.create(**TWO, **QUIET)
    a, b = await fed.task("a"), await fed.task("b")
    update = await fed.send(a)
    access, as_a, as_b = fed.parts.access, Caller("a", operator=False), Caller("b", operator=False)
    model = await access.task_model(a)
    assert await access.readable(as_a, a.token, model.digest) == model
    for caller, token, digest, reason in (
        (as_b, b.token, update.digest, Reason.BLOB_NOT_FOUND),
        (as_b, a.token, model.digest, Reason.TASK_NOT_FOUND),
        (as_b, b"", model.digest, Reason.TASK_NOT_FOUND),
        (as_a, a.token, update.digest, Reason.BLOB_NOT_FOUND),
    ):
        with pytest.raises(FedlinkError) as e:
            await access.readable(caller, token, digest)
        assert e.value.reason is reason
    # What another site sent counts as missing, what the caller sent or may read does not.
    assert await access.missing(as_b, TaskPurpose(b.token), [update.digest, model.digest]) == [update.digest]
    assert await access.missing(as_a, TaskPurpose(a.token), [update.digest, model.digest]) == []
    with pytest.raises(FedlinkError) as e:
        await fed.complete(b, update)
    assert e.value.reason is Reason.BLOB_MISSING


async def test_what_a_site_computed_again_displaces_what_it_sent_before(fed: Server):
    await fed.join("a")
    await fed.create(**ONE, **QUIET)
    task = await fed.task("a")
    caller, purpose = Caller("a", operator=False), TaskPurpose(task.token)
    # Each but the first is too much beside the one before; what was displaced is bounded, too.
    sent = 0

    async def send() -> None:
        nonlocal sent
        while sent < 40:
            await fed.upload(caller, purpose, bytes([sent]) * (5 << 20))
            assert spooled(fed) == 1
            sent += 1

    with pytest.raises(FedlinkError) as e:
        await send()
    assert e.value.reason is Reason.TOO_LARGE
    assert 3 < sent < 12
    assert spooled(fed) == 1


async def test_what_a_task_may_upload_is_bounded(fed: Server):
    await fed.join("a")
    await fed.create(**ONE, **QUIET)
    task = await fed.task("a")
    caller, purpose = Caller("a", operator=False), TaskPurpose(task.token)
    with pytest.raises(FedlinkError) as e:
        await fed.upload(caller, purpose, bytes(9 << 20))
    assert e.value.reason is Reason.TOO_LARGE
    with pytest.raises(FedlinkError):
        await fed.parts.access.start_upload(OPERATOR, purpose, ref_of(b""), b"")
