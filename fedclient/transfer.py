"""Models in, updates out: what a task needs and gives, as files and as blobs.

The bytes move through `fedlink.bulk`; here is which blobs they are, where they lie on
disk, and what the trainer finds beside them.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedclient.session import Session
from fedclient.spool import BlobCache, Order, fresh_directory
from fedclient.trainer.wire import MODEL_FILE, UPDATE_STEM
from fedlink import bulk, log
from fedlink.base import base_to_json
from fedlink.blobs import MAX_MANIFEST_SIZE, BlobRef
from fedlink.errors import FedlinkError, Reason
from fedlink.manifest import FileEntry, Manifest, manifest_of_files
from fedlink.tensors import Kind, Role, TensorError, read_header, shard_name, update_spec
from fedlink.transfer import TaskPurpose

OnBytes = Callable[[int, int], None]
"""Told the bytes moved so far and how many there are in all."""

_MANIFEST = "manifest"


@dataclass(frozen=True, slots=True)
class LocalBlob:
    """A file that has been named by its content."""

    path: Path
    ref: BlobRef
    chunk_digests: bytes


@dataclass(frozen=True, slots=True)
class Encoded:
    """An update ready to be sent."""

    manifest: LocalBlob
    shards: tuple[LocalBlob, ...]

    @property
    def blobs(self) -> tuple[LocalBlob, ...]:
        """Everything to send, the manifest first, so that the server knows early what comes."""
        return (self.manifest, *self.shards)


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

    async def fetch(self, order: Order, model_dir: Path, on_bytes: OnBytes) -> Manifest:
        """Lay out a task's model for the trainer, downloading what is not here; answers the model's manifest.

        The shards are hard links into the cache, beside `MODEL_FILE`.

        Raises:
            FedlinkError: the task or the session is over; BAD_MANIFEST, BLOB_NOT_FOUND, BLOB_CORRUPT.
            OSError: the disk is full.
        """
        if order.model.size > MAX_MANIFEST_SIZE:
            raise FedlinkError(Reason.BAD_MANIFEST, f"the model's manifest is {order.model.size} bytes long")
        # One at a time: two tasks of a site mostly want the same version.
        async with self._lock:
            self._cache.pin(order.token, [order.model.digest])
            await self._ensure(order, [order.model], lambda _done, _total: None)
            data = await asyncio.to_thread(self._cache.path(order.model.digest).read_bytes)
            manifest = Manifest.parse(data)
            if manifest.kind is not Kind.MODEL:
                raise FedlinkError(Reason.BAD_MANIFEST, f"the task names a manifest of a {manifest.kind}, not a model")
            files = list({f.blob.digest: f.blob for f in manifest.files}.values())
            needed = frozenset((order.model.digest, *(f.digest for f in files)))
            self._cache.pin(order.token, needed)
            await self._drop_older(order.run, needed)
            await self._ensure(order, files, on_bytes)
            await asyncio.to_thread(self._lay_out, manifest, model_dir)
        return manifest

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

    async def send(self, token: bytes, update: Encoded, on_bytes: OnBytes) -> None:
        """Send an update under a task; what the server has already moves no byte.

        Every blob is announced for this very task, also one that an earlier task sent: a task completes only with
        what was uploaded under it.

        Raises:
            FedlinkError: the task or the session is over; TOO_LARGE, BLOB_CORRUPT.
            OSError: the update cannot be read.
        """
        total = sum(b.ref.size for b in update.blobs)
        sent = 0
        for blob in update.blobs:
            await self._upload(blob, TaskPurpose(token), _shifted(on_bytes, sent, total))
            sent += blob.ref.size

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

    async def _ensure(self, order: Order, refs: Sequence[BlobRef], on_bytes: OnBytes) -> None:
        missing = [ref for ref in refs if not await asyncio.to_thread(self._is_here, ref)]
        total = sum(ref.size for ref in refs)
        done = total - sum(ref.size for ref in missing)
        await asyncio.to_thread(self._cache.trim, self._cache.pinned(), total - done)
        for ref in missing:
            await self._download(order.token, ref, _shifted(on_bytes, done, total))
            self._checked.add(ref.digest)
            done += ref.size

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

    def _lay_out(self, manifest: Manifest, model_dir: Path) -> None:
        fresh_directory(model_dir)
        for index, file in enumerate(manifest.files):
            os.link(self._cache.path(file.blob.digest), model_dir / file.name)
            try:
                header = read_header(model_dir / file.name)
            except TensorError as e:
                raise FedlinkError(Reason.BAD_MANIFEST, str(e), metadata={"tensor": e.tensor}) from None
            manifest.check_header(index, header)
        table = {
            "files": [f.name for f in manifest.files],
            "roles": {t.spec.name: t.spec.role.value for t in manifest.tensors},
            "aliases": dict(manifest.aliases),
            "base": base_to_json(manifest.base),
        }
        (model_dir / MODEL_FILE).write_text(json.dumps(table), encoding="utf-8")


def update_files(model: Manifest, update_dtype: str) -> dict[str, int]:
    """Names and about the sizes of the files that a trainer will write for an update to a model."""
    trained = [[t.spec for t in model.in_file(i) if t.spec.role is not Role.FROZEN] for i in range(len(model.files))]
    sizes = [sum(update_spec(s, update_dtype).nbytes for s in specs) for specs in trained if specs]
    return {shard_name(i, len(sizes), UPDATE_STEM): size for i, size in enumerate(sizes)}


def drop_model_files(model_dir: Path) -> None:
    """Free the shards of a model that has been trained; what `encode` needs stays. Blocking."""
    for path in model_dir.iterdir():
        if path.name != MODEL_FILE:
            path.unlink()


def encode(order: Order, model_dir: Path, update_dir: Path, files: Sequence[str]) -> Encoded:
    """Name an update by its content and write its manifest. Blocking; the same files give the same manifest.

    Args:
        order: the task.
        model_dir: as `Transfer.fetch` laid it out; gives the roles.
        update_dir: where the shards are; the manifest is written beside them.
        files: names of the shards in canonical order.

    Raises:
        FedlinkError: BAD_MANIFEST: a file is no safetensors file; TOO_LARGE: more bytes than the task allows.
        OSError: a file is not there.
    """
    assert order.update is not None
    roles = json.loads((model_dir / MODEL_FILE).read_text(encoding="utf-8"))["roles"]
    shards = [LocalBlob(update_dir / name, *bulk.hash_file(update_dir / name)) for name in files]
    size = sum(s.ref.size for s in shards)
    if order.max_update_bytes and size > order.max_update_bytes:
        raise FedlinkError(
            Reason.TOO_LARGE, f"the update is {size} bytes long; the task allows {order.max_update_bytes}"
        )
    try:
        entries = [(FileEntry(s.path.name, s.ref), read_header(s.path)) for s in shards]
    except TensorError as e:
        raise FedlinkError(Reason.BAD_MANIFEST, str(e), metadata={"tensor": e.tensor}) from None
    manifest = manifest_of_files(order.update, entries, {name: Role(role) for name, role in roles.items()})
    path = update_dir / _MANIFEST
    path.write_bytes(manifest.serialize())
    return Encoded(LocalBlob(path, *bulk.hash_file(path)), tuple(shards))


def _shifted(on_bytes: OnBytes, before: int, total: int) -> OnBytes:
    def told(done: int, _size: int) -> None:
        on_bytes(before + done, total)

    return told
