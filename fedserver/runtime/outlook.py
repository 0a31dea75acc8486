"""What can be told of a run from what is known of it: who can take part, what it waits for, where its round stood."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from fedlink.run_file import RunSpec
from fedserver.rounds.explain import Doing, RunView, explain
from fedserver.rounds.model import Entry, Phase, Round, TaskState
from fedserver.rounds.selection import refusal
from fedserver.runtime.board import OpenTask, TaskBoard
from fedserver.runtime.evaluations import Evaluations
from fedserver.runtime.sites import SiteRegistry
from fedserver.store.rows import RoundRow, RunRow, TaskRow


def eligible(run: str, spec: RunSpec, sites: SiteRegistry, ability: str = "") -> tuple[list[str], dict[str, str]]:
    """Connected sites that can take part in a run, and why others cannot.

    Args:
        run: its name.
        spec: its run file.
        sites: every site.
        ability: "evaluate"; by default what the run's strategy trains with.
    """
    wanted = ability or ("gradient" if spec.strategy == "fedsgd" else "train")
    if wanted == "evaluate" and not spec.evaluation.enabled:
        return [], {}
    verdicts = {
        name: refusal(offers, run=run, workload=spec.workload, ability=wanted, settings=spec.settings)
        for name, offers in sites.offers().items()
    }
    fine = sorted(name for name, why in verdicts.items() if why is None)
    return fine, {name: why for name, why in verdicts.items() if why is not None}


def waiting(
    run: RunRow,
    spec: RunSpec,
    current: Round | None,
    *,
    sites: SiteRegistry,
    board: TaskBoard,
    evaluations: Evaluations,
    obstacle: str,
) -> str:
    """One sentence: what a run waits for; empty if for nothing."""
    now = time.time()
    fine, refusals = eligible(run.name, spec, sites)
    # Training last, so that it is what is told of a site that has both kinds open.
    tasks = sorted(board.of_run(run.id), key=lambda t: t.row.kind)
    return explain(
        RunView(
            state=run.state,
            workload=spec.workload,
            round=current,
            now=now,
            eligible=frozenset(fine),
            refusals=refusals,
            doing={t.client: _doing(t, now) for t in tasks},
            evaluation=evaluations.states(run.version) if current is None else {},
            evaluation_seconds_left=evaluations.seconds_left(run.version),
            obstacle=obstacle,
        )
    )


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


def _doing(task: OpenTask, now: float) -> Doing:
    since = task.heard if task.state is TaskState.AWAY else task.since
    return Doing(task.activity, task.done, task.total, now - since, task.held_back)
