"""What the driver writes: each function is the body of a transaction, given everything it needs.

They run on the database's thread, so they touch nothing of the running server.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection

from fedserver.rounds.calibration import Measured
from fedserver.rounds.evaluation import is_better, weighted_means
from fedserver.rounds.model import Phase, Round, TaskState
from fedserver.runtime import speeds
from fedserver.runtime.board import UPDATE_LOST, OpenTask
from fedserver.runtime.versions import StoredVersion, version_owner
from fedserver.store.queries import models as model_queries
from fedserver.store.queries import runs as q
from fedserver.store.queries import tasks as task_queries
from fedserver.store.rows import RunRow, TaskRow, UploadRow, VersionRow


def save_round(c: Connection, run_id: int, after: Round) -> None:
    """Write where a round stands."""
    values: dict[str, Any] = {"phase": after.phase, "deadline_at": after.deadline_at, "reason": after.reason}
    if after.phase is Phase.FAILED:
        values["closed"] = time.time()
    q.save_round(c, run_id, after.number, after.attempt, **values)


def open_round(c: Connection, run_id: int, number: int, deadline_at: float | None) -> int:
    """Add the next attempt at a round, which has until `deadline_at` to find its sites.

    Returns:
        Which attempt it is.
    """
    before = q.newest_round(c, run_id, number)
    attempt = before.attempt + 1 if before else 1
    q.insert_round(c, run_id, number, attempt, phase=Phase.SELECT, now=time.time(), deadline_at=deadline_at)
    return attempt


def issue_train(c: Connection, run: RunRow, after: Round, clients: Collection[str], attempt: int) -> list[TaskRow]:
    """Write a training task for each site, with the steps that it is limited to."""
    of = {"round": after.number, "round_attempt": after.attempt, "version": run.version}
    given = speeds.given_steps(c, run, after, clients, attempt)
    rows = _issue(c, run, "train", clients, given=given, attempt=attempt, **of)
    kind = "round_started" if attempt == 1 else "task_retried"
    data: dict[str, Any] = {"round": after.number, "attempt": after.attempt, "clients": sorted(clients)}
    if run.parsed.work.balanced:
        data["steps"] = given
    q.add_event(c, run.id, kind, data, time.time())
    return rows


def issue_evaluation(
    c: Connection, run: RunRow, version: int, clients: Collection[str], stale: Collection[int]
) -> list[TaskRow]:
    """Write the evaluation tasks of a version, once; `stale` ones of older versions are superseded."""
    if task_queries.evaluation_tasks(c, run.id, version):
        return []
    task_queries.end_tasks(c, stale, TaskState.SUPERSEDED, "NEWER_VERSION", time.time())
    return _issue(c, run, "evaluate", clients, attempt=1, round=0, round_attempt=0, version=version)


def issue_calibration(
    c: Connection, run: RunRow, clients: Collection[str], names: Sequence[str], attempt: int
) -> list[TaskRow]:
    """Write a task for each site to measure settings of the run."""
    if attempt == 1:
        q.add_event(
            c, run.id, "run_calibration_started", {"settings": list(names), "clients": sorted(clients)}, time.time()
        )
    return _issue(c, run, "calibrate", clients, attempt=attempt, round=0, round_attempt=0, version=0)


def close_calibration(c: Connection, run: RunRow, measured: Measured, late: Iterable[int]) -> None:
    """Record what sites have measured: from now on it is part of the run."""
    now = time.time()
    task_queries.end_tasks(c, late, TaskState.CLOSED, "CALIBRATION_CLOSED", now)
    q.save_run(c, run.id, calibration=measured.serialize())
    q.add_event(c, run.id, "run_calibrated", asdict(measured), now)


def _issue(
    c: Connection,
    run: RunRow,
    kind: str,
    clients: Collection[str],
    *,
    given: Mapping[str, int | None] | None = None,
    **values: int,
) -> list[TaskRow]:
    common = {"run_id": run.id, "kind": kind, "state": TaskState.PENDING, "issued": time.time(), **values}
    steps = given or {}
    rows = [{"token": secrets.token_bytes(24), "client": n, "given_steps": steps.get(n), **common} for n in clients]
    return task_queries.insert_tasks(c, rows)


def close_tasks(
    c: Connection, run_id: int, after: Round, task_ids: Collection[int], *, kind: str, data: Mapping[str, Any]
) -> None:
    """A round takes no further update."""
    now = time.time()
    task_queries.end_tasks(c, task_ids, TaskState.CLOSED, "ROUND_CLOSED", now)
    q.add_event(c, run_id, kind, {"round": after.number, "attempt": after.attempt, **data}, now)


def end_task(c: Connection, task: OpenTask, state: TaskState, values: Mapping[str, Any]) -> None:
    """A task became final; `values` are columns, with "metrics" as a table."""
    now = time.time()
    metrics = dict(task.metrics) | dict(values.get("metrics", {}))
    task_queries.save_task(
        c,
        task.row.id,
        state=state,
        ended=now,
        metrics=json.dumps(metrics),
        bytes_down=task.bytes_down,
        bytes_up=task.bytes_up,
        **{k: v for k, v in values.items() if k != "metrics"},
    )
    if task.row.kind == "train":
        if state is TaskState.ACCEPTED:
            speeds.remember(c, task, values)
        data = {"round": task.row.round, "client": task.client, "attempt": task.row.attempt}
        data |= {k: values[k] for k in ("reason", "message", "tensor", "num_examples", "cut") if values.get(k)}
        q.add_event(c, task.row.run_id, f"task_{state}", data, now)


def commit_version(
    c: Connection,
    run: RunRow,
    after: Round,
    stored: StoredVersion,
    *,
    tasks: Sequence[TaskRow],
    seconds: float,
    memory: int,
) -> None:
    """A round becomes a version, and what it has used is recorded.

    Args:
        c: the transaction.
        run: the run before.
        after: the round.
        stored: the version.
        tasks: those whose updates are in it.
        seconds: that it took to make.
        memory: the most bytes that the server's process has had so far.
    """
    number, now = after.number, time.time()
    q.insert_version(
        c,
        run_id=run.id,
        number=number,
        digest=stored.manifest.digest,
        manifest_size=stored.manifest.size,
        size=stored.size,
        tensors=stored.tensors,
        master_digest=stored.master.digest if stored.master else None,
        created=now,
    )
    model_queries.add_refs(c, version_owner(run.id, number), stored.digests)
    used = _used(c, run, stored, tasks, memory)
    q.save_round(c, run.id, number, after.attempt, phase=after.phase, closed=now, used=json.dumps(used))
    q.save_run(c, run.id, version=number)
    # Before its tasks the round waited, for sites to come or to measure settings.
    began = min((t.issued for t in task_queries.round_tasks(c, run.id, number, after.attempt)), default=now)
    data = {
        "round": number,
        "version": number,
        "clients": {t.client: t.num_examples for t in tasks},
        "bytes_up": used["bytes_up"],
        "bytes_down": used["bytes_down"],
        "aggregate_seconds": round(seconds, 4),
        "folded_early": stored.folded_early,
        "seconds": round(now - began, 4),
    }
    q.add_event(c, run.id, "round_committed", data, now)


def _used(c: Connection, run: RunRow, stored: StoredVersion, tasks: Sequence[TaskRow], memory: int) -> dict[str, int]:
    """What a round has used when its version is in the table: now most of its bytes lie on the disk."""
    measured = task_queries.evaluation_tasks(c, run.id, run.version)
    if run.version == 0:
        measured += task_queries.calibration_tasks(c, run.id)
    # Version 0 is the model that the run began with. The others are alike, for they hold the same tensors.
    made = sum(v.number > 0 for v in q.list_versions(c, run.id))
    return {
        "clients": len(tasks),
        "fetching": len({t.client for t in (*tasks, *measured)}),
        "bytes_down": bytes_down(c, run.id, tasks, run.version),
        "bytes_up": sum(t.bytes_up for t in tasks),
        "server_disk": task_queries.uploaded_bytes(c, run.id) + made * stored.written,
        "server_memory": memory,
    }


def reopen_task(c: Connection, task: TaskRow) -> TaskRow:
    """An accepted update is not there any more: its site is asked for it again.

    Returns:
        The task as it is now.
    """
    task_queries.save_task(c, task.id, state=TaskState.PENDING, reason=UPDATE_LOST, update_digest=None, ended=None)
    data = {"round": task.round, "client": task.client, "reason": UPDATE_LOST}
    q.add_event(c, task.run_id, "task_reopened", data, time.time())
    return task_queries.task_by_id(c, task.id)


def bytes_down(c: Connection, run_id: int, tasks: Sequence[TaskRow], base: int) -> int:
    """Bytes sent so that a round could start: a site that measures with the base version first has it for training."""
    before = task_queries.calibration_tasks(c, run_id) if base == 0 else []
    return sum(t.bytes_down for t in (*tasks, *before, *task_queries.evaluation_tasks(c, run_id, base)))


def aggregation_inputs(c: Connection, run: RunRow, current: Round) -> tuple[list[TaskRow], VersionRow]:
    """The accepted tasks of a round, in client order, and the version they started from."""
    tasks = task_queries.round_tasks(c, run.id, current.number, current.attempt)
    base = q.version(c, run.id, run.version)
    assert base is not None
    return sorted((t for t in tasks if t.state == TaskState.ACCEPTED), key=lambda t: t.client), base


def forget_updates(c: Connection, run_id: int, current: Round) -> list[UploadRow]:
    """Drop the rows of everything uploaded for a round.

    Returns:
        What was uploaded.
    """
    tasks = task_queries.round_tasks(c, run_id, current.number, current.attempt)
    uploads = task_queries.task_uploads(c, [t.id for t in tasks])
    task_queries.delete_uploads(c, [u.id for u in uploads])
    return uploads


def close_evaluation(c: Connection, run: RunRow, version: int, late: Iterable[int]) -> dict[str, float]:
    """Record the means over the sites, and whether the version is the best so far.

    Returns:
        The means.
    """
    now, settings = time.time(), run.parsed.evaluation
    task_queries.end_tasks(c, late, TaskState.CLOSED, "EVALUATION_CLOSED", now)
    rows = [t for t in task_queries.evaluation_tasks(c, run.id, version) if t.state == TaskState.ACCEPTED]
    means = weighted_means([(t.num_examples, t.values) for t in rows])
    q.save_version(c, run.id, version, metrics=json.dumps(means), evaluated=True)
    value, current = means.get(settings.metric), q.run_by_id(c, run.id)
    measured = q.version(c, run.id, version)
    kept = measured is not None and measured.kept
    best = kept and value is not None and is_better(value, current.best_value, settings.goal)
    if best:
        q.save_run(c, run.id, best_version=version, best_value=value)
    clients = {t.client: {"num_examples": t.num_examples, "metrics": t.values} for t in rows}
    data = {"version": version, "metrics": means, "clients": clients, "best": best}
    q.add_event(c, run.id, "version_evaluated", data, now)
    return means


def end_run(
    c: Connection, run_id: int, current: Round | None, task_ids: Collection[int], *, state: str, reason: str
) -> None:
    """A run ends, and with it the round that is open."""
    now = time.time()
    task_queries.end_tasks(c, task_ids, TaskState.CLOSED, "RUN_ENDED", now)
    if current is not None and current.phase not in (Phase.COMMITTED, Phase.FAILED):
        q.save_round(c, run_id, current.number, current.attempt, phase=Phase.FAILED, reason=reason, closed=now)
    q.save_run(c, run_id, state=state, reason=reason, ended=now)
    q.add_event(c, run_id, "run_ended", {"state": state, "reason": reason}, now)
