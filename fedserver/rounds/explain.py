"""Why a run waits: the one function that the CLI, the logs and every page read. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from fedserver.rounds.model import Phase, Round, TaskState
from fedserver.rounds.phases.select import needed
from fedserver.rounds.wording import listed

RETURNING = "returning"
"""State of a client without a task that was connected when the server stopped and has time to come back."""
_ENDED = ("completed", "stopped", "failed")
_BYTES = ("downloading", "uploading")
_SINCE = {
    TaskState.PENDING.value: "has not fetched its task",
    TaskState.RUNNING.value: "has had its task",
    TaskState.AWAY.value: "away",
    TaskState.CHECKING.value: "its update is being checked",
}


@dataclass(frozen=True, slots=True)
class Doing:
    """What one site was last heard doing."""

    activity: str = ""
    """E.g. "computing"; empty if nothing was heard."""
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    """Since the task was fetched (written, if it was not; handed in, if it is being checked), or since the site was
    last heard of if it is away."""
    held_back: float = 0.0
    """Seconds until the site may fetch the task: a further attempt after a failure."""
    busy_with: str = ""
    """What the site has in hand if it has not fetched this task, e.g. "run other", "the evaluation of version 3"."""

    def __str__(self) -> str:
        share = ""
        if self.total and self.activity in _BYTES:
            share = f" {self.done / 1e6:.1f} of {self.total / 1e6:.1f} MB"
        elif self.total:
            share = f" {self.done} of {self.total}"
        return f"{self.activity}{share}, {span(self.seconds)}"


@dataclass(frozen=True)
class RunView:
    """What is known of a run when the question is asked."""

    state: str
    """`fedlink.v1.RunState` without its prefix, in lower case."""
    workload: str
    round: Round | None
    now: float
    reason: str = ""
    """Why it ended, if it has."""
    eligible: frozenset[str] = frozenset()
    refusals: Mapping[str, str] = field(default_factory=dict)
    """Connected sites that can take no part, and why."""
    away: Mapping[str, float] = field(default_factory=dict)
    """Sites that would be eligible and are not connected: seconds since each was heard of."""
    returning: frozenset[str] = frozenset()
    """Those of them that were connected when the server stopped and still have time to come back."""
    grace_left: float = 0.0
    """How many seconds those have."""
    doing: Mapping[str, Doing] = field(default_factory=dict)
    """By site, for open tasks of the round or the evaluation."""
    aggregating: float = 0.0
    """Seconds the aggregation has taken so far."""
    evaluation: Mapping[str, TaskState] = field(default_factory=dict)
    """Open evaluation of the newest version, if the run waits for it."""
    evaluation_seconds_left: float = 0.0
    calibration: Mapping[str, TaskState] = field(default_factory=dict)
    """Open tasks to measure settings, for which the first round waits."""
    calibration_seconds_left: float = 0.0
    draining: bool = False
    """The server lets nothing new begin, and ends soon."""
    obstacle: str = ""
    """What is wrong with the server meanwhile, e.g. its disk."""


@dataclass(frozen=True, slots=True)
class Waited:
    """A site that a run waits for, or that may still come."""

    client: str
    state: str
    """A `TaskState`, or for a site without a task "away" or `RETURNING`."""
    doing: Doing | None = None

    def __str__(self) -> str:
        what = self._what()
        return f"{self.client} ({what})" if what else self.client

    def _what(self) -> str:
        if self.state == RETURNING:
            return "connected when the server stopped"
        if self.state == TaskState.PENDING and self.doing and self.doing.held_back:
            return f"failed; its next attempt begins in {span(self.doing.held_back)}"
        if self.state == TaskState.PENDING and self.doing and self.doing.busy_with:
            return f"busy with {self.doing.busy_with}; this task waits for {span(self.doing.seconds)}"
        if self.state == TaskState.RUNNING and self.doing and self.doing.activity:
            return str(self.doing)
        lasting = f" for {span(self.doing.seconds)}" if self.doing else ""
        return _SINCE[self.state] + lasting if lasting or self.state != TaskState.RUNNING else ""


@dataclass(frozen=True, slots=True)
class Wait:
    """What a run waits for."""

    sentence: str = ""
    """Empty if it waits for nothing."""
    clients: tuple[Waited, ...] = ()
    """By name."""
    endless: bool = False
    """Nothing will end it but a site's coming or an operator."""


