"""Committed blobs: immutable files named by their digest.

    blobs/ab/abcd…          the bytes
    blobs/ab/abcd….chunks   32 bytes for each chunk

The list is in place before the bytes are, and is removed after them, so a file without a
suffix always has its list. Everything here blocks on the disk; call it from a thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from fedlink.blobs import CHUNK_SIZE, DIGEST_SIZE, BlobRef, chunk_spans, first_bad_chunk, is_list_of
from fedlink.errors import FedlinkError, Reason
from fedlink.failpoints import reach
from fedlink.files import make_directory, read_at, sync
from fedlink.recycle import Recycler
from fedserver.store.disk import disk_errors_named

_LIST_SUFFIX = ".chunks"
_TEMPORARY = ".tmp-"


class BlobReader(Protocol):
    """An open blob; a context manager. Reads by position, from any thread."""

    @property
    def size(self) -> int:
        """Bytes in the blob."""
        ...

    @property
    def chunk_digests(self) -> bytes:
        """32 bytes for each chunk."""
        ...

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on.

        Raises:
            FedlinkError: BLOB_CORRUPT; the file is shorter than it was.
        """
        ...

    def close(self) -> None:
        """Let the blob go."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None: ...


class BlobStore(Protocol):
    """Where committed blobs are kept."""

    def contains(self, digest: bytes) -> bool:
        """Whether the blob is here."""
        ...

    def open(self, digest: bytes) -> BlobReader:
        """Open a blob for reading. It stays readable until closed, even if it is deleted meanwhile.

        Raises:
            FedlinkError: BLOB_NOT_FOUND; BLOB_CORRUPT if size or chunk list are not the blob's.
        """
        ...

    def local_path(self, digest: bytes) -> Path:
        """A local file with the blob's bytes, to be read only.

        Raises:
            FedlinkError: BLOB_NOT_FOUND.
        """
        ...

    def list_path(self, digest: bytes) -> Path:
        """A local file with the blob's chunk list, to be read only.

        Raises:
            FedlinkError: BLOB_NOT_FOUND.
        """
        ...

    def adopt(self, path: Path, ref: BlobRef, chunk_digests: bytes) -> None:
        """Take over a finished local file; on return it survives a power loss, and `path` is gone.

        The caller vouches that the bytes match the list. If the blob is here already, `path` is only removed.

        Raises:
            FedlinkError: DIGEST_MISMATCH, if list or size do not give the digest; DISK_FULL, DISK_UNWRITABLE.
        """
        ...

    def delete(self, digest: bytes) -> None:
        """Remove a blob; nothing happens if it is not here."""
        ...

    def digests(self) -> Iterator[bytes]:
        """Every blob here, in no order."""
        ...

    def verify(self, digest: bytes, unwanted: Callable[[], bool] = lambda: False) -> None:
        """Hash the whole blob again.

        Args:
            digest: which.
            unwanted: asked before every chunk; once it says so, the look ends.

        Raises:
            FedlinkError: BLOB_NOT_FOUND, BLOB_CORRUPT; DRAINING if the answer is not wanted any more.
            OSError: it cannot be read.
        """
        ...


def read_blob(store: BlobStore, digest: bytes, limit: int) -> bytes:
    """A whole small blob (a manifest), checked against its digest.

    Raises:
        FedlinkError: BLOB_NOT_FOUND; TOO_LARGE if it has more than `limit` bytes; BLOB_CORRUPT.
    """
    with store.open(digest) as reader:
        if reader.size > limit:
            raise FedlinkError(
                Reason.TOO_LARGE,
                f"Blob {digest.hex()[:12]} has {reader.size} bytes, more than the {limit} it may have.",
            )
        data = bytearray(reader.size)
        reader.read_into(memoryview(data), 0)
        if first_bad_chunk(data, 0, reader.chunk_digests) is not None:
            raise _corrupt(digest, "its bytes have changed")
    return bytes(data)


def checked(reader: BlobReader, digest: bytes) -> Callable[[memoryview, int], None]:
    """A `read_into` for whole chunks that compares them with the list.

    It raises BLOB_CORRUPT, naming the first chunk that has changed.
    """

    def read_into(view: memoryview, offset: int) -> None:
        reader.read_into(view, offset)
        bad = first_bad_chunk(view, offset, reader.chunk_digests)
        if bad is not None:
            raise _corrupt(digest, f"the chunk at byte {bad} has changed")

    return read_into


class DirectoryBlobStore:
    """Blobs in a directory of the local disk. Leftovers of an interrupted `adopt` or `delete` go at construction.

    Args:
        root: the directory.
        recycler: where the files of deleted blobs go, unless they are being read.
    """

    def __init__(self, root: Path, recycler: Recycler | None = None) -> None:
        self._root = root
        self._recycler = recycler
        self._read = Counter[bytes]()
        self._lock = threading.Lock()
        make_directory(root)
        self._sweep()

    def contains(self, digest: bytes) -> bool:
        """Whether the blob is here."""
        return self._path(digest).is_file()

    def open(self, digest: bytes) -> DirectoryBlobReader:
        """Open a blob; see `BlobStore.open`."""
        path = self._path(digest)
        with self._lock:
            self._read[digest] += 1
        try:
            reader = DirectoryBlobReader(path, digest, _list_of(path).read_bytes(), self._closed)
        except BaseException as e:
            self._closed(digest)
            if isinstance(e, FileNotFoundError):
                raise _not_found(digest) from None
            raise
        if not is_list_of(reader.chunk_digests, BlobRef(digest, reader.size)):
            reader.close()
            raise _corrupt(digest, "its size or chunk list is not what its name says")
        return reader

    def local_path(self, digest: bytes) -> Path:
        """The blob's own file; see `BlobStore.local_path`."""
        path = self._path(digest)
        if not path.is_file():
            raise _not_found(digest)
        return path

    def list_path(self, digest: bytes) -> Path:
        """The file with the blob's list; see `BlobStore.list_path`."""
        return _list_of(self.local_path(digest))

    def adopt(self, path: Path, ref: BlobRef, chunk_digests: bytes) -> None:
        """Take over a file; see `BlobStore.adopt`. A file on another file system is copied."""
        size = path.stat().st_size
        if size != ref.size or not is_list_of(chunk_digests, ref):
            raise FedlinkError(
                Reason.DIGEST_MISMATCH,
                f"{path.name} ({size} bytes) or its chunk list is not blob {ref}; write it again.",
            )
        target = self._path(ref.digest)
        if not target.is_file():
            with disk_errors_named(f"blob {ref}"):
                self._place(path, target, chunk_digests)
        path.unlink(missing_ok=True)

    def delete(self, digest: bytes) -> None:
        """Remove a blob; see `BlobStore.delete`."""
        path = self._path(digest)
        with self._lock:
            # It must stay as it is for who reads it.
            recycler = None if self._read[digest] else self._recycler
            if recycler:
                with contextlib.suppress(FileNotFoundError):
                    recycler.give(path)
            path.unlink(missing_ok=True)
        reach("blob.unlinked")
        _list_of(path).unlink(missing_ok=True)

    def digests(self) -> Iterator[bytes]:
        """Every blob here; see `BlobStore.digests`."""
        for path in self._root.glob("*/*"):
            # Anything else in the directory is not ours to judge.
            if re.fullmatch(r"[0-9a-f]{64}", path.name):
                yield bytes.fromhex(path.name)

    def verify(self, digest: bytes, unwanted: Callable[[], bool] = lambda: False) -> None:
        """Hash a blob again; see `BlobStore.verify`."""
        buffer = memoryview(bytearray(CHUNK_SIZE))
        with self.open(digest) as reader:
            read_into = checked(reader, digest)
            for offset, length in chunk_spans(0, reader.size):
                if unwanted():
                    raise FedlinkError(Reason.DRAINING, f"the look at blob {digest.hex()[:12]} is not wanted any more")
                read_into(buffer[:length], offset)

    def _closed(self, digest: bytes) -> None:
        with self._lock:
            self._read[digest] -= 1
            if not self._read[digest]:
                del self._read[digest]

    def _path(self, digest: bytes) -> Path:
        if len(digest) != DIGEST_SIZE:
            raise _not_found(digest)
        name = digest.hex()
        return self._root / name[:2] / name

    def _place(self, path: Path, target: Path, chunk_digests: bytes) -> None:
        directory = target.parent
        make_directory(directory)
        temporary = directory / f"{_TEMPORARY}{secrets.token_hex(8)}"
        try:
            temporary.write_bytes(chunk_digests)
            sync(temporary)
            temporary.rename(_list_of(target))
            reach("blob.listed")
            sync(path)
            try:
                path.rename(target)
            except OSError as e:
                if e.errno != errno.EXDEV:
                    raise
                shutil.copyfile(path, temporary)
                sync(temporary)
                temporary.rename(target)
        finally:
            temporary.unlink(missing_ok=True)
        sync(directory)
        reach("blob.placed")

    def _sweep(self) -> None:
        for directory in self._root.iterdir():
            for path in directory.iterdir():
                orphan = path.suffix == _LIST_SUFFIX and not path.with_suffix("").exists()
                if orphan or path.name.startswith(_TEMPORARY):
                    path.unlink(missing_ok=True)


