"""Shards on disk, read by position and written in order while they are named."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from fedlink.blobs import ChunkHasher
from fedlink.errors import FedlinkError, Reason
from fedlink.manifest import FileEntry, TensorEntry
from fedlink.recycle import Recycler
from fedlink.tensors import ShardWriter, TensorError, TensorSpec, read_into
from fedserver.aggregation.pipeline import WrittenFile

WINDOW_BYTES = 1 << 20
"""Bytes in a window that is copied or checked."""


class ShardReader:
    """Reads tensors of many files by position; keeps few of them open. For one thread; a context manager."""

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._open: OrderedDict[Path, int] = OrderedDict()

    def read(self, files: Sequence[Path], entry: TensorEntry, start: int, out: memoryview) -> None:
        """Fill `out` from `start` bytes into a tensor.

        Args:
            files: where the files of the tensor's manifest lie.
            entry: the tensor.
            start: bytes into the tensor.
            out: receives the bytes.

        Raises:
            FedlinkError: BLOB_CORRUPT if the file is shorter than the manifest says.
            OSError: the file cannot be read.
        """
        path = files[entry.file]
        try:
            self.read_bytes(path, entry.stored.offset + start, out)
        except TensorError as e:
            name = entry.spec.name
            raise FedlinkError(
                Reason.BLOB_CORRUPT,
                f"{path} ends in the middle of tensor {name!r}; the file was changed after it had been checked",
                metadata={"tensor": name},
            ) from e

    def read_bytes(self, path: Path, start: int, out: memoryview) -> None:
        """Fill `out` from `start` bytes into a file.

        Raises:
            TensorError: the file is shorter.
            OSError: the file cannot be read.
        """
        read_into(self._descriptor(path), out, start)

    def _descriptor(self, path: Path) -> int:
        fd = self._open.get(path)
        if fd is not None:
            self._open.move_to_end(path)
            return fd
        if len(self._open) >= self._limit:
            os.close(self._open.popitem(last=False)[1])
        fd = self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()


class NamingWriter:
    """Writes one safetensors file from its first byte to its last and names it on the way. A context manager.

    Attributes:
        header: where each tensor goes.

    Args:
        path: the file.
        specs: its tensors, in this order.
        recycler: may have a file to write over.

    Raises:
        FileExistsError: the file exists; it may be one that is being read.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec], recycler: Recycler | None = None) -> None:
        if path.exists():
            raise FileExistsError(errno.EEXIST, "will not write over it", str(path))
        if recycler:
            recycler.take(path, sum(s.nbytes for s in specs))
        self._writer = ShardWriter(path, specs)
        self._hasher = ChunkHasher()
        self._hasher.update(self._writer.head)
        self._starts = {s.spec.name: s.offset for s in self._writer.header.tensors}
        self.header = self._writer.header

    def write(self, name: str, data: memoryview) -> None:
        """Append bytes of a tensor; tensors come in the order of the header, each from its first byte on.

        Raises:
            TensorError: more bytes than the tensor has.
            OSError: the file cannot be written.
        """
        self._writer.write(name, data, self._hasher.size - self._starts[name])
        self._hasher.update(data)

    def finish(self, name: str) -> WrittenFile:
        """The file under the name it gets in a manifest. Call once, after the context has been left."""
        ref = self._hasher.finish()
        return WrittenFile(FileEntry(name, ref), self._writer.path, self._hasher.chunk_digests)

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self._writer.__exit__(kind, *rest)


@contextlib.contextmanager
def naming_a_full_disk(directory: Path) -> Iterator[None]:
    """Turn "no space left" into a sentence.

    Raises:
        FedlinkError: DISK_FULL.
    """
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise FedlinkError(Reason.DISK_FULL, f"the disk of {directory} is full; make room on it") from e
