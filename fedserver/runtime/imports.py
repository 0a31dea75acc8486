"""Imports that nobody finishes: a day after their last byte came, what they take on the disk is given back."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable

from fedlink import log as logs
from fedlink.errors import FedlinkError
from fedserver.runtime.versions import Versions
from fedserver.store.database import Database
from fedserver.store.disk import is_disk
from fedserver.store.queries import tasks as q
from fedserver.store.rows import UploadRow
from fedserver.store.spool import Spool

KEPT_SECONDS = 24 * 3600.0
"""So long after the last of its bytes an unfinished import stays."""
LOOK_SECONDS = 3600.0
"""Seconds between two looks."""


def abandoned(uploads: Iterable[UploadRow], spool: Spool) -> set[bytes]:
    """Ids of those uploads that belong to imports nobody goes on with. Blocking."""
    imports: defaultdict[bytes, list[UploadRow]] = defaultdict(list)
    for upload in uploads:
        if upload.import_id is not None:
            imports[upload.import_id].append(upload)
    limit = time.time() - KEPT_SECONDS
    return {u.id for of_one in imports.values() for u in of_one if max(_moved(u, spool) for u in of_one) < limit}


async def expire_imports(database: Database, versions: Versions, spool: Spool) -> None:
    """Look for abandoned imports every hour, for ever, and delete what was uploaded for them."""
    log = logs.get("imports")
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        try:
            gone = await _expire(database, versions, spool)
        except Exception as e:
            # Whatever it was, the next look tries again; what the disk refuses has been logged.
            if not is_disk(e):
                log.exception("unfinished imports not deleted")
        else:
            if gone:
                log.info("deleted unfinished imports", files=len(gone), size=sum(u.size for u in gone))


async def _expire(database: Database, versions: Versions, spool: Spool) -> list[UploadRow]:
    # An import that is turned into a model at this moment is not looked at before it is one.
    async with versions.blobs_lock:
        uploads = await database.run(q.all_uploads)
        old = await asyncio.to_thread(abandoned, uploads, spool)
        if old:
            await database.run(lambda c: q.delete_uploads(c, old))
    gone = [u for u in uploads if u.id in old]
    await versions.forget_uploads(gone)
    return gone


def _moved(upload: UploadRow, spool: Spool) -> float:
    """When its last byte came, or when it was begun."""
    try:
        return max(upload.created, spool.moved(upload.id))
    except FedlinkError:
        return upload.created
