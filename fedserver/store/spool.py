"""Uploads on their way in: slots on the local disk.

    spool/<upload id>/state    magic, digest, size, committed mark
    spool/<upload id>/chunks   32 bytes for each chunk
    spool/<upload id>/data     the bytes; preallocated

A chunk is checked against the list, written, and only then does the mark move, by one
8-byte write; nothing is synced. So whatever was acknowledged survives SIGKILL at any
instant, and after a power loss `reverify` finds what is really there. A slot appears and
disappears by one rename. Everything here blocks on the disk; call it from a thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlink.blobs import (
    CHUNK_SIZE,
    DIGEST_SIZE,
    BlobRef,
    chunk_digest,
    chunk_spans,
    first_bad_chunk,
    is_list_of,
)
from fedlink.errors import FedlinkError, Reason
from fedlink.failpoints import reach
from fedlink.files import Buffer, open_to_fill, read_at, write_at
from fedlink.recycle import Recycler
from fedserver.store.disk import FURTHER, Disk

UPLOAD_ID_SIZE = 16
"""Bytes in an upload's id."""

_STATE = struct.Struct("<8s32sQQ")
_MAGIC = b"FLSPOOL1"
_MARK_OFFSET = 48
_NEW, _OLD, _FREE = ".new-", ".old-", ".free"
_LOCKS = 64
_OPEN = 64
"""Slots that stay open for their next chunks."""


@dataclass(frozen=True, slots=True)
class _Slot:
    directory: Path
    ref: BlobRef
    committed: int

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def chunks(self) -> Path:
        return self.directory / "chunks"

    def mark(self, committed: int) -> None:
        with _opened(self.directory / "state", os.O_WRONLY) as fd:
            write_at(fd, committed.to_bytes(8, "little"), _MARK_OFFSET)


class _Writable:
    """The open files of a slot, for the length of an upload."""

    def __init__(self, slot: _Slot) -> None:
        self.ref, self.committed = slot.ref, slot.committed
        self._fds = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.data = stack.enter_context(_opened(slot.data, os.O_WRONLY))
            self.chunks = stack.enter_context(_opened(slot.chunks, os.O_RDONLY))
            self._state = stack.enter_context(_opened(slot.directory / "state", os.O_WRONLY))
            self._fds = stack.pop_all()

    def mark(self, committed: int) -> None:
        """Move the mark."""
        write_at(self._state, committed.to_bytes(8, "little"), _MARK_OFFSET)
        self.committed = committed

    def close(self) -> None:
        """Close them."""
        self._fds.close()


