"""A round adds up the updates that come first while a site is still out, and nobody can tell by the version; as in
test_engine.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedserver.aggregation.prefix import PrefixSums
from fedserver.rounds.model import Phase, TaskState
from fedserver.runtime import early
from fedserver.store.disk import Disk
from fedserver.store.queries import runs as run_queries
from fedserver.store.queries import tasks as task_queries
from fedserver.store.rows import RunRow
from tests.support.server import QUIET, Server, server, spooled, weights

SITES = ("a", "b", "c", "d", "e", "f")
FIRST, LAST = SITES[:-1], SITES[-1]
EXAMPLES = dict(zip(SITES, (3, 11, 7, 10, 5, 13), strict=True))
# Their sum depends on the order.
SENT = {s: (0.1 * 7.0**i, -0.3 / 5.0**i) for i, s in enumerate(SITES)}
COHORT = {"min_clients": 1, "quorum": 1, "task_retries": 0}


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "PATIENCE", 0.0)
    # All of them in one pass, whenever the clock ticks.
    monkeypatch.setattr(early, "LEAST", len(FIRST))


@pytest.fixture
async def fed(tmp_path: Path) -> AsyncIterator[Server]:
    async with server(tmp_path / "data") as made:
        await made.import_model()
        await made.join(*SITES)
        yield made


def expected(*sites: str) -> list[float]:
    """The weights that these sites' updates give, in plain arithmetic."""
    found = []
    for i, before in enumerate((1.0, 2.0)):
        total = 0.0
        for s in sites:
            total += EXAMPLES[s] * float(np.float32(SENT[s][i]))
        found.append(float(np.float32(before + total / sum(EXAMPLES[s] for s in sites))))
    return found


async def train(fed: Server, *sites: str) -> None:
    for site in sites:
        task = await fed.task(site)
        verdict = await fed.complete(task, await fed.send(task, SENT[site]), examples=EXAMPLES[site])
        assert verdict is not None
        assert verdict.accepted


def scratch(fed: Server) -> list[Path]:
    # What vanishes meanwhile is passed over.
    return sorted(Path(at) / name for at, _, names in os.walk(fed.root / "tmp") for name in names)


async def until_folded(fed: Server, run: RunRow, count: int = len(FIRST)) -> PrefixSums:
    def there() -> PrefixSums | None:
        sums = fed.driver(run)._early._sums
        return sums if sums and sums.count == count else None

    found = await fed.until(there, "the first updates to be added up")
    assert isinstance(found, PrefixSums)
    return found


async def committed(fed: Server, run: RunRow) -> dict[str, Any]:
    """The event of the first version, when nothing is left on the disk but that."""
    await fed.version(run, 1)
    await fed.until(lambda: not scratch(fed) and not spooled(fed), "the round's leavings to go")
    events = await fed.database.run(lambda c: run_queries.events_after(c, run.id, 0))
    found: dict[str, Any] = json.loads(next(e.data for e in events if e.kind == "round_committed"))
    return found


async def test_the_version_has_the_bits_that_it_would_have_had(fed: Server, monkeypatch: pytest.MonkeyPatch):
    run = await fed.create("early", cohort=COHORT, **QUIET)
    await train(fed, *FIRST)
    await until_folded(fed, run)
    assert fed.driver(run).round.phase is Phase.COLLECT
    await train(fed, LAST)
    assert (await committed(fed, run))["folded_early"] == len(FIRST)
    assert await weights(fed, run, 1) == expected(*SITES)

    monkeypatch.setattr(early, "LEAST", 99)
    other = await fed.create("late", cohort=COHORT, **QUIET)
    await train(fed, *FIRST)
    await asyncio.sleep(0.6)  # the clock has ticked
    assert scratch(fed) == []
    await train(fed, LAST)
    assert (await committed(fed, other))["folded_early"] == 0
    found = [await fed.parts.versions.find(f"{name}@1") for name in ("early", "late")]
    assert found[0][1] == found[1][1]


