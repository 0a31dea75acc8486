"""Chunks between an event loop and a disk: read ahead, written behind, a few at a time.

A hop to a thread for each chunk costs 30-50 % more CPU than one for a few, and waiting
for the disk before taking the next message halves the rate; so while one batch is on
the disk the next one is on the wire. Memory is bounded by two batches a stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor
from types import TracebackType
from typing import Any, Self

from fedlink.blobs import CHUNK_SIZE, Buffer, chunk_spans
from fedlink.rpc import chunk_message

BATCH_CHUNKS = 4
"""Chunks handed to the disk at once, at most."""
_BATCH_BYTES = BATCH_CHUNKS * CHUNK_SIZE


async def settled(future: asyncio.Future[Any]) -> None:
    """Wait until a future is over, even through cancellations, which then follow.

    A thread cannot be cancelled: what it works on must stay open until it is done. The future's own error, if any,
    counts as seen.
    """
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as e:
            cancelled = e
    if not future.cancelled():
        future.exception()
    if cancelled:
        raise cancelled


async def read_ahead(
    read_into: Callable[[memoryview, int], None], start: int, stop: int, executor: Executor | None = None
) -> AsyncGenerator[list[tuple[int, bytes]], None]:
    """Yield the chunks of [start, stop) in batches, as `(offset of the end, serialized chunk message)`.

    Close it (`contextlib.aclosing`) before closing what `read_into` reads from.

    Args:
        read_into: fills a buffer from an offset; runs in a thread.
        start: a multiple of CHUNK_SIZE.
        stop: end of the blob, or a multiple of CHUNK_SIZE.
        executor: where `read_into` runs; the loop's own by default.

    Raises:
        Exception: whatever `read_into` raises.
    """
    loop = asyncio.get_running_loop()
    buffer = memoryview(bytearray(min(_BATCH_BYTES, stop - start)))

    def read(at: int) -> list[tuple[int, bytes]]:
        view = buffer[: min(_BATCH_BYTES, stop - at)]
        read_into(view, at)
        spans = chunk_spans(at, at + len(view))
        return [(offset + n, chunk_message(offset, view[offset - at : offset - at + n])) for offset, n in spans]

    ahead: asyncio.Future[list[tuple[int, bytes]]] | None = None
    try:
        for at in range(start, stop, _BATCH_BYTES):
            ahead = ahead or loop.run_in_executor(executor, read, at)
            batch = await asyncio.shield(ahead)
            following = at + _BATCH_BYTES
            ahead = loop.run_in_executor(executor, read, following) if following < stop else None
            yield batch
    finally:
        if ahead:
            await settled(ahead)


class WriteBehind:
    """Hands consecutive chunks to a blocking function in a thread, in order; an async context manager.

    A batch is whatever came while the one before was being written, so a slow peer's chunks are written one by one
    and a fast peer's in batches. Leaving the context waits for the thread, but drops what it has not begun: `flush`.
    """

    def __init__(
        self, write: Callable[[int, Sequence[Buffer]], int], start: int, executor: Executor | None = None
    ) -> None:
        self.position = start
        """Where the next chunk has to begin."""
        self.written = start
        """What `write` returned last: everything before it is safe."""
        self._write = write
        self._executor = executor
        self._pending: list[Buffer] = []
        self._running: asyncio.Future[int] | None = None
        self._error: BaseException | None = None

    async def put(self, chunk: Buffer) -> None:
        """Take the chunk at `position`; waits only when two batches are full.

        Raises:
            Exception: whatever `write` raised for an earlier chunk.
        """
        if self._running and len(self._pending) >= BATCH_CHUNKS:
            await asyncio.wait([self._running])
        self._check()
        self._pending.append(chunk)
        self.position += len(chunk)
        if not self._running:
            self._submit()

    async def flush(self) -> int:
        """Wait until all that was put is written; what is safe then.

        Raises:
            Exception: whatever `write` raises.
        """
        while self._running:
            await asyncio.wait([self._running])
        self._check()
        return self.written

    def _check(self) -> None:
        if self._error:
            raise self._error

    def _submit(self) -> None:
        chunks, self._pending = self._pending, []
        offset = self.position - sum(len(c) for c in chunks)
        self._running = asyncio.get_running_loop().run_in_executor(self._executor, self._write, offset, chunks)
        self._running.add_done_callback(self._finished)

    def _finished(self, batch: asyncio.Future[int]) -> None:
        self._running = None
        self._error = asyncio.CancelledError() if batch.cancelled() else batch.exception()
        if self._error:
            return
        self.written = batch.result()
        if self._pending:
            self._submit()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._pending.clear()
        if self._running:
            await settled(self._running)
