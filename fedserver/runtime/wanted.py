"""Long work on a thread, which ends soon after nobody waits for it any more."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from fedlink.batches import settled

T = TypeVar("T")

Unwanted = Callable[[], bool]
"""Asked before each step of long work: whether nobody waits for it any more."""


def step_back(nice: int) -> None:
    """Let other threads go before this one: the larger `nice`, the more."""
    # Elsewhere the system sets the priority of whole processes only.
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


async def while_wanted(work: Callable[[Unwanted], T], executor: Executor | None = None) -> T:
    """Run blocking `work` on a thread until it is done, or has seen that its caller was cancelled.

    A thread cannot be cancelled, and a server that is told to stop waits for every one that it has.

    Args:
        work: what to run.
        executor: where; the loop's own by default.
    """
    over = threading.Event()
    thread = asyncio.get_running_loop().run_in_executor(executor, work, over.is_set)
    try:
        await asyncio.wait([thread])
    finally:
        over.set()
        await settled(thread)
    return thread.result()
