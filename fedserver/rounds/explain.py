"""Why a run waits: the one function that the CLI, the logs and every page read. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedserver.rounds.model import Phase, Round, TaskState
from fedserver.rounds.phases.select import needed


@dataclass(frozen=True, slots=True)
class Doing:
    """What one site was last heard doing."""

    activity: str = ""
    """E.g. "computing"; empty if nothing was heard."""
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    """Since the task was fetched, or since the site was last heard of if it is away."""
    held_back: float = 0.0
    """Seconds until the site may fetch the task: a further attempt after a failure."""

    def __str__(self) -> str:
        share = f" {self.done} of {self.total}" if self.total else ""
        return f"{self.activity}{share}, {self.seconds:.0f} s"


@dataclass(frozen=True)
class RunView:
    """What is known of a run when the question is asked."""

    state: str
    """`fedlink.v1.RunState` without its prefix, in lower case."""
    workload: str
    round: Round | None
    now: float
    eligible: frozenset[str] = frozenset()
    refusals: Mapping[str, str] = field(default_factory=dict)
    """Connected sites that can take no part, and why."""
    doing: Mapping[str, Doing] = field(default_factory=dict)
    """By site, for open tasks of the round or the evaluation."""
    evaluation: Mapping[str, TaskState] = field(default_factory=dict)
    """Open evaluation of the newest version, if the run waits for it."""
    evaluation_seconds_left: float = 0.0
    obstacle: str = ""
    """What is wrong with the server meanwhile, e.g. its disk."""


def explain(view: RunView) -> str:
    """One sentence: what the run waits for, on whom, and what will end it; empty if it waits for nothing."""
    text = _explain(view)
    return f"{text}; {view.obstacle}" if text and view.obstacle else text


def _explain(view: RunView) -> str:
    if view.state == "paused" and (view.round is None or view.round.phase is Phase.SELECT):
        return "paused by an operator; `fedserver run resume` goes on"
    if view.evaluation:
        who = _list_tasks(view, view.evaluation)
        return (
            f"waits for the evaluation of the newest version by {who}; "
            f"it goes on without them in {max(0.0, view.evaluation_seconds_left):.0f} s"
        )
    return _explain_round(view, view.round) if view.round else ""


def _explain_round(view: RunView, current: Round) -> str:
    match current.phase:
        case Phase.SELECT:
            return _explain_select(view, current)
        case Phase.COLLECT:
            return _explain_collect(view, current)
        case Phase.AGGREGATE:
            return f"round {current.number} is being aggregated from {len(current.accepted)} updates"
        case _:
            return ""


def _explain_select(view: RunView, current: Round) -> str:
    missing = needed(current) - len(view.eligible)
    if missing <= 0:
        return f"round {current.number} is about to start with {', '.join(sorted(view.eligible))}"
    there = f" (connected: {', '.join(sorted(view.eligible))})" if view.eligible else ""
    text = (
        f"round {current.number} waits for {missing} more site{'s' if missing != 1 else ''} that offer "
        f"workload {view.workload!r}{there}; it starts as soon as they connect"
    )
    if view.refusals:
        text += "; not counted: " + "; ".join(f"{c} {why}" for c, why in sorted(view.refusals.items()))
    return text


def _explain_collect(view: RunView, current: Round) -> str:
    open_tasks = {c: t.state for c, t in current.tasks.items() if not t.state.final}
    text = f"round {current.number} has {len(current.accepted)} of {len(current.tasks)} updates"
    if not open_tasks:
        return text
    text += f" and waits for {_list_tasks(view, open_tasks)}"
    if current.deadline_at is not None:
        return text + f"; it closes at the latest in {max(0.0, current.deadline_at - view.now):.0f} s"
    if any(s.waited_for for s in open_tasks.values()):
        return text
    return text + f"; it needs {current.policy.least} and has no deadline, so only their return or an operator ends it"


def _list_tasks(view: RunView, tasks: Mapping[str, TaskState]) -> str:
    parts = []
    for client, state in sorted(tasks.items()):
        doing = view.doing.get(client)
        if state is TaskState.AWAY:
            parts.append(f"{client} (away for {doing.seconds:.0f} s)" if doing else f"{client} (away)")
        elif doing and doing.held_back:
            parts.append(f"{client} (failed; its next attempt begins in {doing.held_back:.0f} s)")
        elif state is TaskState.PENDING:
            parts.append(f"{client} (has not fetched its task)")
        elif state is TaskState.CHECKING:
            parts.append(f"{client} (its update is being checked)")
        else:
            parts.append(f"{client} ({doing})" if doing and doing.activity else client)
    return ", ".join(parts)
