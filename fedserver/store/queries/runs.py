"""Runs, their rounds, versions and events."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from fedserver.store.rows import EventRow, RoundRow, RunRow, VersionRow
from fedserver.store.tables import events, rounds, runs, versions

LIVE_STATES = ("active", "paused", "finishing")
"""States of runs that have not ended."""


def insert_run(c: Connection, **values: Any) -> RunRow:
    """Add a run."""
    done = c.execute(insert(runs).values(**values))
    assert done.inserted_primary_key is not None
    return run_by_id(c, done.inserted_primary_key[0])


def run_by_id(c: Connection, run_id: int) -> RunRow:
    """A run that exists."""
    return RunRow.of(c.execute(select(runs).where(runs.c.id == run_id)).one())


def run_by_name(c: Connection, name: str) -> RunRow | None:
    """A run, if there is one of that name."""
    row = c.execute(select(runs).where(runs.c.name == name)).first()
    return RunRow.of(row) if row else None


def run_by_request(c: Connection, request_id: bytes) -> RunRow | None:
    """The run that this request made."""
    row = c.execute(select(runs).where(runs.c.request_id == request_id)).first()
    return RunRow.of(row) if row else None


def list_runs(c: Connection, *, after: int = 0, limit: int = 1 << 30, states: Iterable[str] = ()) -> list[RunRow]:
    """Runs with an id above `after`, in order of creation."""
    query = select(runs).where(runs.c.id > after).order_by(runs.c.id).limit(limit)
    if states:
        query = query.where(runs.c.state.in_(list(states)))
    return [RunRow.of(r) for r in c.execute(query)]


def save_run(c: Connection, run_id: int, **values: Any) -> None:
    """Write some columns of a run."""
    c.execute(update(runs).where(runs.c.id == run_id).values(**values))


def insert_round(
    c: Connection, run_id: int, number: int, attempt: int, *, phase: str, now: float, deadline_at: float | None = None
) -> None:
    """Add an attempt at a round."""
    values = {"phase": phase, "opened": now, "deadline_at": deadline_at}
    c.execute(insert(rounds).values(run_id=run_id, number=number, attempt=attempt, **values))


def save_round(c: Connection, run_id: int, number: int, attempt: int, **values: Any) -> None:
    """Write some columns of a round."""
    where = (rounds.c.run_id == run_id, rounds.c.number == number, rounds.c.attempt == attempt)
    c.execute(update(rounds).where(*where).values(**values))


def newest_round(c: Connection, run_id: int, number: int | None = None) -> RoundRow | None:
    """The newest attempt at a round; by default at the newest round."""
    query = select(rounds).where(rounds.c.run_id == run_id)
    if number is not None:
        query = query.where(rounds.c.number == number)
    row = c.execute(query.order_by(rounds.c.number.desc(), rounds.c.attempt.desc()).limit(1)).first()
    return RoundRow.of(row) if row else None


def round_attempt(c: Connection, run_id: int, number: int, attempt: int) -> RoundRow | None:
    """One attempt at a round."""
    where = (rounds.c.run_id == run_id, rounds.c.number == number, rounds.c.attempt == attempt)
    row = c.execute(select(rounds).where(*where)).first()
    return RoundRow.of(row) if row else None


def list_rounds(c: Connection, run_id: int, *, after: int = 0, limit: int = 1 << 30) -> list[RoundRow]:
    """The newest attempt at each round with a number above `after`."""
    newest = (
        select(rounds.c.number, func.max(rounds.c.attempt).label("attempt"))
        .where(rounds.c.run_id == run_id, rounds.c.number > after)
        .group_by(rounds.c.number)
        .order_by(rounds.c.number)
        .limit(limit)
        .subquery()
    )
    query = (
        select(rounds)
        .join(newest, (rounds.c.number == newest.c.number) & (rounds.c.attempt == newest.c.attempt))
        .where(rounds.c.run_id == run_id)
        .order_by(rounds.c.number)
    )
    return [RoundRow.of(r) for r in c.execute(query)]


def ended_with_too_many(c: Connection) -> list[RunRow]:
    """Runs that have ended and may have versions which their retention does not keep."""
    kept = select(versions.c.run_id, func.count().label("n")).where(versions.c.kept).group_by(versions.c.run_id)
    counts = kept.subquery()
    query = select(runs, counts.c.n).join(counts, counts.c.run_id == runs.c.id)
    found = c.execute(query.where(runs.c.state.not_in(LIVE_STATES), counts.c.n > 1))
    return [run for run, n in ((RunRow.of(r), r.n) for r in found) if n > run.parsed.retention.keep_versions]


def insert_version(c: Connection, **values: Any) -> None:
    """Add a version."""
    c.execute(insert(versions).values(**values))


def version(c: Connection, run_id: int, number: int) -> VersionRow | None:
    """One version, whether its files are still here or not."""
    row = c.execute(select(versions).where(versions.c.run_id == run_id, versions.c.number == number)).first()
    return VersionRow.of(row) if row else None


def list_versions(c: Connection, run_id: int) -> list[VersionRow]:
    """Those of a run's versions whose files are still here, in order."""
    query = select(versions).where(versions.c.run_id == run_id, versions.c.kept).order_by(versions.c.number)
    return [VersionRow.of(r) for r in c.execute(query)]


def save_version(c: Connection, run_id: int, number: int, **values: Any) -> None:
    """Write some columns of a version."""
    c.execute(update(versions).where(versions.c.run_id == run_id, versions.c.number == number).values(**values))


def add_event(c: Connection, run_id: int, kind: str, data: Mapping[str, Any], now: float) -> None:
    """Record that something happened, in the transaction that makes it so."""
    c.execute(insert(events).values(run_id=run_id, time=now, kind=kind, data=json.dumps(data)))


def failures_in_a_row(c: Connection, run_id: int) -> int:
    """How many attempts have failed since the last version, or since an operator had an ended run go on."""
    ours = events.c.run_id == run_id
    fresh = select(func.max(events.c.sequence)).where(ours, events.c.kind.in_(("round_committed", "run_extended")))
    failed = (ours, events.c.kind == "round_failed", events.c.sequence > func.coalesce(fresh.scalar_subquery(), 0))
    return int(c.execute(select(func.count()).select_from(events).where(*failed)).scalar_one())


def events_after(c: Connection, run_id: int, sequence: int, limit: int = 500) -> list[EventRow]:
    """A run's events with a higher sequence."""
    query = select(events).where(events.c.run_id == run_id, events.c.sequence > sequence)
    return [EventRow.of(r) for r in c.execute(query.order_by(events.c.sequence).limit(limit))]
