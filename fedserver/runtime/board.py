"""The board: every open task, its lease, and the polls that wait for one.

Open tasks live in memory; the database holds each task from the moment it is written and
again when it becomes final. What lies between (fetched, away, how far) dies with the
process: after a restart every open task gets a full fresh term.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from sqlalchemy import Connection

from fedlink.errors import FedlinkError, Reason
from fedserver.rounds.model import TaskState
from fedserver.store.database import Database
from fedserver.store.queries import runs as run_queries
from fedserver.store.queries import tasks as q
from fedserver.store.rows import RunRow, TaskRow

UPDATE_LOST = "UPDATE_LOST"
"""Reason of an open task whose accepted update was lost: with the power, or because its bytes have changed."""
RETRY_BASE = 2.0
"""Seconds a site waits at most for the second attempt at a task that failed; each further one doubles it."""
RETRY_CAP = 300.0
"""Seconds no attempt is held back longer."""
_MAX_METRICS = 64


@dataclass(frozen=True, slots=True)
class Claim:
    """What CompleteTask says; a repeat must say the same."""

    update_digest: bytes
    num_examples: int
    steps: int
    metrics: tuple[tuple[str, float], ...]
    compute_seconds: float = field(compare=False)
    examples_seen: int = field(default=0, compare=False)
    cut: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a claim."""

    accepted: bool
    reason: str = ""
    tensor: str = ""
    message: str = ""


@dataclass
class OpenTask:
    """A task that may still change."""

    row: TaskRow
    run: RunRow
    state: TaskState = TaskState.PENDING
    expires: float = 0.0
    """On the monotonic clock."""
    ready: float = 0.0
    """When it may be fetched, on the monotonic clock: a further attempt is held back for a while."""
    fetched: bool = False
    reopened: bool = False
    """Its accepted update was lost; the site is asked for it again."""
    activity: str = ""
    done: int = 0
    total: int = 0
    heard: float = field(default_factory=time.time)
    since: float = field(default_factory=time.time)
    """When it was fetched."""
    handed_in: float = 0.0
    """When its result came that is being checked."""
    sending: bool = False
    """Its update has begun to come in."""
    displaced: int = 0
    """Bytes of its uploads that others of them have taken the room of."""
    bytes_down: int = 0
    bytes_up: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    claim: Claim | None = None
    check: asyncio.Task[Verdict] | None = None

    @property
    def held_back(self) -> float:
        """Seconds until it may be fetched."""
        return max(0.0, self.ready - time.monotonic())

    def term_over(self, now: float) -> bool:
        """Whether it is worked on, as far as is known, and its term is over; `now` is on the monotonic clock."""
        return self.state in (TaskState.PENDING, TaskState.RUNNING) and self.expires < now

    @property
    def token(self) -> bytes:
        """Its token."""
        return self.row.token

    @property
    def client(self) -> str:
        """Whose it is."""
        return self.row.client


class _Poll:
    """A site that waits for a task."""

    __slots__ = ("news", "over")

    def __init__(self) -> None:
        self.news = asyncio.Event()
        """There may be something for it."""
        self.over = False

    def end(self) -> None:
        """Let it be answered now."""
        self.over = True
        self.news.set()


