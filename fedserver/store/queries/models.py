"""Imported models, and which blobs are referred to by whom."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from fedserver.store.rows import ModelRow
from fedserver.store.tables import blob_refs, meta, models

_IN_LIMIT = 10_000


def insert_model(c: Connection, **values: Any) -> None:
    """Add a model."""
    c.execute(insert(models).values(**values))


def model(c: Connection, name: str) -> ModelRow | None:
    """An imported model."""
    row = c.execute(select(models).where(models.c.name == name)).first()
    return ModelRow.of(row) if row else None


def list_models(c: Connection, *, after: int = 0, limit: int = 1 << 30) -> list[ModelRow]:
    """Imported models with an id above `after`."""
    query = select(models).where(models.c.id > after).order_by(models.c.id).limit(limit)
    return [ModelRow.of(r) for r in c.execute(query)]


def add_refs(c: Connection, owner: str, digests: Iterable[bytes]) -> None:
    """Say that `owner` needs these blobs."""
    rows = [{"owner": owner, "digest": d} for d in set(digests)]
    if rows:
        c.execute(insert(blob_refs), rows)


def copy_refs(c: Connection, owner: str, other: str) -> None:
    """Say that `other` needs what `owner` needs."""
    add_refs(c, other, c.execute(select(blob_refs.c.digest).where(blob_refs.c.owner == owner)).scalars())


def drop_refs(c: Connection, owner: str) -> set[bytes]:
    """Say that `owner` needs nothing any more.

    Returns:
        The digests that it needed.
    """
    mine = set(c.execute(select(blob_refs.c.digest).where(blob_refs.c.owner == owner)).scalars())
    c.execute(delete(blob_refs).where(blob_refs.c.owner == owner))
    return mine


def owners_of(c: Connection, digest: bytes) -> list[str]:
    """Who needs a blob."""
    return list(c.execute(select(blob_refs.c.owner).where(blob_refs.c.digest == digest)).scalars())


def needed_of(c: Connection, digests: Collection[bytes]) -> set[bytes]:
    """Those of these digests that somebody needs."""
    found: set[bytes] = set()
    wanted = list(digests)
    for at in range(0, len(wanted), _IN_LIMIT):
        part = wanted[at : at + _IN_LIMIT]
        found |= set(c.execute(select(blob_refs.c.digest).where(blob_refs.c.digest.in_(part))).scalars())
    return found


def needed(c: Connection) -> set[bytes]:
    """Every digest that somebody needs."""
    return set(c.execute(select(blob_refs.c.digest).distinct()).scalars())


def get_meta(c: Connection, key: str) -> str | None:
    """A single value."""
    return c.execute(select(meta.c.value).where(meta.c.key == key)).scalar()


def set_meta(c: Connection, key: str, value: str) -> None:
    """Write a single value."""
    c.execute(delete(meta).where(meta.c.key == key))
    c.execute(insert(meta).values(key=key, value=value))
