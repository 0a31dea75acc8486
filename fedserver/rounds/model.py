"""The values the round machine works on: a round, its tasks, events, actions."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedlink.run_file import Cohort


class Phase(enum.StrEnum):
    """Where a round stands."""

    SELECT = "select"
    COLLECT = "collect"
    AGGREGATE = "aggregate"
    COMMITTED = "committed"
    FAILED = "failed"


class TaskState(enum.StrEnum):
    """Where a task stands; see `fedlink.v1.TaskState`, which has the same names."""

    PENDING = "pending"
    RUNNING = "running"
    AWAY = "away"
    CHECKING = "checking"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    FAILED = "failed"
    CLOSED = "closed"
    SUPERSEDED = "superseded"

    @property
    def final(self) -> bool:
        """Whether a task in this state never changes again."""
        return self in _FINAL

    @property
    def waited_for(self) -> bool:
        """Whether a round waits for a task in this state."""
        return self in (TaskState.PENDING, TaskState.RUNNING, TaskState.CHECKING)


_FINAL = frozenset((TaskState.ACCEPTED, TaskState.REFUSED, TaskState.FAILED, TaskState.CLOSED, TaskState.SUPERSEDED))


@dataclass(frozen=True, slots=True)
class Entry:
    """The newest task of one site in a round."""

    state: TaskState = TaskState.PENDING
    attempt: int = 1


@dataclass(frozen=True)
class Round:
    """One attempt at one round."""

    run: str
    number: int
    attempt: int
    policy: Cohort
    seed: int
    """The run's; cohorts are drawn from (seed, number, attempt)."""
    phase: Phase = Phase.SELECT
    tasks: Mapping[str, Entry] = field(default_factory=dict)
    """By client name."""
    deadline_at: float | None = None
    """When the phase it is in ends at the latest, in seconds since the epoch: SELECT fails then, COLLECT closes."""
    reason: str = ""
    """Why it failed."""

    def count(self, *states: TaskState) -> int:
        """Number of tasks in one of these states."""
        return sum(1 for t in self.tasks.values() if t.state in states)

    def with_task(self, client: str, entry: Entry) -> Round:
        """The same round with one task changed."""
        return replace(self, tasks={**self.tasks, client: entry})

    @property
    def accepted(self) -> tuple[str, ...]:
        """Clients whose updates count, in the order in which they are added up."""
        return tuple(sorted(c for c, t in self.tasks.items() if t.state is TaskState.ACCEPTED))

    @property
    def first(self) -> tuple[str, ...]:
        """Those of the `accepted` that are added up first whatever becomes of the others.

        Before them in the order are only sites of which no update can come any more.
        """
        found = []
        for client, task in sorted(self.tasks.items()):
            if not task.state.final:
                break
            if task.state is TaskState.ACCEPTED:
                found.append(client)
        return tuple(found)

    def reopened(self, lost: UpdateLost) -> Round:
        """The same round, which collects an update again that had been accepted."""
        deadline = None if self.deadline_at is None else max(self.deadline_at, lost.not_before)
        again = replace(self.tasks[lost.client], state=TaskState.PENDING)
        return replace(self.with_task(lost.client, again), phase=Phase.COLLECT, deadline_at=deadline)


@dataclass(frozen=True, slots=True)
class SitesChanged:
    """These sites are connected and eligible now."""

    eligible: frozenset[str]
    now: float
    returning: frozenset[str] = frozenset()
    """Sites that would be eligible, were connected when the server stopped, and still have time to come back."""
    absent: str = ""
    """Who is not among the eligible, and why; for the reason of a failure."""


@dataclass(frozen=True, slots=True)
class TaskChanged:
    """A site's task went to another state."""

    client: str
    state: TaskState
    now: float
    retryable: bool = False
    """For FAILED: another attempt may succeed."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""

    now: float


@dataclass(frozen=True, slots=True)
class CloseRequested:
    """An operator closes the round with what has arrived."""

    now: float


@dataclass(frozen=True, slots=True)
class Aggregated:
    """The new version is written and is being committed."""


@dataclass(frozen=True, slots=True)
class AggregationFailed:
    """There is no new version, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class UpdateLost:
    """The bytes of an accepted update have changed or gone before they were added up; its site still has it."""

    client: str
    not_before: float
    """The deadline is not earlier: the site gets a term to send it again."""


Event = SitesChanged | TaskChanged | Tick | CloseRequested | Aggregated | AggregationFailed | UpdateLost
"""What the machine is told."""


@dataclass(frozen=True, slots=True)
class IssueTasks:
    """Write a task for each of these sites."""

    clients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reissue:
    """Write a further attempt for a site whose task failed."""

    client: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Add up the updates of these sites, in this order; every other task is closed."""

    clients: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fail:
    """Close every task; try the round again, or fail the run."""

    reason: str
    final: bool = False
    """Another attempt would be no better: the run fails."""


Action = IssueTasks | Reissue | Aggregate | Fail
"""What the machine asks for."""
