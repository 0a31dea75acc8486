"""How fast each site trains each workload."""

from __future__ import annotations

import json

from sqlalchemy import Connection, insert, select, update

from fedserver.store.rows import SpeedRow
from fedserver.store.tables import speeds

KEPT = 5
"""Trainings of a site and workload that are remembered."""


def list_speeds(c: Connection, workload: str | None = None, client: str | None = None) -> list[SpeedRow]:
    """What was measured, of all or of one workload or site, in order of the sites' names."""
    query = select(speeds).order_by(speeds.c.client, speeds.c.workload)
    if workload is not None:
        query = query.where(speeds.c.workload == workload)
    if client is not None:
        query = query.where(speeds.c.client == client)
    return [SpeedRow.of(r) for r in c.execute(query)]


def add_training(c: Connection, client: str, workload: str, sample: tuple[int, float, float]) -> None:
    """Remember a training (the run's id, steps a second, examples a second), and forget the oldest."""
    before = [sample for row in list_speeds(c, workload, client) for sample in row.values]
    samples = json.dumps([*before, sample][-KEPT:])
    if before:
        where = (speeds.c.client == client, speeds.c.workload == workload)
        c.execute(update(speeds).where(*where).values(samples=samples))
    else:
        c.execute(insert(speeds).values(client=client, workload=workload, samples=samples))