class TaskBoard:
    """Open tasks by token and by client.

    Args:
        database: where tasks that are over are looked up.
        lease_term: seconds a task may go without a sign.
    """

    def __init__(self, database: Database, *, lease_term: float) -> None:
        self._db = database
        self.lease_term = lease_term
        self._by_token: dict[bytes, OpenTask] = {}
        self._by_client: dict[str, dict[bytes, OpenTask]] = defaultdict(dict)
        self._polls: dict[str, _Poll] = {}
        self.draining = False
        """No task is handed out and nothing new begins; the server ends soon."""

    # --- What is on it

    def add(self, run: RunRow, rows: Iterable[TaskRow], *, fresh: bool = True) -> None:
        """Put tasks up; `fresh` ones have never been fetched, others get a full term."""
        for row in rows:
            task = OpenTask(row, run)
            task.bytes_down, task.bytes_up = row.bytes_down, row.bytes_up
            # Whatever the clock on the wall did meanwhile, the wait is not longer than when it began.
            wait = retry_wait(row)
            task.ready = time.monotonic() + max(0.0, min(wait, row.issued + wait - time.time()))
            task.expires = time.monotonic() + self.lease_term
            if not fresh and not task.held_back:
                task.state, task.fetched = TaskState.RUNNING, True
                task.reopened = row.reason == UPDATE_LOST
            self._by_token[row.token] = task
            self._by_client[row.client][row.token] = task
            if poll := self._polls.get(row.client):
                poll.news.set()

    def remove(self, tasks: Iterable[OpenTask]) -> None:
        """Take tasks down; their records are in the database."""
        for task in tasks:
            self._by_token.pop(task.token, None)
            self._by_client[task.client].pop(task.token, None)

    def of_run(self, run_id: int) -> list[OpenTask]:
        """A run's open tasks."""
        return [t for t in self._by_token.values() if t.row.run_id == run_id]

    def all(self) -> list[OpenTask]:
        """Every open task."""
        return list(self._by_token.values())

    def of_client(self, client: str) -> list[OpenTask]:
        """A site's open tasks."""
        return list(self._by_client[client].values())

    def get(self, token: bytes) -> OpenTask | None:
        """An open task."""
        return self._by_token.get(token)

    # --- Finding a task for a call

    async def open_task(self, client: str, token: bytes) -> OpenTask:
        """The open task of a token.

        Raises:
            FedlinkError: TASK_NOT_FOUND if this client never had it or it was superseded;
                ROUND_CLOSED or TASK_COMPLETED if it is over.
        """
        task = self._by_token.get(token)
        if task is not None and task.client == client:
            return task
        raise ended(await self.ended_task(client, token))

    async def ended_task(self, client: str, token: bytes) -> TaskRow:
        """The record of a task that is over.

        Raises:
            FedlinkError: TASK_NOT_FOUND.
        """
        row = await self._db.run(lambda c: q.task_by_token(c, token)) if len(token) <= 64 else None
        if row is None or row.client != client or row.state == TaskState.SUPERSEDED:
            raise FedlinkError(
                Reason.TASK_NOT_FOUND, f"client {client!r} has no such task: never issued, revoked or superseded"
            )
        return row

    async def released(self, client: str, held: Collection[bytes]) -> list[bytes]:
        """Those of the held tokens that a site may forget."""
        unknown = [t for t in held if t not in self._by_client[client]]
        if not unknown:
            return []

        def work(c: Connection) -> list[bytes]:
            rows = {r.token: r for r in q.tasks_by_tokens(c, unknown)}
            return [t for t in unknown if _is_over(c, client, rows.get(t))]

        return await self._db.run(work)

    # --- Polling

    async def poll(self, client: str, held: Collection[bytes], wait: float) -> OpenTask | None:
        """Wait for a task that the site does not hold; evaluation before training, then oldest first.

        A newer poll of the same site ends this one, and draining ends every poll.
        """
        poll = _Poll()
        previous, self._polls[client] = self._polls.get(client), poll
        if previous is not None:
            previous.end()
        deadline = time.monotonic() + wait
        try:
            while not poll.over and not self.draining:
                poll.news.clear()
                waiting = [t for t in self.of_client(client) if t.token not in held or t.reopened]
                now = time.monotonic()
                if ready := [t for t in waiting if t.ready <= now]:
                    return self._fetch(min(ready, key=lambda t: (t.row.kind == "train", t.row.id)))
                if now >= deadline:
                    break
                until = min([deadline, *(t.ready for t in waiting)])
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(until - now):
                        await poll.news.wait()
        finally:
            if self._polls.get(client) is poll:
                del self._polls[client]
        return None

    def wake(self, client: str) -> None:
        """End a site's poll now (its rights have changed)."""
        if client in self._polls:
            self._polls[client].end()

    def drain(self) -> None:
        """Hand out no task from now on."""
        self.draining = True
        for poll in self._polls.values():
            poll.end()

    def _fetch(self, task: OpenTask) -> OpenTask:
        if not task.fetched:
            task.fetched, task.since = True, time.time()
        task.reopened = False
        return task

    # --- Leases

    def extend(self, task: OpenTask) -> None:
        """Give a task a full term from now."""
        task.expires = time.monotonic() + self.lease_term
        task.heard = time.time()

    def lapsed(self, connected: Collection[str]) -> list[OpenTask]:
        """Tasks to be marked AWAY: their term is over (fetched) or their site is not there (not fetched)."""
        now = time.monotonic()
        return [
            t
            for t in self._by_token.values()
            if t.term_over(now) and (t.state is TaskState.RUNNING or t.client not in connected)
        ]

    @staticmethod
    def note_metrics(task: OpenTask, points: Iterable[tuple[str, float]]) -> None:
        """Keep the last value of at most 64 names."""
        for name, value in points:
            if name in task.metrics or len(task.metrics) < _MAX_METRICS:
                task.metrics[name] = value


def retry_wait(row: TaskRow) -> float:
    """Seconds a task is held back after it was issued: none the first time, then longer with every attempt.

    Half of it is jitter, drawn from the token, so that a restart changes nothing.
    """
    if row.kind == "evaluate" or row.attempt <= 1:
        return 0.0
    longest = min(RETRY_CAP, RETRY_BASE * 2.0 ** min(row.attempt - 2, 60))
    return longest * (1.0 + random.Random(row.token).random()) / 2  # noqa: S311 - jitter, no secret


def ended(row: TaskRow) -> FedlinkError:
    """The error for a call on a task that is over: TASK_COMPLETED or ROUND_CLOSED."""
    if row.state in (TaskState.ACCEPTED, TaskState.REFUSED):
        return FedlinkError(Reason.TASK_COMPLETED, f"this task is completed ({row.state}); nothing is to be sent")
    return closed(row)


def closed(row: TaskRow) -> FedlinkError:
    """The error that says that a task is over and nothing is to be sent for it."""
    what = f"round {row.round}" if row.kind == "train" else f"evaluation of version {row.version}"
    if row.kind == "calibrate":
        what = "the measuring of settings"
    why = f" ({row.reason})" if row.reason else ""
    return FedlinkError(Reason.ROUND_CLOSED, f"{what} is closed{why}; drop the task, nothing more is to be sent")


def _is_over(c: Connection, client: str, row: TaskRow | None) -> bool:
    if row is None or row.client != client:
        return True
    if row.state != TaskState.ACCEPTED or row.kind != "train":
        return TaskState(row.state).final
    found = run_queries.round_attempt(c, row.run_id, row.round, row.round_attempt)
    return found is None or found.phase in ("committed", "failed")
