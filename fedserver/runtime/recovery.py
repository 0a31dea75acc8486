"""What the server does before it serves: sweep what a crash left, re-check what a power loss may have taken.

A process that dies loses nothing it acknowledged: bytes are in the page cache, rows in the
write-ahead log. Only a machine that went down without syncing can have lost spooled bytes;
the boot id in `meta` tells the two apart.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from sqlalchemy import Connection

from fedlink import log as logs
from fedlink.files import boot_id
from fedserver.rounds.model import Phase, TaskState
from fedserver.runtime import records
from fedserver.runtime.imports import abandoned
from fedserver.runtime.versions import is_as_sent
from fedserver.runtime.wanted import Unwanted, while_wanted
from fedserver.store.blobs import BlobStore
from fedserver.store.database import Database
from fedserver.store.queries import models as model_queries
from fedserver.store.queries import runs as run_queries
from fedserver.store.queries import tasks as q
from fedserver.store.rows import UploadRow
from fedserver.store.spool import Spool


async def recover(database: Database, store: BlobStore, spool: Spool, scratch: Path) -> None:
    """Bring the bytes into line with the database; call before the engine starts.

    A task whose accepted update was lost is open again afterwards, with reason UPDATE_LOST.
    """
    log = logs.get("recovery")
    boot = await asyncio.to_thread(boot_id)
    previous = await database.run(lambda c: model_queries.get_meta(c, "boot_id"))
    uploads = await database.run(lambda c: _expire_uploads(c, spool))
    known = {u.id for u in uploads}
    needed = await database.run(model_queries.needed)

    def sweep(unwanted: Unwanted) -> tuple[int, list[UploadRow]]:
        scratch.mkdir(parents=True, exist_ok=True)
        for left in scratch.iterdir():
            shutil.rmtree(left, ignore_errors=True)
        stray = [i for i in spool.ids() if i not in known]
        for upload_id in stray:
            spool.delete(upload_id)
        garbage = [d for d in store.digests() if d not in needed]
        for digest in garbage:
            store.delete(digest)
        torn = (
            [] if previous in (None, boot) and boot else [u for u in uploads if not is_as_sent(spool, u.id, unwanted)]
        )
        return len(stray) + len(garbage), torn

    swept, torn = await while_wanted(sweep)
    reopened = await database.run(lambda c: _reopen(c, torn))
    if boot != previous:  # nothing is written that need not be: the disk may be full
        await database.run(lambda c: model_queries.set_meta(c, "boot_id", boot))
    if swept or reopened:
        log.warning("recovered", swept=swept, uploads_torn=len(torn), tasks_asked_again=reopened)


def _expire_uploads(c: Connection, spool: Spool) -> list[UploadRow]:
    """Forget imports that nobody goes on with, and updates of rounds that ended just before the server did."""
    uploads = q.all_uploads(c)
    old = abandoned(uploads, spool)
    done = {task_id: _is_done_with(c, task_id) for task_id in {u.task_id for u in uploads if u.task_id is not None}}
    old |= {u.id for u in uploads if u.task_id is not None and done[u.task_id]}
    q.delete_uploads(c, old)
    return [u for u in uploads if u.id not in old]


def _is_done_with(c: Connection, task_id: int) -> bool:
    task = q.task_by_id(c, task_id)
    found = run_queries.round_attempt(c, task.run_id, task.round, task.round_attempt)
    if found is None or found.phase not in (Phase.COMMITTED, Phase.FAILED):
        return False
    kept = run_queries.run_by_id(c, task.run_id).parsed.retention.keep_updates
    return found.phase == Phase.FAILED or not kept


def _reopen(c: Connection, torn: list[UploadRow]) -> int:
    """Open accepted tasks again whose bytes are gone, and their rounds with them.

    Returns:
        How many.
    """
    reopened = 0
    for task_id in {u.task_id for u in torn if u.task_id is not None}:
        task = q.task_by_id(c, task_id)
        found = run_queries.round_attempt(c, task.run_id, task.round, task.round_attempt)
        if task.state != TaskState.ACCEPTED or found is None or found.phase not in (Phase.COLLECT, Phase.AGGREGATE):
            continue
        run_queries.save_round(c, task.run_id, task.round, task.round_attempt, phase=Phase.COLLECT)
        records.reopen_task(c, task)
        reopened += 1
    return reopened
