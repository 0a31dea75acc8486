"""Blobs: bytes named by their content. No I/O happens here.

A blob is cut into chunks of exactly `CHUNK_SIZE` bytes, the last one shorter. Its
digest is BLAKE3 over the concatenated BLAKE3 digests of its chunks (types.proto,
`BlobRef`), so that one hash over each byte serves as wire check, resume record and name.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field

import blake3

from fedlink.files import Buffer

CHUNK_SIZE = 1 << 20
"""Bytes in every chunk but the last."""
DIGEST_SIZE = 32
"""Bytes in a BLAKE3 digest."""
MAX_BLOB_SIZE = 64 << 30
"""Bytes in the largest blob; bounds a chunk list to 2 MiB."""
MAX_MANIFEST_SIZE = 8 << 20
"""Bytes in the largest serialized Manifest."""
MAX_INLINE_SIZE = 64 << 10
"""Bytes in the largest blob that travels inside of StartUpload."""
MAX_STREAM_BYTES = 64 << 20
"""Bytes one bulk stream carries before it ends normally."""
MAX_PROBE_BYTES = 32 << 20
"""Bytes one probe of the line moves."""
MAX_MESSAGE_BYTES = 4 << 20
"""Bytes in the largest gRPC message (gRPC's own default, kept as the guard)."""

ChunkList = bytes | mmap.mmap
"""The digests of a blob's chunks, one after the other; a mapped file where a long one would take memory."""


@dataclass(frozen=True, slots=True)
class BlobRef:
    """Name and size of a blob; see `fedlink.v1.BlobRef`."""

    digest: bytes
    size: int

    def __str__(self) -> str:
        return f"{self.digest.hex()[:12]} ({self.size} bytes)"


def chunk_digest(chunk: Buffer) -> bytes:
    """BLAKE3 of one chunk."""
    return blake3.blake3(chunk).digest()


def digest_of_chunks(chunk_digests: ChunkList) -> bytes:
    """The digest of the blob whose chunk digests, concatenated, are these."""
    return blake3.blake3(chunk_digests).digest()


def is_list_of(chunk_digests: ChunkList, ref: BlobRef) -> bool:
    """Whether a chunk list has the length that the blob's size asks for, and gives its digest."""
    return len(chunk_digests) == DIGEST_SIZE * chunk_count(ref.size) and digest_of_chunks(chunk_digests) == ref.digest


def first_bad_chunk(data: Buffer, offset: int, chunk_digests: bytes) -> int | None:
    """Offset in the blob of the first chunk in `data` that is not as the list says; None if all are.

    Args:
        data: whole chunks, the last of which may be the blob's last.
        offset: where `data` begins in the blob; a multiple of CHUNK_SIZE.
        chunk_digests: the list of the whole blob.
    """
    view = memoryview(data)
    for at, length in chunk_spans(offset, offset + len(view)):
        entry = at // CHUNK_SIZE * DIGEST_SIZE
        start = at - offset
        if chunk_digest(view[start : start + length]) != chunk_digests[entry : entry + DIGEST_SIZE]:
            return at
    return None


def blob_digest(data: Buffer) -> bytes:
    """The digest of a blob held in memory (manifests, tests)."""
    return digest_of_chunks(chunk_digests_of(data))


def chunk_digests_of(data: Buffer) -> bytes:
    """The concatenated chunk digests of a blob held in memory."""
    view = memoryview(data)
    return b"".join(chunk_digest(view[at : at + CHUNK_SIZE]) for at in range(0, len(view), CHUNK_SIZE))


def ref_of(data: Buffer) -> BlobRef:
    """The BlobRef of a blob held in memory."""
    return BlobRef(blob_digest(data), len(data))


def chunk_count(size: int) -> int:
    """Number of chunks in a blob of `size` bytes."""
    return -(-size // CHUNK_SIZE)


def chunk_spans(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield `(offset, length)` for each chunk of the range [start, stop); `start` is a multiple of CHUNK_SIZE."""
    for at in range(start, stop, CHUNK_SIZE):
        yield at, min(CHUNK_SIZE, stop - at)


@dataclass(slots=True)
class ChunkHasher:
    """Names a blob that is written piece by piece, in order.

    Feed pieces of any size to `update`; `finish` gives the reference and
    `chunk_digests` the list.
    """

    size: int = 0
    _digests: bytearray = field(default_factory=bytearray)
    _open: blake3.blake3 = field(default_factory=blake3.blake3)

    def update(self, data: Buffer) -> None:
        """Append bytes."""
        view = memoryview(data).cast("B")
        while len(view):
            room = CHUNK_SIZE - self.size % CHUNK_SIZE
            part = view[:room]
            self._open.update(part)
            self.size += len(part)
            view = view[room:]
            if self.size % CHUNK_SIZE == 0:
                self._close_chunk()

    def finish(self) -> BlobRef:
        """Close the last chunk and name the blob. Call once."""
        if self.size % CHUNK_SIZE:
            self._close_chunk()
        return BlobRef(digest_of_chunks(bytes(self._digests)), self.size)

    @property
    def chunk_digests(self) -> bytes:
        """Concatenated digests of the chunks closed so far."""
        return bytes(self._digests)

    def _close_chunk(self) -> None:
        self._digests += self._open.digest()
        self._open = blake3.blake3()


class ChunkChecker:
    """Compares a blob that is read piece by piece with its list: in order, beginning where a chunk does.

    Attributes:
        position: where the next piece begins.

    Args:
        chunk_digests: the list of the whole blob, which `is_list_of` has approved.
        size: bytes in the blob.
        position: a multiple of CHUNK_SIZE.
    """

    def __init__(self, chunk_digests: ChunkList, size: int, position: int = 0) -> None:
        self.position = position
        self._digests = chunk_digests
        self._size = size
        self._open = blake3.blake3()

    @property
    def complete(self) -> int:
        """Chunks of the blob that lie before `position` whole."""
        whole = self.position if self.position < self._size else self.position + CHUNK_SIZE - 1
        return whole // CHUNK_SIZE

    @property
    def missing(self) -> int:
        """Bytes of the open chunk that are still to come before anything can be said of it; 0 if none is open."""
        begun = self.position % CHUNK_SIZE
        return min(CHUNK_SIZE - begun, self._size - self.position) if begun else 0

    def update(self, data: Buffer) -> int | None:
        """Take the bytes from `position` on; offset of the first chunk that ends here and is not as the list says."""
        view = memoryview(data).cast("B")
        while len(view):
            part = view[: CHUNK_SIZE - self.position % CHUNK_SIZE]
            self._open.update(part)
            self.position += len(part)
            view = view[len(part) :]
            if self.position % CHUNK_SIZE == 0 or self.position == self._size:
                entry = (self.position - 1) // CHUNK_SIZE
                digest, self._open = self._open.digest(), blake3.blake3()
                if digest != self._digests[entry * DIGEST_SIZE : (entry + 1) * DIGEST_SIZE]:
                    return entry * CHUNK_SIZE
        return None
