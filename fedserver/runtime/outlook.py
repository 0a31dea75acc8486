"""What can be told of a run from what is known of it: who can take part, what it waits for, where its round stood."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedlink.run_file import RunSpec
from fedserver.rounds.explain import Doing, RunView
from fedserver.rounds.model import Entry, Phase, Round, TaskState
from fedserver.rounds.selection import Offer, refusal
from fedserver.runtime.board import OpenTask, TaskBoard
from fedserver.runtime.calibrating import Calibrating
from fedserver.runtime.evaluations import Evaluations
from fedserver.runtime.sites import Site, SiteRegistry
from fedserver.store.rows import RoundRow, RunRow, TaskRow


def eligible(run: str, spec: RunSpec, sites: SiteRegistry, ability: str = "") -> tuple[list[str], dict[str, str]]:
    """Connected sites that can take part in a run, and why others cannot.

    Args:
        run: its name.
        spec: its run file.
        sites: every site.
        ability: "evaluate"; by default what the run's strategy trains with.
    """
    wanted = _ability(spec, ability)
    if not wanted:
        return [], {}
    verdicts = {name: _refusal(run, spec, offers, wanted) for name, offers in sites.offers().items()}
    fine = sorted(name for name, why in verdicts.items() if why is None)
    return fine, {name: why for name, why in verdicts.items() if why is not None}


def view(
    run: RunRow,
    spec: RunSpec,
    current: Round | None,
    *,
    sites: SiteRegistry,
    board: TaskBoard,
    evaluations: Evaluations,
    calibrating: Calibrating,
    aggregating: float,
    obstacle: str,
) -> RunView:
    """What is known of a live run at this moment.

    Args:
        run: its row.
        spec: its run file.
        current: its round.
        sites: every site.
        board: the open tasks.
        evaluations: the run's.
        calibrating: the run's.
        aggregating: seconds the aggregation under way has taken.
        obstacle: what is wrong with the server.
    """
    now = time.time()
    fine, refusals = eligible(run.name, spec, sites)
    # Training last, so that it is what is told of a site that has both kinds open.
    tasks = sorted(board.of_run(run.id), key=lambda t: t.row.kind)
    away = _away(run.name, spec, sites)
    return RunView(
        state=run.state,
        workload=spec.workload,
        round=current,
        now=now,
        eligible=frozenset(fine),
        refusals=refusals,
        away={s.name: now - s.last_seen for s in away},
        returning=frozenset(s.name for s in away if sites.returning(s)),
        grace_left=sites.grace_left,
        doing={t.client: replace(_doing(t, now), busy_with=_busy_with(t, board)) for t in tasks},
        aggregating=aggregating,
        evaluation=evaluations.states(run.version) if current is None else {},
        evaluation_seconds_left=evaluations.seconds_left(run.version),
        calibration=calibrating.states if calibrating.under_way else {},
        calibration_seconds_left=calibrating.seconds_left,
        draining=board.draining,
        obstacle=obstacle,
    )


def ended(run: RunRow) -> RunView:
    """What is known of a run that has ended."""
    return RunView(state=run.state, workload=run.parsed.workload, round=None, now=time.time(), reason=run.reason)


def returning(run: str, spec: RunSpec, sites: SiteRegistry, ability: str = "") -> list[str]:
    """Sites that would be `eligible`, were there when the server stopped, and still have time to come back."""
    return [s.name for s in _away(run, spec, sites, ability) if sites.returning(s)]


def _away(run: str, spec: RunSpec, sites: SiteRegistry, ability: str = "") -> list[Site]:
    """Sites that could take part if they were connected."""
    wanted = _ability(spec, ability)
    return [s for s in sites.absent() if wanted and _refusal(run, spec, s.offers, wanted) is None]


def _ability(spec: RunSpec, ability: str) -> str:
    """What a site has to be able to do; empty if nobody is to do it."""
    if ability == "evaluate" and not spec.evaluation.enabled:
        return ""
    return ability or ("gradient" if spec.strategy == "fedsgd" else "train")


def _refusal(run: str, spec: RunSpec, offers: Mapping[str, Offer], ability: str) -> str | None:
    return refusal(offers, run=run, workload=spec.workload, ability=ability, settings=spec.settings)


def restored(run: RunRow, found: RoundRow, tasks: Sequence[TaskRow], *, not_before: float) -> Round:
    """The round that a restart interrupted, with all its attempts; its deadline is not before a moment."""
    spec = run.parsed
    deadline = None if found.deadline_at is None else max(found.deadline_at, not_before)
    entries: dict[str, Entry] = {}
    for t in tasks:  # in order of attempt, so the newest stays
        state = TaskState(t.state)
        entries[t.client] = Entry(state if state.final else TaskState.RUNNING, t.attempt)
    base = Round(run.name, found.number, found.attempt, spec.cohort, spec.seed)
    return replace(base, phase=Phase(found.phase), tasks=entries, deadline_at=deadline, reason=found.reason)


def _busy_with(task: OpenTask, board: TaskBoard) -> str:
    """What a site has in hand while it has not fetched a task; empty if nothing."""
    if task.fetched:
        return ""
    others = (t for t in board.of_client(task.client) if t.fetched and t.state is TaskState.RUNNING)
    other = next(others, None)
    if other is None:
        return ""
    if other.run.id != task.run.id:
        return f"run {other.run.name}"
    if other.row.kind == "evaluate":
        return f"the evaluation of version {other.row.version}"
    return "its training"


def _doing(task: OpenTask, now: float) -> Doing:
    since = task.since if task.fetched else task.row.issued
    if task.state is TaskState.AWAY:
        since = task.heard
    elif task.state is TaskState.CHECKING:
        since = task.handed_in
    return Doing(task.activity, task.done, task.total, now - since, task.held_back)
