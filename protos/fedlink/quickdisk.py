"""Disk calls from an event loop: at once while the disk is quick, in a thread while it is not.

A megabyte in the page cache is hashed and written in half a millisecond; to have another
thread do it costs as much again, since the bytes move to another processor's cache. But a
disk may be made to wait for, and then the loop must not.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from fedlink.batches import settled

SLOW = 0.05
"""Seconds after which a call has shown that the disk is not quick."""
ASIDE = 5.0
"""So many seconds calls are made in a thread then."""

P = ParamSpec("P")
T = TypeVar("T")


class QuickDisk:
    """Makes blocking calls for a program whose event loop serves few; for one stream, one call at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._aside_until = -1.0

    async def do(self, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a call, and wait for its end even when cancelled: what it works on must stay open.

        Raises:
            Exception: whatever it raises.
        """
        began = self._clock()
        try:
            if began >= self._aside_until:
                return act(*args, **kwargs)
            calling = asyncio.get_running_loop().run_in_executor(None, functools.partial(act, *args, **kwargs))
            await settled(calling)
            return calling.result()
        finally:
            now = self._clock()
            if now - began > SLOW:
                self._aside_until = now + ASIDE
