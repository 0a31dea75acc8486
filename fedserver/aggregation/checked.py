"""Tensors read for the fold, compared with the chunk lists of their files on the way.

Updates and models are hashed when they come in; a bit that turns on the disk afterwards
would go into the average unseen. The fold reads each file from its first tensor to its
last, so the hash runs along: each byte is read once, and nothing is kept but one hasher a
file. What was read is used before its chunk is complete; leaving the context finishes
every open chunk, and until then the result must not be used.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Self

import numpy as np

from fedlink.blobs import CHUNK_SIZE, BlobRef, ChunkChecker, ChunkList, chunk_count, is_list_of
from fedlink.errors import FedlinkError, Reason
from fedlink.manifest import TensorEntry
from fedlink.tensors import TensorError
from fedserver.aggregation.files import ShardReader
from fedserver.aggregation.pipeline import Contribution, Holder


class CheckedReader:
    """Reads tensors of models and updates by position. For one thread; a context manager.

    Leaving it raises BLOB_CORRUPT if anything that was read is not as its list says.
    """

    def __init__(self) -> None:
        self._reader = ShardReader()
        self._files: dict[tuple[int, int], _File] = {}

    def read(self, holder: Holder, entry: TensorEntry, start: int, out: memoryview) -> None:
        """Fill `out` from `start` bytes into a tensor.

        Raises:
            FedlinkError: BLOB_CORRUPT; the file, or something read from it before, is not what the manifest says.
            OSError: the file cannot be read.
        """
        try:
            self._reader.read(holder.files, entry, start, out)
        except FedlinkError as e:
            e.metadata |= _metadata(holder, holder.manifest.files[entry.file].blob)
            raise
        if not holder.lists:
            return
        key = (id(holder), entry.file)
        if key not in self._files:
            self._files[key] = _File(self._reader, holder, entry.file)
        self._files[key].took(entry.stored.offset + start, out)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._reader:
            # A refused result may come of a flipped bit: then that is what is to be said.
            if kind is None or issubclass(kind, FedlinkError):
                for file in self._files.values():
                    file.finish()


class _File:
    """How far the hash of one file has come."""

    def __init__(self, reader: ShardReader, holder: Holder, index: int) -> None:
        self._reader = reader
        self._holder = holder
        self._entry = holder.manifest.files[index]
        self._path = holder.files[index]
        self._digests = _mapped(holder.lists[index])
        self._good = bytearray(chunk_count(self._entry.blob.size))
        if not is_list_of(self._digests, self._entry.blob):
            raise self._damaged("its chunk list has changed")
        self._checker = ChunkChecker(self._digests, self._entry.blob.size)

    def took(self, start: int, data: memoryview) -> None:
        """These bytes were read."""
        if start != self._checker.position:
            chunks = self._good[start // CHUNK_SIZE : chunk_count(start + len(data))]
            # In whatever order a site has put its tensors, no chunk is hashed again and again.
            if all(chunks):
                return
            self._go_to(start)
        self._feed(data)

    def finish(self) -> None:
        """Read what is missing of the open chunk."""
        if self._checker.missing:
            self._feed(self._fetched(self._checker.missing))

    def _go_to(self, start: int) -> None:
        """Bring the hash to a byte of the file: on from where it is, or from the begin of that byte's chunk."""
        first = start - start % CHUNK_SIZE
        if not first <= self._checker.position <= start:
            self.finish()
            self._checker = ChunkChecker(self._digests, self._entry.blob.size, first)
        self._feed(self._fetched(start - self._checker.position))

    def _fetched(self, length: int) -> memoryview:
        part = np.empty(length, np.uint8).data
        try:
            self._reader.read_bytes(self._path, self._checker.position, part)
        except TensorError:
            raise self._damaged("it is shorter than it was") from None
        return part

    def _feed(self, data: memoryview) -> None:
        first = self._checker.position // CHUNK_SIZE
        bad = self._checker.update(data)
        if bad is not None:
            raise self._damaged(f"the chunk at byte {bad} has changed")
        for complete in range(first, self._checker.complete):
            self._good[complete] = True

    def _damaged(self, what: str) -> FedlinkError:
        blob = self._entry.blob
        return FedlinkError(
            Reason.BLOB_CORRUPT,
            f"file {self._entry.name} of {self._holder.title} (blob {blob.digest.hex()[:12]}) is damaged on the "
            f"server's disk: {what}",
            metadata=_metadata(self._holder, blob),
        )


def _mapped(path: Path) -> ChunkList:
    """A chunk list where the page cache has it: a site may send one file as large as its model."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if os.fstat(file.fileno()).st_size else b""


def _metadata(holder: Holder, blob: BlobRef) -> dict[str, str]:
    client = {"client": holder.client} if isinstance(holder, Contribution) else {}
    return {"digest": blob.digest.hex(), **client}
