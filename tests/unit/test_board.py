"""The board: who gets which task, and how polls wait for one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedlink.errors import FedlinkError, Reason
from fedserver.rounds.model import TaskState
from fedserver.runtime import board
from fedserver.runtime.board import RETRY_BASE, RETRY_CAP, UPDATE_LOST, TaskBoard, retry_wait
from fedserver.store.database import Database
from fedserver.store.queries import runs as run_queries
from fedserver.store.queries import tasks as task_queries
from fedserver.store.rows import RunRow, TaskRow

SPEC = '{"name": "r", "workload": "w", "rounds": 3, "model": "m"}'


class Table:
    """A board, and a run whose tasks are in the database."""

    def __init__(self, database: Database, run: RunRow) -> None:
        self.database, self.run = database, run
        self.board = TaskBoard(database, lease_term=10.0)
        self.written = 0

    async def write(self, client: str, *, kind: str = "train", state: str = "pending", number: int = 1) -> TaskRow:
        self.written += 1
        values = {"kind": kind, "client": client, "state": state, "attempt": self.written, "run_id": self.run.id}
        values |= {"round": number if kind == "train" else 0, "round_attempt": 1 if kind == "train" else 0}
        token = self.written.to_bytes(24, "big")
        return await self.database.run(
            lambda c: task_queries.insert_tasks(c, [{"token": token, "version": 0, "issued": 0.0, **values}])[0]
        )

    async def put(self, client: str, **values: str) -> TaskRow:
        row = await self.write(client, **values)
        self.board.add(self.run, [row])
        return row


@pytest.fixture
async def table(tmp_path: Path) -> AsyncIterator[Table]:
    database = Database(f"sqlite:///{tmp_path / 'server.db'}")
    database.open()
    values = {"name": "r", "request_id": b"1", "spec": SPEC, "state": "active", "rounds": 3, "version": 0}
    yield Table(database, await database.run(lambda c: run_queries.insert_run(c, created=0.0, **values)))
    database.close()


async def test_evaluation_comes_before_training_and_the_oldest_first(table: Table):
    train, later, evaluate = [await table.put("a", kind=kind) for kind in ("train", "train", "evaluate")]
    held: set[bytes] = set()
    for expected in (evaluate, train, later):
        task = await table.board.poll("a", held, 0.0)
        assert task is not None
        assert task.token == expected.token
        held.add(task.token)
    assert await table.board.poll("a", held, 0.0) is None


async def test_a_site_whose_rights_change_has_its_poll_ended_and_no_other(table: Table):
    a, b = (asyncio.create_task(table.board.poll(client, set(), 5.0)) for client in "ab")
    await asyncio.sleep(0.01)
    table.board.wake("a")
    table.board.wake("nobody")
    assert await asyncio.wait_for(a, 1.0) is None
    assert not b.done()
    table.board.drain()
    assert await asyncio.wait_for(b, 1.0) is None


async def test_a_poll_is_woken_by_a_task_of_its_own_site_only(table: Table):
    a, b = (asyncio.create_task(table.board.poll(client, set(), 5.0)) for client in "ab")
    await asyncio.sleep(0.01)
    await table.put("a")
    task = await asyncio.wait_for(a, 1.0)
    assert task is not None
    assert task.client == "a"
    assert not b.done()
    table.board.drain()
    assert await asyncio.wait_for(b, 1.0) is None


async def test_no_task_is_missed_however_polls_and_tasks_interleave(table: Table):
    rows = [await table.write("a") for _ in range(50)]
    held: set[bytes] = set()

    async def poller() -> None:
        while len(held) < len(rows):
            task = await table.board.poll("a", held, 5.0)
            assert task is not None
            held.add(task.token)

    async def writer() -> None:
        for i, row in enumerate(rows):
            table.board.add(table.run, [row])
            for _ in range(i % 4):
                await asyncio.sleep(0)

    await asyncio.wait_for(asyncio.gather(poller(), writer()), 10.0)


async def test_a_newer_poll_ends_the_older_and_nothing_is_left_behind(table: Table):
    older = asyncio.create_task(table.board.poll("a", set(), 30.0))
    await asyncio.sleep(0.01)
    newer = asyncio.create_task(table.board.poll("a", set(), 0.1))
    assert await asyncio.wait_for(older, 1.0) is None
    assert await newer is None
    assert table.board._polls == {}


async def test_a_poll_whose_caller_hangs_up_leaves_nothing_behind(table: Table):
    poll = asyncio.create_task(table.board.poll("a", set(), 30.0))
    await asyncio.sleep(0.01)
    poll.cancel()
    with pytest.raises(asyncio.CancelledError):
        await poll
    assert table.board._polls == {}
    assert len(asyncio.all_tasks()) == 1


async def test_a_poll_ends_after_its_time(table: Table):
    begun = time.monotonic()
    assert await table.board.poll("a", set(), 0.1) is None
    assert 0.09 < time.monotonic() - begun < 1.0


async def test_tasks_of_before_a_restart_have_a_full_term_and_a_lost_update_is_asked_for(table: Table):
    row = await table.write("a")
    lost = replace(await table.write("a"), reason=UPDATE_LOST)
    table.board.add(table.run, [row, lost], fresh=False)
    assert table.board.lapsed({"a"}) == []
    held = {row.token, lost.token}
    task = await table.board.poll("a", held, 0.0)
    assert task is not None
    assert task.token == lost.token
    assert await table.board.poll("a", held, 0.0) is None


async def test_a_further_attempt_is_held_back_longer_each_time(table: Table):
    first = replace(await table.write("a"), attempt=1, issued=time.time())
    waits = {n: [retry_wait(replace(first, attempt=n, token=bytes([i]))) for i in range(20)] for n in range(1, 101)}
    assert set(waits[1]) == {0.0}
    for attempt in range(2, 101):
        longest = min(RETRY_CAP, RETRY_BASE * 2 ** (attempt - 2))
        assert all(longest / 2 <= wait <= longest for wait in waits[attempt])
        assert len(set(waits[attempt])) == 20
    # An evaluation's number of attempts says nothing.
    assert retry_wait(replace(first, kind="evaluate", attempt=5)) == 0.0


async def test_an_attempt_that_is_held_back_comes_when_its_time_has_come(table: Table, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(board, "RETRY_BASE", 0.4)
    again = replace(await table.write("a"), attempt=2, issued=time.time())
    table.board.add(table.run, [again])
    assert await table.board.poll("a", set(), 0.0) is None
    begun = time.monotonic()
    task = await table.board.poll("a", set(), 10.0)
    assert task is not None
    assert task.token == again.token
    assert 0.1 < time.monotonic() - begun < 2.0
    # Another task need not wait for it.
    later = replace(await table.write("b"), attempt=9, issued=time.time())
    table.board.add(table.run, [later])
    other = await table.put("b", kind="evaluate")
    found = await table.board.poll("b", set(), 0.0)
    assert found is not None
    assert found.token == other.token


async def test_what_was_held_back_before_a_restart_stays_so_and_no_longer(
    table: Table, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(board, "RETRY_BASE", 100.0)
    row = replace(await table.write("a"), attempt=2, issued=time.time() - 1000)
    held = replace(await table.write("b"), attempt=2, issued=time.time())
    future = replace(await table.write("c"), attempt=2, issued=time.time() + 1e6)
    table.board.add(table.run, [row, held, future], fresh=False)
    assert await table.board.poll("a", set(), 0.0) is not None
    assert await table.board.poll("b", set(), 0.0) is None
    for each in (held, future):
        waiting = table.board.get(each.token)
        assert waiting is not None
        assert waiting.state is TaskState.PENDING
        assert 40 < waiting.held_back <= 100


async def test_a_term_that_is_over(table: Table):
    fetched = await table.put("a")
    waiting = await table.put("b")
    task = await table.board.poll("a", set(), 0.0)
    assert task is not None
    task.state = TaskState.RUNNING
    for each in (task, table.board.get(waiting.token)):
        assert each is not None
        each.expires = 0.0
    # One that was not fetched waits for its site as long as that is there.
    assert [t.token for t in table.board.lapsed({"a", "b"})] == [fetched.token]
    assert len(table.board.lapsed(set())) == 2
    table.board.extend(task)
    assert table.board.lapsed({"b"}) == []


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("accepted", Reason.TASK_COMPLETED),
        ("refused", Reason.TASK_COMPLETED),
        ("failed", Reason.ROUND_CLOSED),
        ("closed", Reason.ROUND_CLOSED),
        ("superseded", Reason.TASK_NOT_FOUND),
    ],
)
async def test_a_token_of_a_task_that_is_over(table: Table, state: str, reason: Reason):
    row = await table.write("a", state=state)
    with pytest.raises(FedlinkError) as e:
        await table.board.open_task("a", row.token)
    assert e.value.reason is reason


async def test_a_token_of_another_site_or_of_nobody_is_unknown(table: Table):
    row = await table.put("a")
    for client, token in (("b", row.token), ("a", b""), ("a", b"x" * 1000), ("a", b"x" * 24)):
        with pytest.raises(FedlinkError) as e:
            await table.board.open_task(client, token)
        assert e.value.reason is Reason.TASK_NOT_FOUND


async def test_an_accepted_update_is_kept_by_its_site_until_the_round_is_over(table: Table):
    for number, phase in ((1, "committed"), (2, "collect"), (3, "failed")):
        await table.database.run(
            lambda c, n=number, p=phase: run_queries.insert_round(c, table.run.id, n, 1, phase=p, now=0.0)
        )
    rows = [await table.write("a", state="accepted", number=n) for n in (1, 2, 3)]
    refused = await table.write("a", state="refused", number=2)
    others = await table.write("b", state="accepted", number=2)
    still = await table.put("a", number=2)
    held = [*(r.token for r in rows), refused.token, others.token, still.token, b"never issued"]
    released = await table.board.released("a", held)
    assert set(released) == set(held) - {rows[1].token, still.token}


async def test_the_last_value_of_at_most_64_metrics_is_kept(table: Table):
    row = await table.put("a")
    task = table.board.get(row.token)
    assert task is not None
    table.board.note_metrics(task, [(f"m{i}", 0.0) for i in range(1000)])
    table.board.note_metrics(task, [("m0", 1.0)])
    assert len(task.metrics) == 64
    assert task.metrics["m0"] == 1.0
