"""How long nothing may move."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable


@contextlib.asynccontextmanager
async def stalling(seconds: float) -> AsyncIterator[Callable[[], None]]:
    """Give something to call whenever something moves; without a call for `seconds`, and a twentieth more, it ends.

    A call costs next to nothing, so that it can be made for each chunk.

    Raises:
        TimeoutError: nothing moved.
    """
    clock = asyncio.get_running_loop().time
    slack = seconds / 20
    known = clock()
    async with asyncio.timeout(seconds + slack) as deadline:

        def moved() -> None:
            nonlocal known
            now = clock()
            if now - known > slack:
                known = now
                deadline.reschedule(now + seconds + slack)

        yield moved
