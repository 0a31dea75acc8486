"""The making of a run's next version, over and over while something that may pass is in its way."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

from fedlink import log as logs
from fedserver.rounds.model import Round
from fedserver.runtime.passing import may_pass
from fedserver.store.disk import is_disk

_TRY_AGAIN_SECONDS = 5.0


class Aggregation:
    """One attempt at a time, on a task of its own. The updates stay until an attempt has come to something.

    Args:
        run: its name, for the log.
        make: makes the version of a round and commits it.
        settle: decides what becomes of the round after an error that will not pass.

    Attributes:
        obstacle: what is in the way now, for people; empty if nothing is.
    """

    def __init__(
        self,
        run: str,
        make: Callable[[Round], Awaitable[None]],
        settle: Callable[[Round, Exception], Awaitable[None]],
    ) -> None:
        self.obstacle = ""
        self._make = make
        self._settle = settle
        self._task: asyncio.Task[None] | None = None
        self._since = 0.0
        self._of = (0, 0)
        self._closed = False
        self._log = logs.get("rounds").bind(run=run)

    def begin(self, current: Round) -> None:
        """Make a round's version, unless that is under way or the server ends."""
        if not self.under_way and not self._closed:
            if self._of != (current.number, current.attempt):
                self._of, self.obstacle = (current.number, current.attempt), ""
            self._since = time.monotonic()
            self._task = asyncio.create_task(self._attempt(current))

    @property
    def under_way(self) -> bool:
        """Whether there is an attempt."""
        return self._task is not None and not self._task.done()

    @property
    def seconds(self) -> float:
        """How long the newest attempt has taken so far."""
        return time.monotonic() - self._since

    async def close(self) -> None:
        """Stop; nothing that is committed is lost."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _attempt(self, current: Round) -> None:
        try:
            try:
                await self._make(current)
                self.obstacle = ""
            except Exception as e:
                if may_pass(e):
                    raise
                await self._settle(current, e)
        except Exception as e:  # noqa: BLE001 - what may pass, and a verdict that could not be written
            self._note(current, e)
            await asyncio.sleep(_TRY_AGAIN_SECONDS)

    def _note(self, current: Round, error: Exception) -> None:
        text = f"the next version cannot be made now ({type(error).__name__}: {(str(error) or '-').splitlines()[0]})"
        text += f"; that is tried again every {_TRY_AGAIN_SECONDS:g} s"
        # What the disk refuses, it has logged itself.
        if text != self.obstacle and not is_disk(error):
            self._log.error("aggregation held up", round=current.number, exc_info=error)
        self.obstacle = text
