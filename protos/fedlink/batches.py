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

from fedlink.blobs import CHUNK_SIZE, chunk_spans
from fedlink.files import Buffer
from fedlink.rpc import chunk_message

BATCH_CHUNKS = 4
"""Chunks handed to the disk at once, at most."""


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
    read_into: Callable[[memoryview, int], None],
    start: int,
    stop: int,
    executor: Executor | None = None,
    *,
    batch: Callable[[], int],
) -> AsyncGenerator[list[tuple[int, bytes]], None]:
    """Yield the chunks of [start, stop) in batches, as `(offset of the end, serialized chunk message)`.

    Close it (`contextlib.aclosing`) before closing what `read_into` reads from.

    Args:
        read_into: fills a buffer from an offset; runs in a thread.
        start: a multiple of CHUNK_SIZE.
        stop: end of the blob, or a multiple of CHUNK_SIZE.
        executor: where `read_into` runs; the loop's own by default.
        batch: how many chunks to read at once; asked each time.

    Raises:
        Exception: whatever `read_into` raises.
    """
    loop = asyncio.get_running_loop()
    buffer = memoryview(bytearray())

    def read(at: int, size: int) -> list[tuple[int, bytes]]:
        nonlocal buffer
        if len(buffer) != size:
            buffer = memoryview(bytearray(size))
        read_into(buffer, at)
        spans = chunk_spans(at, at + size)
        return [(offset + n, chunk_message(offset, buffer[offset - at : offset - at + n])) for offset, n in spans]

    def begin(at: int) -> tuple[int, asyncio.Future[list[tuple[int, bytes]]]]:
        size = min(batch() * CHUNK_SIZE, stop - at)
        return at + size, loop.run_in_executor(executor, read, at, size)

    ahead = begin(start) if start < stop else None
    try:
        while ahead:
            following, reading = ahead
            messages = await asyncio.shield(reading)
            ahead = begin(following) if following < stop else None
            yield messages
    finally:
        if ahead:
            await settled(ahead[1])


class WriteBehind:
    """Hands consecutive chunks to a blocking function in a thread, in order; an async context manager.

    A batch is whatever came while the one before was being written, so a slow peer's chunks are written one by one
    and a fast peer's in batches. Leaving the context waits for the thread, but drops what it has not begun: `flush`.
    """

    def __init__(
        self,
        write: Callable[[int, Sequence[Buffer]], int],
        start: int,
        executor: Executor | None = None,
        *,
        batch: Callable[[], int],
    ) -> None:
        self.position = start
        """Where the next chunk has to begin."""
        self.written = start
        """What `write` returned last: everything before it is safe."""
        self._write = write
        self._executor = executor
        self._batch = batch
        self._pending: list[Buffer] = []
        self._running: asyncio.Future[int] | None = None
        self._error: BaseException | None = None

    async def put(self, chunk: Buffer) -> None:
        """Take the chunk at `position`; waits only when two batches are full.

        Raises:
            Exception: whatever `write` raised for an earlier chunk.
        """
        if self._running and len(self._pending) >= self._batch():
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
        if running := self._running:
            try:
                await settled(running)
            finally:
                # A batch that was over already may not have been noted yet.
                self._finished(running)
