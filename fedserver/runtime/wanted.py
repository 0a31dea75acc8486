"""Long work on a thread, which ends soon after nobody waits for it any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from fedlink.batches import settled

T = TypeVar("T")

Unwanted = Callable[[], bool]
"""Asked before each step of long work: whether nobody waits for it any more."""


async def while_wanted(work: Callable[[Unwanted], T]) -> T:
    """Run blocking `work` on a thread until it is done, or has seen that its caller was cancelled.

    A thread cannot be cancelled, and a server that is told to stop waits for every one that it has.
    """
    over = threading.Event()
    thread = asyncio.get_running_loop().run_in_executor(None, work, over.is_set)
    try:
        await asyncio.wait([thread])
    finally:
        over.set()
        await settled(thread)
    return thread.result()
