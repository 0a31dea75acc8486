"""Tasks and the uploads made under them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from fedserver.store.rows import TaskRow, UploadRow
from fedserver.store.tables import tasks, uploads, versions

OPEN_STATES = ("pending", "running", "away", "checking")
"""States of tasks that may still change."""


def insert_tasks(c: Connection, rows: Sequence[Mapping[str, Any]]) -> list[TaskRow]:
    """Add tasks; the rows that they became, in the same order."""
    if not rows:
        return []
    done = c.execute(insert(tasks).returning(tasks, sort_by_parameter_order=True), list(rows))
    return [TaskRow.of(r) for r in done]


def save_task(c: Connection, task_id: int, **values: Any) -> None:
    """Write some columns of a task."""
    c.execute(update(tasks).where(tasks.c.id == task_id).values(**values))


def end_tasks(c: Connection, task_ids: Iterable[int], state: str, reason: str, now: float) -> None:
    """Bring open tasks to a final state."""
    where = (tasks.c.id.in_(list(task_ids)), tasks.c.state.in_(OPEN_STATES))
    c.execute(update(tasks).where(*where).values(state=state, reason=reason, ended=now))


def task_by_id(c: Connection, task_id: int) -> TaskRow:
    """A task that exists."""
    return TaskRow.of(c.execute(select(tasks).where(tasks.c.id == task_id)).one())


def task_by_token(c: Connection, token: bytes) -> TaskRow | None:
    """The task of a token."""
    row = c.execute(select(tasks).where(tasks.c.token == token)).first()
    return TaskRow.of(row) if row else None


def tasks_by_tokens(c: Connection, tokens: Iterable[bytes]) -> list[TaskRow]:
    """The tasks of these tokens."""
    return [TaskRow.of(r) for r in c.execute(select(tasks).where(tasks.c.token.in_(list(tokens))))]


def open_tasks(c: Connection) -> list[TaskRow]:
    """Every task that may still change, oldest first."""
    return [TaskRow.of(r) for r in c.execute(select(tasks).where(tasks.c.state.in_(OPEN_STATES)).order_by(tasks.c.id))]


def round_tasks(c: Connection, run_id: int, number: int, attempt: int) -> list[TaskRow]:
    """The training tasks of one attempt at a round, every attempt of every site."""
    where = (
        tasks.c.run_id == run_id,
        tasks.c.kind == "train",
        tasks.c.round == number,
        tasks.c.round_attempt == attempt,
    )
    return [TaskRow.of(r) for r in c.execute(select(tasks).where(*where).order_by(tasks.c.client, tasks.c.attempt))]


def evaluation_tasks(c: Connection, run_id: int, version: int) -> list[TaskRow]:
    """The evaluation tasks of a version."""
    # Naming round and attempt, which are 0, lets the unique index answer.
    where = (
        tasks.c.run_id == run_id,
        tasks.c.kind == "evaluate",
        tasks.c.round == 0,
        tasks.c.round_attempt == 0,
        tasks.c.version == version,
    )
    return [TaskRow.of(r) for r in c.execute(select(tasks).where(*where).order_by(tasks.c.client, tasks.c.attempt))]


def calibration_tasks(c: Connection, run_id: int) -> list[TaskRow]:
    """The tasks by which sites measure a run's settings, every attempt of every site."""
    where = (tasks.c.run_id == run_id, tasks.c.kind == "calibrate")
    return [TaskRow.of(r) for r in c.execute(select(tasks).where(*where).order_by(tasks.c.client, tasks.c.attempt))]


def versions_in_use(c: Connection, run_id: int) -> set[int]:
    """Versions that an open task of the run refers to."""
    where = (tasks.c.run_id == run_id, tasks.c.state.in_(OPEN_STATES))
    return set(c.execute(select(tasks.c.version).where(*where).distinct()).scalars())


def versions_in_evaluation(c: Connection, run_id: int) -> list[int]:
    """Versions of the run whose evaluation was begun and is not over, in order."""
    same = (versions.c.run_id == tasks.c.run_id) & (versions.c.number == tasks.c.version)
    where = (tasks.c.run_id == run_id, tasks.c.kind == "evaluate", ~versions.c.evaluated)
    query = select(tasks.c.version).join(versions, same).where(*where).distinct().order_by(tasks.c.version)
    return list(c.execute(query).scalars())


def insert_upload(c: Connection, **values: Any) -> None:
    """Add an upload."""
    c.execute(insert(uploads).values(**values))


def upload(c: Connection, upload_id: bytes) -> UploadRow | None:
    """One upload."""
    row = c.execute(select(uploads).where(uploads.c.id == upload_id)).first()
    return UploadRow.of(row) if row else None


def task_uploads(c: Connection, task_ids: Sequence[int]) -> list[UploadRow]:
    """The uploads made under these tasks."""
    return [UploadRow.of(r) for r in c.execute(select(uploads).where(uploads.c.task_id.in_(list(task_ids))))]


def uploaded_bytes(c: Connection, run_id: int) -> int:
    """Bytes of everything that is uploaded for a run and still here."""
    ours = select(func.coalesce(func.sum(uploads.c.size), 0)).join(tasks, tasks.c.id == uploads.c.task_id)
    return int(c.execute(ours.where(tasks.c.run_id == run_id)).scalar_one())


def import_uploads(c: Connection, import_id: bytes) -> list[UploadRow]:
    """The uploads of one import."""
    return [UploadRow.of(r) for r in c.execute(select(uploads).where(uploads.c.import_id == import_id))]


def client_uploads(c: Connection, client: str, digests: Iterable[bytes]) -> list[UploadRow]:
    """The uploads of these blobs that a site made, under any task."""
    where = (uploads.c.client == client, uploads.c.digest.in_(list(digests)), uploads.c.task_id.is_not(None))
    return [UploadRow.of(r) for r in c.execute(select(uploads).where(*where))]


def all_uploads(c: Connection) -> list[UploadRow]:
    """Every upload."""
    return [UploadRow.of(r) for r in c.execute(select(uploads))]


def delete_uploads(c: Connection, upload_ids: Iterable[bytes]) -> None:
    """Forget uploads."""
    c.execute(delete(uploads).where(uploads.c.id.in_(list(upload_ids))))
