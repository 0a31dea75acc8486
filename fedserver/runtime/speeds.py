"""How fast sites train, and the steps that follow from it; like `records`, bodies of transactions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import astuple
from typing import Any

from sqlalchemy import Connection

from fedserver.rounds.model import Round
from fedserver.rounds.sharing import Training, shares, usual
from fedserver.runtime.board import OpenTask
from fedserver.store.queries import speeds as q
from fedserver.store.queries import tasks as task_queries
from fedserver.store.rows import RunRow, SpeedRow


def trainings(row: SpeedRow) -> list[Training]:
    """What is remembered of a site and workload, newest last."""
    return [Training(*sample) for sample in row.values]


def remember(c: Connection, task: OpenTask, values: Mapping[str, Any]) -> None:
    """Note how fast an accepted training went; `values` are columns of its task."""
    counts = (values.get("steps", 0), values.get("examples_seen", 0), values.get("compute_seconds", 0.0))
    if training := Training.of(task.row.run_id, *counts):
        q.add_training(c, task.client, task.run.parsed.workload, astuple(training))


def given_steps(
    c: Connection, run: RunRow, after: Round, clients: Collection[str], attempt: int
) -> dict[str, int | None]:
    """The steps that a round's tasks are limited to; None: they are not. A further attempt has those of the first."""
    work = run.parsed.work
    if not work.balanced:
        return dict.fromkeys(clients, work.equal_steps)
    if attempt > 1:
        first = task_queries.round_tasks(c, run.id, after.number, after.attempt)
        return {t.client: t.given_steps for t in first if t.client in clients}
    measured = {row.client: usual(trainings(row), run.id) for row in q.list_speeds(c, run.parsed.workload)}
    speeds = {name: found.steps_per_second if (found := measured.get(name)) else None for name in clients}
    return dict(shares(speeds, work.equal_steps or 1))