class Spool:
    """Upload slots in a directory. One process; any thread.

    What an interrupted `create` or `delete` left behind goes at construction.

    Args:
        root: the directory.
        disk: what it lies on; no slot is created that would not leave it its reserve.
        recycler: where the files of deleted slots go and those of new ones come from; what they held is not readable
            through the spool.
    """

    def __init__(self, root: Path, *, disk: Disk | None = None, recycler: Recycler | None = None) -> None:
        self._root = root
        self._disk = disk or Disk(root)
        self._recycler = recycler
        self._open: dict[bytes, _Writable] = {}
        """Slots that are being written, the one written last at the end."""
        self._open_lock = threading.Lock()
        self._locks = tuple(threading.Lock() for _ in range(_LOCKS))
        root.mkdir(parents=True, exist_ok=True)
        for path in root.iterdir():
            if path.name.startswith((_NEW, _OLD, _FREE)):
                shutil.rmtree(path)

    def create(self, upload_id: bytes, ref: BlobRef, chunk_digests: bytes, *, leave: int = 0) -> None:
        """Open a slot with room for a blob; nothing happens if it is there already.

        Args:
            upload_id: names the slot.
            ref: the blob.
            chunk_digests: its list.
            leave: bytes that must stay free on the disk besides its reserve.

        Raises:
            FedlinkError: DISK_FULL, DISK_UNWRITABLE; DIGEST_MISMATCH, if the list does not give the digest, or the
                id stands for another blob.
        """
        with self._lock(upload_id):
            if not self._exists(upload_id, ref):
                with self._new_slot(upload_id, ref, chunk_digests, committed=0) as directory:
                    self._allocate(directory / "data", ref, leave)

    def link(self, upload_id: bytes, source: Path, ref: BlobRef, chunk_digests: bytes, *, leave: int = 0) -> None:
        """Open a slot that is complete from the start, with the bytes of a file here (linked, or else copied).

        Raises:
            FedlinkError: as for `create`.
        """
        with self._lock(upload_id):
            if self._exists(upload_id, ref):
                return
            with self._new_slot(upload_id, ref, chunk_digests, committed=ref.size) as directory:
                try:
                    (directory / "data").hardlink_to(source)
                except OSError:
                    # Another file system, or one without links.
                    self._disk.check_room(ref.size, f"blob {ref}", leave=leave)
                    shutil.copyfile(source, directory / "data")

    def append(self, upload_id: bytes, offset: int, chunks: Sequence[Buffer]) -> int:
        """Check and write whole chunks at the committed mark, then move the mark; where it is now.

        On any error the good chunks before the bad one are kept.

        Raises:
            FedlinkError: UPLOAD_NOT_FOUND, DISK_FULL, DISK_UNWRITABLE; with the mark in metadata "committed_size"
                OFFSET_MISMATCH (`offset` is not the mark), CHUNK_SIZE (not one whole chunk), CHUNK_CORRUPT (not what
                the list says).
        """
        with self._lock(upload_id):
            slot = self._writable(upload_id)
            if offset != slot.committed:
                raise offset_mismatch(offset, slot.committed)
            digests = os.pread(slot.chunks, DIGEST_SIZE * len(chunks), offset // CHUNK_SIZE * DIGEST_SIZE)
            end = offset
            with self._disk.used_for("uploads"):
                try:
                    for at, chunk in enumerate(chunks):
                        _check_chunk(slot.ref, end, chunk, digests[at * DIGEST_SIZE : (at + 1) * DIGEST_SIZE])
                        write_at(slot.data, chunk, end)
                        end += len(chunk)
                finally:
                    if end > offset:
                        reach("upload.written")
                        slot.mark(end)
                        reach("upload.marked")
            if end == slot.ref.size:
                self._close(upload_id)
            return end

    def committed(self, upload_id: bytes) -> int:
        """Bytes from 0 on that are here and right.

        Raises:
            FedlinkError: UPLOAD_NOT_FOUND.
        """
        return self._slot(upload_id).committed

    def moved(self, upload_id: bytes) -> float:
        """When the mark moved last, in seconds since the epoch.

        Raises:
            FedlinkError: UPLOAD_NOT_FOUND.
        """
        try:
            return (self._directory(upload_id) / "state").stat().st_mtime
        except FileNotFoundError:
            raise _not_found(upload_id) from None

    def complete(self, upload_id: bytes) -> bool:
        """Whether the whole blob is here; False also if there is no such slot."""
        try:
            slot = self._slot(upload_id)
        except FedlinkError:
            return False
        return slot.committed == slot.ref.size

    def ref(self, upload_id: bytes) -> BlobRef:
        """The blob a slot is for.

        Raises:
            FedlinkError: UPLOAD_NOT_FOUND.
        """
        return self._slot(upload_id).ref

    def chunk_digests(self, upload_id: bytes) -> bytes:
        """32 bytes for each chunk.

        Raises:
            FedlinkError: UPLOAD_NOT_FOUND.
        """
        return self._slot(upload_id).chunks.read_bytes()

    def path(self, upload_id: bytes) -> Path:
        """Where the slot's bytes lie, if there is one.

        A `BlobStore` may adopt the file, or a link to it, when it is complete; then only `delete` is left to do with
        the slot.

        Raises:
            FedlinkError: UPLOAD_NOT_FOUND, for what is not an id.
        """
        return self._directory(upload_id) / "data"

    def list_path(self, upload_id: bytes) -> Path:
        """Where the slot's chunk list lies, if there is one.

        Raises:
            FedlinkError: UPLOAD_NOT_FOUND, for what is not an id.
        """
        return self._directory(upload_id) / "chunks"

    def ids(self) -> Iterator[bytes]:
        """The ids of all slots, in no order."""
        for path in self._root.iterdir():
            # Anything else in the directory is not ours to judge.
            if re.fullmatch(r"[0-9a-f]{32}", path.name):
                yield bytes.fromhex(path.name)

    def delete(self, upload_id: bytes) -> None:
        """Remove a slot; nothing happens if there is none."""
        with self._lock(upload_id):
            self._close(upload_id)
            self._remove(self._directory(upload_id))

    def reverify(self, upload_id: bytes, unwanted: Callable[[], bool] = lambda: False) -> int:
        """Hash a slot again and set the mark to the first byte that is not right; where it is now.

        For the start after a power loss. A slot that is damaged beyond use is deleted.

        Args:
            upload_id: which.
            unwanted: asked before every chunk; once it says so, the look ends and the mark stays.

        Raises:
            FedlinkError: UPLOAD_NOT_FOUND; DRAINING if the answer is not wanted any more.
        """
        with self._lock(upload_id):
            self._close(upload_id)
            directory = self._directory(upload_id)
            try:
                slot = self._slot(upload_id)
            except FedlinkError:
                self._remove(directory)
                raise
            digests = slot.chunks.read_bytes()
            if not is_list_of(digests, slot.ref):
                self._remove(directory)
                raise _not_found(upload_id)
            with _opened(slot.data, os.O_RDWR) as fd:
                good = _good_bytes(fd, slot.committed, digests, unwanted)
                if os.fstat(fd).st_size != slot.ref.size:
                    os.truncate(fd, slot.ref.size)
            if good != slot.committed:
                slot.mark(good)
            return good

    def _writable(self, upload_id: bytes) -> _Writable:
        """The open files of a slot, whose lock is held; they are closed when it is full or deleted."""
        with self._open_lock:
            slot = self._open.pop(upload_id, None)
            if slot is None:
                slot = _Writable(self._slot(upload_id))
            self._open[upload_id] = slot
            idle = [
                i for i in list(self._open)[: len(self._open) - _OPEN] if self._lock(i) is not self._lock(upload_id)
            ]
        for other in idle:
            # Whoever holds it is writing, so that one is not idle.
            if self._lock(other).acquire(blocking=False):
                try:
                    self._close(other)
                finally:
                    self._lock(other).release()
        return slot

    def _close(self, upload_id: bytes) -> None:
        with self._open_lock:
            slot = self._open.pop(upload_id, None)
        if slot:
            slot.close()

    def _lock(self, upload_id: bytes) -> threading.Lock:
        return self._locks[hash(upload_id) % _LOCKS]

    def _directory(self, upload_id: bytes) -> Path:
        if len(upload_id) != UPLOAD_ID_SIZE:
            raise _not_found(upload_id)
        return self._root / upload_id.hex()

    def _slot(self, upload_id: bytes) -> _Slot:
        directory = self._directory(upload_id)
        try:
            magic, digest, size, committed = _STATE.unpack((directory / "state").read_bytes())
        except (FileNotFoundError, struct.error):
            raise _not_found(upload_id) from None
        slot = _Slot(directory, BlobRef(digest, size), committed)
        if magic != _MAGIC or committed > size or not slot.data.exists():
            raise _not_found(upload_id)
        return slot

    def _exists(self, upload_id: bytes, ref: BlobRef) -> bool:
        try:
            slot = self._slot(upload_id)
        except FedlinkError:
            return False
        if slot.ref != ref:
            raise FedlinkError(
                Reason.DIGEST_MISMATCH, f"Upload {upload_id.hex()} is for blob {slot.ref} and not {ref}; start another."
            )
        return True

    @contextlib.contextmanager
    def _new_slot(self, upload_id: bytes, ref: BlobRef, chunk_digests: bytes, *, committed: int) -> Iterator[Path]:
        if not is_list_of(chunk_digests, ref):
            raise FedlinkError(Reason.DIGEST_MISMATCH, f"The chunk list does not give blob {ref}; hash the file again.")
        final = self._directory(upload_id)
        directory = self._root / f"{_NEW}{secrets.token_hex(8)}"
        try:
            with self._disk.used_for(FURTHER):
                directory.mkdir()
                (directory / "state").write_bytes(_STATE.pack(_MAGIC, ref.digest, ref.size, committed))
                (directory / "chunks").write_bytes(chunk_digests)
                yield directory
                self._remove(final)
                directory.rename(final)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise

    def _allocate(self, data: Path, ref: BlobRef, leave: int) -> None:
        if self._recycler:
            self._recycler.take(data, ref.size)
        have = data.stat().st_size if data.exists() else 0
        if have < ref.size:
            self._disk.check_room(ref.size - have, f"blob {ref}", leave=leave)
        os.close(open_to_fill(data, ref.size))

    def _remove(self, directory: Path) -> None:
        old = self._root / f"{_OLD}{secrets.token_hex(8)}"
        try:
            directory.rename(old)
        except FileNotFoundError:
            return
        reach("upload.removed")
        if self._recycler:
            with contextlib.suppress(FileNotFoundError):
                self._recycler.give(old / "data")
        shutil.rmtree(old)


def offset_mismatch(offset: int, committed: int) -> FedlinkError:
    """The error for a chunk that does not begin where the upload goes on."""
    return FedlinkError(
        Reason.OFFSET_MISMATCH,
        f"The chunk begins at {offset}, but the upload goes on at {committed}.",
        metadata={"committed_size": str(committed)},
    )


def _check_chunk(ref: BlobRef, offset: int, chunk: Buffer, digest: bytes) -> None:
    expected = min(CHUNK_SIZE, ref.size - offset)
    metadata = {"committed_size": str(offset)}
    if len(chunk) != expected or not chunk:
        text = f"A message has {len(chunk)} bytes at {offset} of blob {ref}, where a whole chunk has {expected}."
        raise FedlinkError(Reason.CHUNK_SIZE, text, metadata=metadata)
    if chunk_digest(chunk) != digest:
        text = f"The chunk at {offset} of blob {ref} does not match its digest; send it again."
        raise FedlinkError(Reason.CHUNK_CORRUPT, text, metadata=metadata)


def _good_bytes(fd: int, committed: int, digests: bytes, unwanted: Callable[[], bool]) -> int:
    """The offset of the first chunk before the mark that is not as the list says; the mark if all are."""
    buffer = memoryview(bytearray(CHUNK_SIZE))
    for offset, length in chunk_spans(0, committed):
        if unwanted():
            raise FedlinkError(Reason.DRAINING, "the look at an upload is not wanted any more")
        try:
            read_at(fd, buffer[:length], offset)
        except EOFError:
            return offset
        if first_bad_chunk(buffer[:length], offset, digests) is not None:
            return offset
    return committed


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _not_found(upload_id: bytes) -> FedlinkError:
    return FedlinkError(
        Reason.UPLOAD_NOT_FOUND, f"There is no upload {upload_id.hex()[:32]} of yours; call StartUpload again."
    )
