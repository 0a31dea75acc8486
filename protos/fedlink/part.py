"""A blob on its way in, on the disk of the one who fetches it.

    <target>.part     the bytes so far
    <target>.chunks   32 bytes for each chunk, checked against the digest

Nothing of it is believed unhashed: after an interruption `resume` reads what is there
and goes on behind the last chunk that matches the list.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from fedlink.blobs import CHUNK_SIZE, BlobRef, chunk_spans, first_bad_chunk, is_list_of
from fedlink.errors import FedlinkError, Reason
from fedlink.failpoints import reach
from fedlink.files import Buffer, open_to_fill, read_at, write_at
from fedlink.recycle import Recycler

PART_SUFFIX, LIST_SUFFIX = ".part", ".chunks"
"""Added to a target's name while it is fetched."""


class PartFile:
    """The files beside a target; a context manager that closes them. One user at a time.

    Args:
        target: the file they become.
        ref: what it will hold.
        recycler: may have a file to write over.

    Attributes:
        verified: bytes from 0 on that are there and match the list.
        has_list: whether the list is there.
    """

    def __init__(self, target: Path, ref: BlobRef, recycler: Recycler | None = None) -> None:
        self.verified = 0
        self._target = target
        self._ref = ref
        self._part = target.with_name(target.name + PART_SUFFIX)
        self._list_path = target.with_name(target.name + LIST_SUFFIX)
        self._list = self._stored_list()
        self.has_list = self._list is not None
        if recycler and not self._part.exists():
            recycler.take(self._part, ref.size)
        try:
            self._fd = open_to_fill(self._part, ref.size)
        except OSError:
            if not recycler or not recycler.held:
                raise
            recycler.clear()
            self._fd = open_to_fill(self._part, ref.size)

    def resume(self) -> None:
        """Hash what an earlier attempt left and keep what matches; call it first.

        Raises:
            OSError: the file cannot be read.
        """
        if not self._list:
            return
        buffer = memoryview(bytearray(min(CHUNK_SIZE, self._ref.size)))
        for offset, length in chunk_spans(0, self._ref.size):
            read_at(self._fd, buffer[:length], offset)
            if first_bad_chunk(buffer[:length], offset, self._list) is not None:
                break
            self.verified = offset + length

    def take_list(self, chunk_digests: bytes) -> None:
        """Keep the list of chunk digests.

        Raises:
            FedlinkError: CHUNK_CORRUPT; it does not give the blob's digest.
            OSError: it cannot be written.
        """
        if not is_list_of(chunk_digests, self._ref):
            raise FedlinkError(Reason.CHUNK_CORRUPT, f"The chunk list that came for blob {self._ref} is not its own.")
        self._list_path.write_bytes(chunk_digests)
        reach("download.listed")
        self._list = chunk_digests
        self.has_list = True

    def write(self, offset: int, chunk: Buffer) -> int:
        """Check a whole chunk against the list and write it at `offset`; the new `verified`.

        Raises:
            FedlinkError: CHUNK_CORRUPT; nothing is written.
            OSError: it cannot be written.
        """
        if self._list is None or first_bad_chunk(chunk, offset, self._list) is not None:
            raise FedlinkError(Reason.CHUNK_CORRUPT, f"The chunk at {offset} of blob {self._ref} came damaged.")
        write_at(self._fd, chunk, offset)
        self.verified = offset + len(chunk)
        reach("download.written")
        return self.verified

    def finish(self) -> None:
        """Give the whole file its name, and remove the list.

        Raises:
            OSError: it cannot be renamed.
        """
        self._part.rename(self._target)
        reach("download.renamed")
        self._list_path.unlink(missing_ok=True)

    def _stored_list(self) -> bytes | None:
        try:
            stored = self._list_path.read_bytes()
        except FileNotFoundError:
            # An empty blob needs no list from anybody.
            stored = b""
        return stored if is_list_of(stored, self._ref) else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        os.close(self._fd)