def span(seconds: float) -> str:
    """A length of time for people: "75 s", "42 min", "30 h", "12 d"."""
    for unit, length, most in (("s", 1, 600), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < most:
            return f"{max(0.0, seconds) / length:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def explain(view: RunView) -> str:
    """One sentence: what the run waits for, on whom, and what will end it; empty if it waits for nothing."""
    return account(view).sentence


def account(view: RunView) -> Wait:
    """What the run waits for, in a sentence and in its parts."""
    if view.state in _ENDED:
        return Wait(f"it has ended ({view.state}): {view.reason}")
    current = view.round
    idle = (current is None or current.phase is Phase.SELECT) and not view.calibration
    if view.draining and idle and not view.evaluation:
        return Wait("the server is draining: nothing begins until it is started again", endless=True)
    if view.state == "paused" and idle and not view.evaluation:
        return Wait(
            "paused by an operator: only `fedserver run resume` or `fedserver run stop` ends that", endless=True
        )
    wait = _evaluation(view) if view.evaluation else _round(view, current) if current else Wait()
    if view.calibration:
        wait = _calibration(view)
    return replace(wait, sentence="; ".join((wait.sentence, *_meanwhile(view)))) if wait.sentence else wait


def _meanwhile(view: RunView) -> Iterator[str]:
    if view.draining:
        yield "the server is draining: no task is handed out and no deadline runs out"
    if view.state == "paused":
        yield "the run is paused: no further round begins until `fedserver run resume`"
    if view.obstacle:
        yield view.obstacle


def absentees(view: RunView) -> str:
    """Who cannot be counted on for a round, and why; empty if nobody is known."""
    parts = []
    if view.away:
        parts.append("not connected: " + listed(_absent(view)))
    if view.refusals:
        parts.append("not counted: " + listed([f"{c} {why}" for c, why in sorted(view.refusals.items())], "; "))
    return "; ".join(parts)


def _absent(view: RunView) -> tuple[Waited, ...]:
    return tuple(
        Waited(c, RETURNING if c in view.returning else TaskState.AWAY, Doing(seconds=seconds))
        for c, seconds in sorted(view.away.items())
    )


def _evaluation(view: RunView) -> Wait:
    clients = _tasks(view, view.evaluation)
    left = span(view.evaluation_seconds_left)
    return Wait(
        f"waits for the evaluation of the newest version by {listed(clients)}; it goes on without them in {left}",
        clients,
    )


def _calibration(view: RunView) -> Wait:
    clients, seconds = _tasks(view, view.calibration), view.calibration_seconds_left
    ending = f"without them in {span(seconds)}" if seconds > 0 else "with the first that answers"
    return Wait(f'waits for {listed(clients)} to measure what the run gives as "auto"; it goes on {ending}', clients)


def _round(view: RunView, current: Round) -> Wait:
    match current.phase:
        case Phase.SELECT:
            return _select(view, current)
        case Phase.COLLECT:
            return _collect(view, current)
        case Phase.AGGREGATE:
            updates, names = len(current.accepted), listed(current.accepted)
            return Wait(
                f"round {current.number} is being aggregated from {updates} update{'s' * (updates != 1)} ({names}), "
                f"for {span(view.aggregating)} now; the run goes on when that is done"
            )
        case _:
            return Wait()


def _select(view: RunView, current: Round) -> Wait:
    missing, there = needed(current) - len(view.eligible), listed(sorted(view.eligible))
    if missing <= 0 and not view.returning:
        return Wait(f"round {current.number} is about to start with {there}")
    absent, one = _absent(view), missing == 1
    if missing <= 0:
        late = tuple(w for w in absent if w.state == RETURNING)
        text = (
            f"round {current.number} has {len(view.eligible)} sites ({there}) and waits for "
            f"{listed([w.client for w in late])}, connected when the server stopped, to come back; "
            f"it starts without them in {span(view.grace_left)}"
        )
        return Wait(text, late)
    text = (
        f"round {current.number} waits for {'1 more site that offers' if one else f'{missing} more sites that offer'} "
        f"workload {view.workload!r}{f' (connected: {there})' if there else ''}; it starts as soon as "
        f"{'it connects' if one else 'they connect'}"
    )
    if current.deadline_at is None:
        text += ", and only that or an operator ends the wait"
    else:
        text += f"; if {'it does' if one else 'they do'} not, the run fails in {span(current.deadline_at - view.now)}"
    if others := absentees(view):
        text += f"; {others}"
    return Wait(text, absent, endless=current.deadline_at is None)


def _collect(view: RunView, current: Round) -> Wait:
    open_tasks = {c: t.state for c, t in current.tasks.items() if not t.state.final}
    text = f"round {current.number} has {len(current.accepted)} of {len(current.tasks)} updates"
    if not open_tasks:
        return Wait(text)
    clients = _tasks(view, open_tasks)
    ending = _ending(view, current)
    text += f" and waits for {listed(clients)}; {ending}"
    waited = current.deadline_at is not None or any(s.waited_for for s in open_tasks.values())
    return Wait(text, clients, endless=not waited)


def _ending(view: RunView, current: Round) -> str:
    policy, accepted = current.policy, len(current.accepted)
    if current.deadline_at is not None:
        text = f"it closes at the latest in {span(current.deadline_at - view.now)}"
        return text if accepted >= policy.least else f"{text}, and fails with fewer than {policy.least} updates"
    if not any(t.state.waited_for for t in current.tasks.values()):
        return f"it needs {policy.least} and has no deadline, so only their return or an operator ends it"
    first = f"it has {policy.target} updates or " if policy.target else ""
    return f"it closes when {first}nobody is left who answers"


def _tasks(view: RunView, tasks: Mapping[str, TaskState]) -> tuple[Waited, ...]:
    return tuple(Waited(client, state, view.doing.get(client)) for client, state in sorted(tasks.items()))
