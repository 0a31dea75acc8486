"""Sites and their credentials."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, insert, select, update

from fedserver.store.rows import ClientRow
from fedserver.store.tables import clients


def all_clients(c: Connection) -> list[ClientRow]:
    """Every site known, in order of creation."""
    return [ClientRow.of(r) for r in c.execute(select(clients).order_by(clients.c.created, clients.c.name))]


def client(c: Connection, name: str) -> ClientRow | None:
    """One site."""
    row = c.execute(select(clients).where(clients.c.name == name)).first()
    return ClientRow.of(row) if row else None


def save_client(c: Connection, name: str, now: float, **values: Any) -> None:
    """Write some columns of a site, which is created if it is new."""
    changed = c.execute(update(clients).where(clients.c.name == name).values(**values)).rowcount if values else 0
    if not changed and client(c, name) is None:
        c.execute(insert(clients).values(name=name, created=now, **values))
