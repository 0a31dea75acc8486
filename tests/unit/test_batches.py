"""Chunks on their way between an event loop and a disk."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

from fedlink.batches import WriteBehind
from fedlink.blobs import Buffer


async def test_a_batch_that_ends_while_its_writer_is_leaving_counts_as_written() -> None:
    gate = threading.Event()

    def write(offset: int, chunks: Sequence[Buffer]) -> int:
        gate.wait()
        return offset + sum(len(c) for c in chunks)

    async with WriteBehind(write, 0, batch=lambda: 4) as behind:
        await behind.put(b"chunk")
        gate.set()
        time.sleep(0.1)
        await asyncio.sleep(0)
    assert behind.written == len(b"chunk")
