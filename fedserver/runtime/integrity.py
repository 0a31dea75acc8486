"""Stored blobs whose bytes are not what their names say any more: whose they are, and a look at all of them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from dataclasses import dataclass

from sqlalchemy import Connection

from fedlink import log as logs
from fedlink.blobs import BlobRef
from fedlink.errors import FedlinkError, Reason
from fedserver.runtime.versions import Versions
from fedserver.runtime.wanted import Unwanted, while_wanted
from fedserver.store.blobs import BlobStore
from fedserver.store.database import Database
from fedserver.store.queries import models as model_queries
from fedserver.store.queries import runs as run_queries


@dataclass(frozen=True, slots=True)
class Finding:
    """One file of a model or version, and what is wrong with it."""

    model: str
    """As `model list` calls it."""
    file: str
    """Its name in the manifest; "manifest" for that itself, and "master/..." for the float32 master's."""
    ref: BlobRef
    damage: str = ""
    """A sentence; empty if nothing is wrong."""


class Integrity:
    """Names damaged blobs.

    Args:
        database: who needs which blob.
        versions: the models and versions.
        store: the blobs.
    """

    def __init__(self, database: Database, versions: Versions, store: BlobStore) -> None:
        self._db = database
        self._versions = versions
        self._store = store
        self._said: set[bytes] = set()
        self._log = logs.get("blobs")

    async def note(self, digest: bytes, error: FedlinkError) -> list[str]:
        """Log that a blob is damaged, once; the models and versions that it is part of."""
        users = await self._db.run(lambda c: [_name_of(c, owner) for owner in model_queries.owners_of(c, digest)])
        if digest not in self._said:
            self._said.add(digest)
            self._log.error("a stored blob is damaged", blob=digest.hex(), error=error.message, part_of=sorted(users))
        return sorted(users)

    async def verify(self, name: str) -> AsyncIterator[Finding]:
        """Hash every file of a model or version again, or of all of them; each blob once.

        Args:
            name: as for `Versions.find`; empty for all.

        Raises:
            FedlinkError: MODEL_NOT_FOUND.
        """
        known: dict[bytes, str] = {}
        for model in [name] if name else await self._db.run(_all_names):
            try:
                async for finding in self._verify(model, known):
                    yield finding
            except FedlinkError as e:
                # Retired since the names were read.
                if name or e.reason is not Reason.MODEL_NOT_FOUND:
                    raise

    async def _verify(self, name: str, known: dict[bytes, str]) -> AsyncIterator[Finding]:
        full_name, _, row = await self._versions.find(name)
        digests = {"": row.digest, "master/": getattr(row, "master_digest", None)}
        for prefix, digest in digests.items():
            if digest is None:
                continue
            damage = await self._damage(full_name, digest, known)
            yield Finding(
                full_name, f"{prefix}manifest", BlobRef(digest, row.manifest_size if not prefix else 0), damage
            )
            if damage:
                continue
            manifest = await asyncio.to_thread(self._versions.read_manifest, digest)
            for file in manifest.everything:
                damage = await self._damage(full_name, file.blob.digest, known)
                yield Finding(full_name, f"{prefix}{file.name}", file.blob, damage)

    async def _damage(self, name: str, digest: bytes, known: dict[bytes, str]) -> str:
        if digest not in known:
            damage = await while_wanted(functools.partial(self._look, digest))
            if damage:
                # It may have been retired meanwhile; then nothing is wrong with it, and nothing known of the blob.
                await self._versions.find(name)
                await self.note(digest, FedlinkError(Reason.BLOB_CORRUPT, damage))
            known[digest] = damage
        return known[digest]

    def _look(self, digest: bytes, unwanted: Unwanted) -> str:
        """Hash a blob again; what is wrong with it. Blocking."""
        blob = f"Blob {digest.hex()[:12]}"
        try:
            self._store.verify(digest, unwanted)
        except OSError as e:
            why = e.strerror or type(e).__name__
            return f"{blob} cannot be read from the server's disk ({why}); look after the disk, then restore it."
        except FedlinkError as e:
            if e.reason is Reason.BLOB_NOT_FOUND:
                return f"{blob} is not on the server's disk; restore it from a backup."
            if e.reason is not Reason.BLOB_CORRUPT:
                raise
            return e.message
        return ""


def _all_names(c: Connection) -> list[str]:
    names = [m.name for m in model_queries.list_models(c)]
    for run in run_queries.list_runs(c):
        names += [f"{run.name}@{v.number}" for v in run_queries.list_versions(c, run.id)]
    return names


def _name_of(c: Connection, owner: str) -> str:
    """What operators call the owner of a blob."""
    kind, _, rest = owner.partition(":")
    if kind != "version":
        return rest
    run_id, _, number = rest.partition(":")
    return f"{run_queries.run_by_id(c, int(run_id)).name}@{number}"
