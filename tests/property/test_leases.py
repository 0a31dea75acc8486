"""The board and its leases: tasks, polls, heartbeats and restarts in any order, on a clock that jumps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from sqlalchemy import delete

from fedlink.errors import FedlinkError, Reason
from fedserver.rounds.model import TaskState
from fedserver.runtime import board as board_module
from fedserver.runtime.board import RETRY_BASE, RETRY_CAP, UPDATE_LOST, OpenTask, TaskBoard, retry_wait
from fedserver.store import tables
from fedserver.store.queries import tasks as task_queries
from fedserver.store.rows import TaskRow
from tests.support.effort import effort
from tests.support.ledger import Ledger, ledger
from tests.support.virtual_time import EPOCH, VirtualLoop, VirtualTime

SITES = ("ada", "bob")
TERM = 30.0
ENDS = {
    TaskState.ACCEPTED: Reason.TASK_COMPLETED,
    TaskState.REFUSED: Reason.TASK_COMPLETED,
    TaskState.FAILED: Reason.ROUND_CLOSED,
    TaskState.CLOSED: Reason.ROUND_CLOSED,
    TaskState.SUPERSEDED: Reason.TASK_NOT_FOUND,
}
"""How a task ends, and what a call on it is told afterwards."""
ALWAYS = (
    ["issue"] * 3 + ["poll"] * 4 + ["time_passes"] * 4 + ["clock"] * 2 + ["restart"] * 2 + ["connect", "rights_change"]
)
"""What happens, by the names of methods; the oftener named, the likelier."""
WITH_TASKS = ["heartbeat"] * 4 + ["end"] * 2 + ["check_begins", "look_up"]
Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass
class Known:
    """What an onlooker knows of an open task."""

    row: TaskRow
    ready: float
    expires: float
    state: TaskState = TaskState.PENDING
    reopened: bool = False


@dataclass
class Poll:
    """A poll under way."""

    client: str
    held: frozenset[bytes]
    ends: float
    call: asyncio.Task[OpenTask | None]
    superseded: bool = False


class Leases(RuleBasedStateMachine):
    """A board as `fedserver.runtime.engine` uses it, and what must be true of it."""

    def __init__(self, book: Ledger, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.book = book
        self.loop = VirtualLoop()
        patch.setattr(board_module, "time", VirtualTime(self.loop))
        self.run = book.add_run()
        self.issued = 0
        self.open: dict[bytes, Known] = {}
        self.over: dict[bytes, TaskRow] = {}
        self.polls: list[Poll] = []
        self.connected = set(SITES)

    @initialize()
    def begin(self) -> None:
        self.board = TaskBoard(self.book, lease_term=TERM)  # type: ignore[arg-type] - a ledger is as good

    def teardown(self) -> None:
        for poll in self.polls:
            poll.call.cancel()
        self.settle()
        self.loop.close()
        self.book.do(lambda c: c.execute(delete(tables.tasks)))

    @property
    def now(self) -> float:
        return self.loop.time()

    @rule(data=st.data())
    def happen(self, data: st.DataObject) -> None:
        """One rule and no more, so that what leads somewhere is as frequent as it should be."""
        likely = ALWAYS + (WITH_TASKS if self.open else []) + (["hang_up"] if self.polls else [])
        getattr(self, data.draw(st.sampled_from(likely)))(data.draw)

    # --- Tasks

    def issue(self, draw: Draw) -> None:
        client, attempt = draw(st.sampled_from(SITES)), draw(st.sampled_from([1, 1, 2, 2, 4]))
        kind = draw(st.sampled_from(["train", "train", "evaluate"]))
        self.issued += 1
        training = int(kind == "train")
        values = {"kind": kind, "client": client, "attempt": attempt, "round": training, "round_attempt": self.issued}
        # The same in every replay of a history: the jitter is drawn from it.
        token = self.issued.to_bytes(24, "big")
        row = self.book.do(
            lambda c: task_queries.insert_tasks(
                c,
                [
                    {
                        "token": token,
                        "run_id": self.run.id,
                        "version": 0,
                        "state": "pending",
                        "issued": EPOCH + self.now,
                        **values,
                    }
                ],
            )[0]
        )
        wait = retry_wait(row)
        longest = min(RETRY_CAP, RETRY_BASE * 2.0 ** (attempt - 2))
        assert wait == 0.0 if kind == "evaluate" or attempt == 1 else longest / 2 <= wait <= longest
        self.board.add(self.run, [row])
        self.open[token] = Known(row, self.now + wait, self.now + TERM)
        self.settle()

    def end(self, draw: Draw) -> None:
        """Completed, failed or closed: what `RunDriver` records and takes down."""
        state = draw(st.sampled_from(list(ENDS)))
        task = self.pick(draw)
        known = self.open.pop(task.token)
        self.book.do(lambda c: task_queries.save_task(c, task.row.id, state=state))
        self.board.remove([task])
        self.over[task.token] = replace(known.row, state=state)
        self.settle()

    def check_begins(self, draw: Draw) -> None:
        task = self.pick(draw)
        task.state = self.open[task.token].state = TaskState.CHECKING

    # --- Sites

    def connect(self, draw: Draw) -> None:
        client = draw(st.sampled_from(SITES))
        self.connected ^= {client}

    def poll(self, draw: Draw) -> None:
        client, wait = draw(st.sampled_from(SITES)), draw(st.sampled_from([0.0, 1.0, 30.0, 30.0]))
        share = draw(st.sampled_from(["none", "all", "all", "fetched", "fetched", "odd"]))
        tokens = [t for t, k in self.open.items() if k.row.client == client]
        fetched = [t for t in tokens if self.open[t].state is not TaskState.PENDING]
        held = frozenset({"none": [], "all": tokens, "fetched": fetched, "odd": tokens[::2]}[share])
        for poll in self.polls:
            poll.superseded |= poll.client == client
        call = self.loop.create_task(self.board.poll(client, held, wait))
        self.polls.append(Poll(client, held, self.now + wait, call))
        self.settle()

    def hang_up(self, draw: Draw) -> None:
        poll = draw(st.sampled_from(self.polls))
        poll.call.cancel()
        self.polls.remove(poll)
        self.settle()
        assert poll.call.cancelled()

    def rights_change(self, draw: Draw) -> None:
        client = draw(st.sampled_from(SITES))
        self.board.wake(client)
        for poll in self.polls:
            poll.superseded |= poll.client == client
        self.settle()

    def heartbeat(self, draw: Draw) -> None:
        """What `Engine.revive` does: the same token brings a task back."""
        task = self.pick(draw)
        known = self.open[task.token]
        self.board.extend(task)
        task.fetched = True
        if task.state in (TaskState.PENDING, TaskState.AWAY):
            task.state = known.state = TaskState.RUNNING
        known.expires = self.now + TERM
        assert not task.term_over(self.now)

    def look_up(self, draw: Draw) -> None:
        """A token is good for its own site, and one that is over says how it ended."""
        client = draw(st.sampled_from([*SITES, "mallory"]))
        token = draw(st.sampled_from(sorted([*self.open, *self.over])))
        row = self.open[token].row if token in self.open else self.over[token]
        expected: Any = ENDS.get(TaskState(row.state)) if token in self.over else self.board.get(token)
        try:
            found: Any = self.loop.run(self.board.open_task(client, token))
        except FedlinkError as e:
            found = e.reason
        assert found is (expected if client == row.client else Reason.TASK_NOT_FOUND)

    # --- Time

    def time_passes(self, draw: Draw) -> None:
        """In steps, so that each poll can be looked at when it must end."""
        until = self.now + draw(st.sampled_from([0.1, 1.9, 10.0, 29.9, 30.1, 400.0]))
        while True:
            moments = [p.ends for p in self.polls] + [k.ready for k in self.open.values()]
            following = min([m for m in moments if m > self.now] + [until])
            step = min(following, until) - self.now
            self.loop.run(asyncio.sleep(step))
            self.settle()
            if self.now >= until:
                return

    def clock(self, _: Draw) -> None:
        """What `Engine._clock` does: a lease that is over makes its task AWAY, and nothing else."""
        lapsed = {t.token for t in self.board.lapsed(self.connected)}
        assert lapsed == {
            token
            for token, k in self.open.items()
            if k.expires < self.now
            and (k.state is TaskState.RUNNING or (k.state is TaskState.PENDING and k.row.client not in self.connected))
        }
        for token in lapsed:
            task = self.board.get(token)
            assert task is not None
            task.state = self.open[token].state = TaskState.AWAY
        assert self.board.lapsed(self.connected) == []
        self.settle()

    def restart(self, draw: Draw) -> None:
        """The server dies: what is in the database is all that is left."""
        for poll in self.polls:
            poll.call.cancel()
        self.settle()
        self.polls.clear()
        self.loop.jump(draw(st.sampled_from([0.0, 5.0, 1000.0])))
        self.begin()
        rows = [r for r in self.book.do(task_queries.open_tasks) if r.run_id == self.run.id]
        assert {r.token for r in rows} == set(self.open)
        lost = draw(st.sampled_from(["", UPDATE_LOST]))
        for row in rows:
            self.board.add(self.run, [replace(row, reason=lost)], fresh=False)
            before = self.open[row.token]
            # Never held back for longer than at first.
            waits = before.ready > self.now
            state = TaskState.PENDING if waits else TaskState.RUNNING
            reopened = bool(lost) and not waits
            self.open[row.token] = Known(row, before.ready, self.now + TERM, state, reopened)
        assert self.board.lapsed(set()) == []
        self.settle()

    # --- What must hold

    def pick(self, draw: Draw) -> OpenTask:
        task = self.board.get(draw(st.sampled_from(sorted(self.open))))
        assert task is not None
        return task

    def settle(self) -> None:
        """Let everything happen that can happen now, and look."""

        self.loop.run(self.turns())
        if hasattr(self, "board"):
            self.look_at_polls()
            self.look_at_tasks()

    async def turns(self) -> None:
        for _ in range(6):
            await asyncio.sleep(0)

    def due(self, poll: Poll) -> list[Known]:
        """What a poll could bring now, best first."""
        found = [
            k
            for token, k in self.open.items()
            if k.row.client == poll.client and k.ready <= self.now and (token not in poll.held or k.reopened)
        ]
        return sorted(found, key=lambda k: (k.row.kind == "train", k.row.id))

    def look_at_polls(self) -> None:
        for poll in [p for p in self.polls if p.call.done()]:
            self.polls.remove(poll)
            if poll.call.cancelled():
                continue
            task = poll.call.result()
            due = self.due(poll)
            if task is None:
                assert poll.superseded or (self.now >= poll.ends and not due)
                continue
            assert task.client == poll.client
            assert due, "it was given what it holds, or what is held back"
            assert task.token == due[0].row.token
            assert task.fetched
            # It is asked for a lost update once a process; then as for any that it holds.
            self.open[task.token].reopened = False
        for poll in self.polls:
            assert not poll.superseded, "an older poll goes on beside a newer one"
            assert not self.due(poll), "a task is there, and the poll waits"
            assert self.now < poll.ends
        waiting = [p.client for p in self.polls]
        assert len(waiting) == len(set(waiting))
        assert set(self.board._polls) == set(waiting)

    def look_at_tasks(self) -> None:
        for token, known in self.open.items():
            task = self.board.get(token)
            assert task is not None
            assert (task.state, task.expires) == (known.state, pytest.approx(known.expires))
            assert task.held_back == pytest.approx(max(0.0, known.ready - self.now), abs=1e-6)
        for client in SITES:
            mine = {t for t, k in self.open.items() if k.row.client == client}
            assert {t.token for t in self.board.of_client(client)} == mine


@pytest.fixture
def book():
    with ledger() as made:
        yield made


def test_any_history_of_leases_keeps_its_promises(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    run_state_machine_as_test(lambda: Leases(book, monkeypatch), settings=effort(35, 40))
