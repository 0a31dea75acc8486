"""Who may read and send which bytes: the rules of `access.BlobAccess`, from tasks and imports."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from sqlalchemy import Connection

from fedlink.blobs import MAX_BLOB_SIZE, MAX_MANIFEST_SIZE, BlobRef
from fedlink.errors import FedlinkError, Reason
from fedlink.failpoints import reach
from fedlink.manifest import Manifest
from fedlink.transfer import ImportPurpose, Purpose
from fedserver.rounds.model import TaskState
from fedserver.runtime.access import Caller
from fedserver.runtime.board import OpenTask, TaskBoard
from fedserver.runtime.footprint import max_update_bytes, next_version_bytes
from fedserver.runtime.integrity import Integrity
from fedserver.runtime.versions import Versions, is_whole, versions_among
from fedserver.runtime.whole import whole
from fedserver.store.blobs import BlobStore
from fedserver.store.database import Database
from fedserver.store.queries import models as model_queries
from fedserver.store.queries import runs as run_queries
from fedserver.store.queries import tasks as q
from fedserver.store.rows import UploadRow
from fedserver.store.spool import Spool

_MAX_TASK_UPLOADS = 20_000
_DISPLACED = 4
"""So many times the allowed bytes a task may send and replace: further updates of a site that was killed in between."""
_Sent = tuple[list[UploadRow], set[bytes]]
"""Uploads that a caller has made of some blobs, and those of the blobs that it may read whoever sent them."""
_CACHED_TENSORS = 200_000
_KNOWN = 256
_DRAIN_PAUSE = 2.0


class TaskBlobAccess:
    """`BlobAccess` over the board, the database, the store and the spool."""

    def __init__(
        self,
        database: Database,
        board: TaskBoard,
        versions: Versions,
        store: BlobStore,
        spool: Spool,
        *,
        integrity: Integrity,
    ) -> None:
        self._db = database
        self._board = board
        self._versions = versions
        self._store = store
        self._spool = spool
        self._integrity = integrity
        self._manifests: dict[bytes, Manifest] = {}
        self._models: dict[tuple[int, int], BlobRef] = {}
        self._limits: dict[tuple[bytes, str], int] = {}
        self._starting = asyncio.Lock()
        # Of an upload nothing is to be remembered once its task is over: the board has let it go then.
        self._tasks: WeakValueDictionary[bytes, OpenTask] = WeakValueDictionary()

    async def model_manifest(self, digest: bytes) -> Manifest:
        """The manifest of a published model; the last few are kept parsed."""
        known = self._manifests.get(digest)
        if known is not None:
            return known
        parsed = await asyncio.to_thread(self._versions.read_manifest, digest)
        self._manifests[digest] = parsed
        while len(self._manifests) > 1 and sum(len(m.tensors) for m in self._manifests.values()) > _CACHED_TENSORS:
            del self._manifests[next(iter(self._manifests))]
        return parsed

    async def task_model(self, task: OpenTask) -> BlobRef:
        """The manifest of the version a task names.

        Raises:
            FedlinkError: ROUND_CLOSED if the version is gone.
        """
        key = task.row.run_id, task.row.version
        # A version that an open task names is not retired.
        if key in self._models and self._board.get(task.token) is task:
            return self._models[key]
        row = await self._db.run(lambda c: run_queries.version(c, *key))
        if row is None or not row.kept:
            raise FedlinkError(Reason.ROUND_CLOSED, f"version {task.row.version} of run {task.run.name!r} is not kept")
        self._models[key] = row.manifest
        while len(self._models) > _KNOWN:
            del self._models[next(iter(self._models))]
        return row.manifest

    async def update_limit(self, task: OpenTask) -> int:
        """The most bytes that the files of a task's update may have.

        Raises:
            FedlinkError: ROUND_CLOSED if the version is gone.
        """
        digest, spec = (await self.task_model(task)).digest, task.run.parsed
        key = digest, spec.update_dtype
        if key not in self._limits:
            self._limits[key] = max_update_bytes(await self.model_manifest(digest), spec)
            while len(self._limits) > _KNOWN:
                del self._limits[next(iter(self._limits))]
        return self._limits[key]

    async def readable(self, caller: Caller, task_token: bytes, digest: bytes) -> BlobRef:
        """See `BlobAccess`."""
        if caller.operator:
            return await self._published(digest)
        task = await self._board.open_task(caller.name, task_token)
        manifest = await self.task_model(task)
        if digest == manifest.digest:
            return manifest
        for file in (await self.model_manifest(manifest.digest)).files:
            if file.blob.digest == digest:
                return file.blob
        raise _not_found()

    async def _published(self, digest: bytes) -> BlobRef:
        owners = await self._db.run(lambda c: model_queries.owners_of(c, digest))
        if not owners:
            raise _not_found()
        self._versions.note_read(versions_among(owners))

        def size() -> int:
            with self._store.open(digest) as blob:
                return blob.size

        return BlobRef(digest, await asyncio.to_thread(size))

    async def missing(self, caller: Caller, purpose: Purpose, digests: Sequence[bytes]) -> list[bytes]:
        """See `BlobAccess`."""
        task = await self._task(caller, purpose)
        wanted = set(digests)
        sent = await self._db.run(lambda c: _sent(c, caller, purpose, task, wanted))
        here = await self._here(task, sent, wanted)
        return [d for d in digests if d not in here]

    @whole
    async def start_upload(self, caller: Caller, purpose: Purpose, ref: BlobRef, chunk_digests: bytes) -> bytes:
        """See `BlobAccess`."""
        task = await self._task(caller, purpose)
        if self._board.draining and not (task and task.sending):
            raise FedlinkError(
                Reason.DRAINING, "the server is stopping; send it when the server is back", retry_after=_DRAIN_PAUSE
            )
        if ref.size > MAX_BLOB_SIZE:
            raise FedlinkError(Reason.TOO_LARGE, f"a blob of {ref.size} bytes is over the limit of {MAX_BLOB_SIZE}")
        # One at a time, so that two calls for the same bytes find one slot and the sum is right.
        async with self._starting:
            upload_id = await self._find_or_create(caller, purpose, task, ref, chunk_digests)
        if task is not None and self._board.get(task.token) is task:
            self._tasks[upload_id] = task
            task.sending = True
        return upload_id

    async def _find_or_create(
        self, caller: Caller, purpose: Purpose, task: OpenTask | None, ref: BlobRef, chunk_digests: bytes
    ) -> bytes:
        mine, sent, bases = await self._db.run(lambda c: _known(c, caller, purpose, task, ref.digest))
        leave = await self._kept_free(bases)
        for upload in mine:
            if upload.digest == ref.digest:
                # Creating it again does nothing, unless a power loss took the slot.
                await asyncio.to_thread(self._spool.create, upload.id, ref, chunk_digests, leave=leave)
                return upload.id
        if task is not None:
            await self._make_room(task, mine, ref)
        source = (await self._here(task, sent, {ref.digest})).get(ref.digest)
        upload_id = secrets.token_bytes(16)
        values: dict[str, Any] = {"task_id": task.row.id} if task else {"import_id": _import_id(purpose)}
        name = caller.name if task else ""

        def work(c: Connection) -> None:
            # The round may have closed, and its uploads been forgotten, while room was made.
            if task is not None and q.task_by_id(c, task.row.id).state not in q.OPEN_STATES:
                raise FedlinkError(Reason.ROUND_CLOSED, "the task of this upload is over; drop it")
            q.insert_upload(
                c, id=upload_id, client=name, digest=ref.digest, size=ref.size, created=time.time(), **values
            )

        await asyncio.to_thread(self._make_slot, upload_id, source, ref, chunk_digests, leave)
        reach("upload.slot")
        try:
            await self._db.run(work)
        except BaseException:
            await asyncio.to_thread(self._spool.delete, upload_id)
            raise
        reach("upload.started")
        return upload_id

    def _make_slot(self, upload_id: bytes, source: Path | None, ref: BlobRef, chunk_digests: bytes, leave: int) -> None:
        if source is not None:
            # What was here a moment ago may have gone with its round; then it has to be sent.
            with contextlib.suppress(FileNotFoundError):
                self._spool.link(upload_id, source, ref, chunk_digests, leave=leave)
                return
        self._spool.create(upload_id, ref, chunk_digests, leave=leave)

    async def owned(self, caller: Caller, upload_id: bytes) -> None:
        """See `BlobAccess`."""
        known = self._tasks.get(upload_id)
        if known and known.client == caller.name and not caller.operator and self._board.get(known.token) is known:
            return
        row = await self._db.run(lambda c: q.upload(c, upload_id)) if len(upload_id) == 16 else None
        mine = row is not None and (row.import_id is not None if caller.operator else row.client == caller.name)
        if row is None or not mine:
            raise FedlinkError(Reason.UPLOAD_NOT_FOUND, "there is no such upload; begin with StartUpload")
        if row.task_id is not None and not any(t.row.id == row.task_id for t in self._board.of_client(caller.name)):
            raise FedlinkError(Reason.ROUND_CLOSED, "the task of this upload is over; drop it")

    async def damaged(self, caller: Caller, digest: bytes, error: FedlinkError) -> FedlinkError:
        """See `BlobAccess`."""
        users = await self._integrity.note(digest, error)
        # Which other runs share a blob is not for sites to know.
        if not caller.operator or not users:
            return error
        return FedlinkError(error.reason, f"{error.message} It is part of {', '.join(users)}.", metadata=error.metadata)

    def count_read(self, task_token: bytes, nbytes: int) -> None:
        """See `BlobAccess`."""
        task = self._board.get(task_token)
        if task is not None:
            task.bytes_down += nbytes

    def count_written(self, upload_id: bytes, nbytes: int) -> None:
        """See `BlobAccess`."""
        task = self._tasks.get(upload_id)
        if task is not None:
            task.bytes_up += nbytes

    # --- Parts

    async def _kept_free(self, bases: Iterable[bytes]) -> int:
        """Bytes that uploads must leave: with less, the largest live run could not make its next version of them."""
        sizes = [0]
        for digest in bases:
            with contextlib.suppress(FedlinkError):  # damaged, which its own run will hear
                sizes.append(next_version_bytes(await self.model_manifest(digest)))
        return max(sizes)

    async def _task(self, caller: Caller, purpose: Purpose) -> OpenTask | None:
        if isinstance(purpose, ImportPurpose):
            if not caller.operator:
                raise FedlinkError(Reason.NOT_AN_OPERATOR, "only operators import models, on the operators' listener")
            if len(purpose.id) != 16:
                raise FedlinkError(Reason.BAD_NAME, "import_id must have 16 bytes")
            return None
        if caller.operator:
            raise FedlinkError(Reason.TASK_NOT_FOUND, "operators have no tasks")
        task = await self._board.open_task(caller.name, purpose.token)
        if task.row.kind != "train":
            raise FedlinkError(
                Reason.WRONG_RESULT, f"a task to {task.row.kind} has no update; its metrics go with CompleteTask"
            )
        return task

    async def _make_room(self, task: OpenTask, mine: Sequence[UploadRow], ref: BlobRef) -> None:
        """Return if a task may have one more upload; what it has too much of before goes, the oldest first.

        A site that lost its update while it sent it trains again, and may come to other bits.

        Raises:
            FedlinkError: TOO_LARGE, TASK_COMPLETED.
        """
        if task.state is TaskState.CHECKING:
            raise FedlinkError(Reason.TASK_COMPLETED, "this task's update is being checked; nothing is to be sent")
        limit = await self.update_limit(task) + MAX_MANIFEST_SIZE
        older = sorted(mine, key=lambda u: u.created)
        total = sum(u.size for u in mine) + ref.size
        useless = []
        while older and total > limit and task.claim is None:
            useless.append(older.pop(0))
            total -= useless[-1].size
        displaced = task.displaced + sum(u.size for u in useless)
        if total > limit or len(older) >= _MAX_TASK_UPLOADS or displaced > _DISPLACED * limit:
            raise FedlinkError(
                Reason.TOO_LARGE,
                f"client {task.client!r} would send {displaced + total} bytes for one task of run {task.run.name!r}; "
                f"the model allows {limit}. Check that the update has the model's shapes and the run's update_dtype",
            )
        if useless:
            task.displaced = displaced
            await self._db.run(lambda c: q.delete_uploads(c, [u.id for u in useless]))
            await self._versions.forget_uploads(useless)

    async def _here(self, task: OpenTask | None, sent: _Sent, digests: Collection[bytes]) -> dict[bytes, Path]:
        """Local files, by digest, with bytes that a caller has sent before or may read under the same purpose."""
        uploads, readable = sent
        if task is not None:
            manifest = await self.task_model(task)
            files = (await self.model_manifest(manifest.digest)).files
            readable = {manifest.digest, *(f.blob.digest for f in files)} & set(digests)

        def paths() -> dict[bytes, Path]:
            found = {u.digest: self._spool.path(u.id) for u in uploads if is_whole(self._spool, u.id)}
            return found | {d: self._store.local_path(d) for d in readable - found.keys() if self._store.contains(d)}

        return await asyncio.to_thread(paths) if uploads or readable else {}


def _sent(c: Connection, caller: Caller, purpose: Purpose, task: OpenTask | None, digests: Collection[bytes]) -> _Sent:
    if task is not None:
        return q.client_uploads(c, caller.name, digests), set()
    mine = [u for u in q.import_uploads(c, _import_id(purpose)) if u.digest in digests]
    return mine, model_queries.needed_of(c, digests)


def _known(
    c: Connection, caller: Caller, purpose: Purpose, task: OpenTask | None, digest: bytes
) -> tuple[list[UploadRow], _Sent, set[bytes]]:
    """What StartUpload asks the database: the uploads of this purpose, what is here of a blob, the live runs' bases."""
    mine = q.task_uploads(c, [task.row.id]) if task else q.import_uploads(c, _import_id(purpose))
    live = run_queries.list_runs(c, states=run_queries.LIVE_STATES)
    versions = [run_queries.version(c, r.id, r.version) for r in live]
    bases = {v.digest for v in versions if v is not None and v.kept}
    return mine, _sent(c, caller, purpose, task, {digest}), bases


def _import_id(purpose: Purpose) -> bytes:
    assert isinstance(purpose, ImportPurpose)
    return purpose.id


def _not_found() -> FedlinkError:
    return FedlinkError(Reason.BLOB_NOT_FOUND, "no such blob, or not one that this task refers to")
