"""Names of files that come one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator


class Arrivals:
    """Names of files, each told once its file is whole; may be gone through again, from the first one on."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._ended = False
        self._changed = asyncio.Event()

    def add(self, name: str) -> None:
        """One more is there."""
        self._names.append(name)
        self._changed.set()

    def end(self) -> None:
        """No other will come."""
        self._ended = True
        self._changed.set()

    async def __aiter__(self) -> AsyncIterator[str]:
        """Every name, in the order in which they came; waits for those to come."""
        at = 0
        while True:
            if at < len(self._names):
                yield self._names[at]
                at += 1
            elif self._ended:
                return
            else:
                self._changed.clear()
                await self._changed.wait()
