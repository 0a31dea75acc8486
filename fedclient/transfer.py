"""Models in, updates out: what a task needs and gives, as files and as blobs.

The bytes move through `fedlink.bulk`; here is which blobs they are, where a model's lie on
disk, and what the trainer finds beside them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection
from pathlib import Path

from fedclient.session import Session
from fedclient.spool import BlobCache, Order, fresh_directory
from fedclient.trainer.layout import write_layout
from fedclient.trainer.wire import MODEL_FILE
from fedclient.update import Encoded, LocalBlob
from fedlink import bulk, log
from fedlink.blobs import MAX_MANIFEST_SIZE, BlobRef
from fedlink.errors import FedlinkError, Reason
from fedlink.manifest import Manifest
from fedlink.tensors import Kind, TensorError, read_header
from fedlink.transfer import TaskPurpose

OnBytes = Callable[[int, int], None]
"""Told the bytes moved so far and how many there are in all."""


class Transfer:
    """Fetches the models of tasks through a cache, and sends their updates.

    Args:
        session: whose bulk channel and metadata are used.
        cache: used by this object only.
    """

    def __init__(self, session: Session, cache: BlobCache) -> None:
        self._session = session
        self._cache = cache
        self._lock = asyncio.Lock()
        self._checked: set[bytes] = set()
        self._newest: dict[str, frozenset[bytes]] = {}

    async def begin(self, order: Order, model_dir: Path) -> Manifest:
        """Fetch the manifest of a task's model, and lay out its directory for the trainer: `MODEL_FILE`, no shard yet.

        Raises:
            FedlinkError: the task or the session is over; BAD_MANIFEST, BLOB_NOT_FOUND, BLOB_CORRUPT.
            OSError: the disk is full.
        """
        if order.model.size > MAX_MANIFEST_SIZE:
            raise FedlinkError(Reason.BAD_MANIFEST, f"the model's manifest is {order.model.size} bytes long")
        async with self._lock:
            self._cache.pin(order.token, [order.model.digest])
            if not await asyncio.to_thread(self._is_here, order.model):
                await self._make_room(order.model.size)
                await self._download(order.token, order.model, lambda _done, _total: None)
            data = await asyncio.to_thread(self._cache.path(order.model.digest).read_bytes)
            manifest = Manifest.parse(data)
            if manifest.kind is not Kind.MODEL:
                raise FedlinkError(Reason.BAD_MANIFEST, f"the task names a manifest of a {manifest.kind}, not a model")
            needed = frozenset((order.model.digest, *(f.blob.digest for f in manifest.files)))
            self._cache.pin(order.token, needed)
            await self._drop_older(order.run, needed)
        await asyncio.to_thread(_lay_out, manifest, model_dir)
        return manifest

    async def fetch(
        self, order: Order, manifest: Manifest, model_dir: Path, on_bytes: OnBytes, on_file: Callable[[str], None]
    ) -> None:
        """Bring the shards of a model that was begun into its directory, as hard links into the cache.

        Args:
            order: the task.
            manifest: the model's, from `begin`.
            model_dir: likewise.
            on_bytes: told how far it is.
            on_file: told the name of each file once it is whole: first those that were here.

        Raises:
            FedlinkError: the task or the session is over; BAD_MANIFEST, BLOB_NOT_FOUND, BLOB_CORRUPT.
            OSError: the disk is full.
        """
        files: dict[BlobRef, list[int]] = {}
        for index, file in enumerate(manifest.files):
            files.setdefault(file.blob, []).append(index)

        async def place(ref: BlobRef) -> None:
            for index in files[ref]:
                await asyncio.to_thread(self._link, manifest, index, model_dir)
                on_file(manifest.files[index].name)

        # One at a time: two tasks of a site mostly want the same version.
        async with self._lock:
            missing = []
            for ref in files:
                if await asyncio.to_thread(self._is_here, ref):
                    await place(ref)
                else:
                    missing.append(ref)
            total, left = sum(ref.size for ref in files), sum(ref.size for ref in missing)
            await self._make_room(left)
            for ref in missing:
                await self._download(order.token, ref, _shifted(on_bytes, total - left, total))
                left -= ref.size
                await place(ref)

    async def _drop_older(self, run: str, needed: frozenset[bytes]) -> None:
        """Of a run's versions only the newest is of use; what it shares with the one before (a frozen base) stays."""
        older = self._newest.get(run, frozenset()) - needed
        useless = older - self._cache.pinned()
        self._newest[run] = needed | (older - useless)
        self._checked -= useless
        await asyncio.to_thread(self._cache.drop, useless)

    async def let_go(self, token: bytes) -> None:
        """A task needs its model no more: it may leave the cache."""
        self._cache.unpin(token)
        if not self._lock.locked():  # else the fetch under way trims
            async with self._lock:
                try:
                    await asyncio.to_thread(self._cache.trim, self._cache.pinned())
                except OSError as e:
                    # No task is the worse for it, and the next fetch trims again.
                    log.get("cache").warning("the cache could not be brought under its limit", error=e.strerror)

    async def send(self, token: bytes, update: Encoded, on_bytes: OnBytes, but: Collection[LocalBlob] = ()) -> None:
        """Send an update under a task; what the server has already moves no byte.

        Every blob is announced for this very task, also one that an earlier task sent: a task completes only with
        what was uploaded under it.

        Args:
            token: the task's.
            update: what to send.
            on_bytes: told how far it is.
            but: what `send_shard` has sent under this task.

        Raises:
            FedlinkError: the task or the session is over; TOO_LARGE, BLOB_CORRUPT.
            OSError: the update cannot be read.
        """
        total = sum(b.ref.size for b in update.blobs)
        sent = 0
        for blob in update.blobs:
            if blob not in but:
                await self._upload(blob, TaskPurpose(token), _shifted(on_bytes, sent, total))
            sent += blob.ref.size

    async def send_shard(self, token: bytes, shard: LocalBlob, on_bytes: OnBytes) -> None:
        """Send one shard of an update that is not whole yet, under its task; raises as `send`."""
        await self._upload(shard, TaskPurpose(token), on_bytes)

    async def _upload(self, blob: LocalBlob, purpose: TaskPurpose, on_bytes: OnBytes) -> None:
        session = self._session
        await session.renewing(
            lambda: bulk.upload_file(
                session.bulk,
                blob.path,
                blob.ref,
                blob.chunk_digests,
                purpose,
                metadata=session.metadata,
                on_progress=on_bytes,
                stall=session.patience.stall,
            )
        )

    async def _make_room(self, incoming: int) -> None:
        await asyncio.to_thread(self._cache.trim, self._cache.pinned(), incoming)

    async def _download(self, token: bytes, ref: BlobRef, on_bytes: OnBytes) -> None:
        session = self._session
        await session.renewing(
            lambda: bulk.download_blob(
                session.bulk,
                ref,
                self._cache.path(ref.digest),
                task_token=token,
                metadata=session.metadata,
                on_progress=on_bytes,
                stall=session.patience.stall,
                recycler=self._cache.recycler,
            )
        )
        self._checked.add(ref.digest)

    def _is_here(self, ref: BlobRef) -> bool:
        # A file of an earlier life may be torn by a power loss: it is hashed once before it is believed.
        if not self._cache.touch(ref.digest):
            return False
        path = self._cache.path(ref.digest)
        if ref.digest in self._checked or bulk.hash_file(path)[0] == ref:
            self._checked.add(ref.digest)
            return True
        path.unlink()
        return False

    def _link(self, manifest: Manifest, index: int, model_dir: Path) -> None:
        file = manifest.files[index]
        path = model_dir / file.name
        os.link(self._cache.path(file.blob.digest), path)
        try:
            header = read_header(path)
        except TensorError as e:
            raise FedlinkError(Reason.BAD_MANIFEST, str(e), metadata={"tensor": e.tensor}) from None
        manifest.check_header(index, header)


def _lay_out(manifest: Manifest, model_dir: Path) -> None:
    if any(file.name == MODEL_FILE for file in manifest.files):
        raise FedlinkError(Reason.BAD_MANIFEST, f"a file of the model is called {MODEL_FILE}")
    fresh_directory(model_dir)
    files = [(file.name, [t.stored for t in manifest.in_file(i)]) for i, file in enumerate(manifest.files)]
    write_layout(model_dir, files, manifest.aliases, manifest.base)


def drop_model_files(model_dir: Path) -> None:
    """Free the shards of a model that has been trained; what `encode` needs stays. Blocking."""
    for path in model_dir.iterdir():
        if path.name != MODEL_FILE:
            path.unlink()


def _shifted(on_bytes: OnBytes, before: int, total: int) -> OnBytes:
    def told(done: int, _size: int) -> None:
        on_bytes(before + done, total)

    return told