async def test_a_site_that_failed_is_passed_over(fed: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(early, "LEAST", 4)
    run = await fed.create(cohort=COHORT, **QUIET)
    lost = await fed.task("b")
    await fed.driver(run).task_ended(lost, TaskState.FAILED, {"reason": "CRASHED"})
    await train(fed, "a", "c", "d", "e")
    await until_folded(fed, run, 4)
    await train(fed, "f")
    assert (await committed(fed, run))["folded_early"] == 4
    assert await weights(fed, run, 1) == expected("a", "c", "d", "e", "f")


async def data_of(fed: Server, run: RunRow, site: str) -> Path:
    """The file of a site's update in the spool."""
    (task,) = [t for t in await fed.tasks(run) if t.client == site]
    uploads = await fed.database.run(lambda c: task_queries.task_uploads(c, [task.id]))
    return next(fed.spool.path(u.id) for u in uploads if u.digest != task.update_digest)


def turn(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)


async def test_an_update_that_rots_before_it_is_added_up_is_asked_for_while_others_are_out(fed: Server):
    run = await fed.create(cohort={**COHORT, "deadline": 600}, **QUIET)
    await train(fed, *FIRST[:-1])
    turn(await data_of(fed, run, "b"))
    await train(fed, FIRST[-1])
    await fed.until(lambda: "b" not in fed.driver(run).round.accepted, "the update to be asked for")
    assert fed.driver(run).round.phase is Phase.COLLECT
    assert fed.driver(run).round.accepted == ("a", "c", "d", "e")
    await fed.until(lambda: not scratch(fed), "what was added up to be thrown away")
    fed.polls["b"].clear()
    await train(fed, "b")
    await until_folded(fed, run)
    await train(fed, LAST)
    assert (await committed(fed, run))["folded_early"] == len(FIRST)
    assert await weights(fed, run, 1) == expected(*SITES)
    assert (await fed.events(run)).count("task_reopened") == 1


async def test_a_folded_update_that_is_lost_takes_the_sums_with_it(fed: Server):
    run = await fed.create(cohort=COHORT, **QUIET)
    await train(fed, *FIRST)
    await until_folded(fed, run)
    lost = await data_of(fed, run, "c")
    fed.spool.delete(bytes.fromhex(lost.parent.name))
    await train(fed, LAST)
    await fed.until(lambda: "c" not in fed.driver(run).round.accepted, "the update to be asked for")
    await fed.until(lambda: not scratch(fed), "the sums to go")
    fed.polls["c"].clear()
    await train(fed, "c")
    await committed(fed, run)
    assert await weights(fed, run, 1) == expected(*SITES)


async def test_sums_that_rot_are_thrown_away(fed: Server):
    run = await fed.create(cohort=COHORT, **QUIET)
    await train(fed, *FIRST)
    await until_folded(fed, run)
    turn(next(p for p in scratch(fed) if p.suffix != ".chunks"))
    await train(fed, LAST)
    assert (await committed(fed, run))["folded_early"] == 0
    assert await weights(fed, run, 1) == expected(*SITES)
    # No site was asked, and the round did not fail.
    assert not {"task_reopened", "round_failed"} & set(await fed.events(run))


async def test_a_restart_begins_anew(tmp_path: Path):
    data = tmp_path / "data"
    async with server(data) as fed:
        await fed.import_model()
        await fed.join(*SITES)
        run = await fed.create(cohort=COHORT, **QUIET)
        await train(fed, *FIRST)
        await until_folded(fed, run)
        # As SIGKILL would leave it.
        left = [(p, p.read_bytes()) for p in scratch(fed)]
        assert left
    for path, content in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    async with server(data) as fed:
        assert not any(p.exists() for p, _ in left)
        await until_folded(fed, run)
        await fed.join(*SITES)
        await train(fed, LAST)
        assert (await committed(fed, run))["folded_early"] == len(FIRST)
        assert await weights(fed, run, 1) == expected(*SITES)


@pytest.mark.parametrize("how", ["stopped", "failed", "short of room", "closed"])
async def test_nothing_is_left_of_what_is_not_wanted_any_more(fed: Server, how: str):
    run = await fed.create(cohort={**COHORT, "min_clients": 6, "quorum": 6}, **QUIET)
    await train(fed, *FIRST)
    await until_folded(fed, run)
    assert scratch(fed)
    driven = fed.driver(run)
    if how == "stopped":
        await driven.stop()
    elif how == "failed":
        await driven.task_ended(await fed.task(LAST), TaskState.FAILED, {"reason": "CRASHED"})
        assert driven.round.attempt == 2
    elif how == "short of room":
        fed.parts.disk.note("uploads", "is full")
    else:
        await driven.close()
    await fed.until(lambda: not any((fed.root / "tmp").iterdir()), "the sums to go")


async def test_without_room_nothing_is_added_up(fed: Server, monkeypatch: pytest.MonkeyPatch):
    run = await fed.create(cohort=COHORT, **QUIET)
    monkeypatch.setattr(Disk, "room", property(lambda _: 1000))
    await train(fed, *FIRST)
    await fed.until(lambda: fed.driver(run)._early._given_up, "the room to be looked for")
    assert scratch(fed) == []
    await train(fed, LAST)
    assert (await committed(fed, run))["folded_early"] == 0
    assert await weights(fed, run, 1) == expected(*SITES)


async def test_the_round_does_not_wait_for_a_pass_under_way(fed: Server, monkeypatch: pytest.MonkeyPatch):
    begun, ended = [], []

    def endless(*_: object, unwanted: Callable[[], bool]) -> None:
        begun.append(time.monotonic())
        while not unwanted() and time.monotonic() < begun[0] + 60:
            time.sleep(0.01)
        ended.append(unwanted())

    monkeypatch.setattr(PrefixSums, "add", endless)
    run = await fed.create(cohort=COHORT, **QUIET)
    other = await fed.create("other", cohort=COHORT, **QUIET)
    for _ in range(2):
        await train(fed, *FIRST)
    await fed.until(lambda: begun, "a pass to begin")
    await asyncio.sleep(0.6)  # the clock has ticked
    # One at a time, whatever the number of runs.
    assert len(begun) == 1
    for _ in range(2):
        await train(fed, LAST)
    for each in (run, other):
        assert (await committed(fed, each))["folded_early"] == 0
        assert await weights(fed, each, 1) == expected(*SITES)
    assert ended[0] is True


async def test_what_goes_wrong_early_harms_nobody(fed: Server, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(PrefixSums, "add", broken)
    run = await fed.create(cohort=COHORT, **QUIET)
    await train(fed, *FIRST)
    await fed.until(lambda: fed.driver(run)._early._given_up, "it to be given up")
    await train(fed, LAST)
    assert (await committed(fed, run))["folded_early"] == 0
    assert await weights(fed, run, 1) == expected(*SITES)