class DirectoryBlobReader:
    """An open file of a `DirectoryBlobStore`; see `BlobReader`."""

    def __init__(self, path: Path, digest: bytes, chunk_digests: bytes, closed: Callable[[bytes], None]) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._digest = digest
        self._size = os.fstat(self._fd).st_size
        self._chunk_digests = chunk_digests
        self._closed = closed

    @property
    def size(self) -> int:
        """Bytes in the blob."""
        return self._size

    @property
    def chunk_digests(self) -> bytes:
        """32 bytes for each chunk."""
        return self._chunk_digests

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view`; see `BlobReader.read_into`."""
        try:
            read_at(self._fd, view, offset)
        except EOFError as e:
            raise _corrupt(self._digest, str(e)) from None

    def close(self) -> None:
        """Let the file go; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._closed(self._digest)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _list_of(path: Path) -> Path:
    return path.with_name(path.name + _LIST_SUFFIX)


def _not_found(digest: bytes) -> FedlinkError:
    return FedlinkError(Reason.BLOB_NOT_FOUND, f"There is no blob {digest.hex()[:12]} here for you to read.")


def _corrupt(digest: bytes, what: str) -> FedlinkError:
    return FedlinkError(
        Reason.BLOB_CORRUPT,
        f"Blob {digest.hex()[:12]} is damaged on the server's disk: {what}; restore it from a backup.",
    )
