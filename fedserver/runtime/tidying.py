"""What a run leaves behind and must not keep: the updates of rounds that are over, and old versions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from fedlink import log as logs
from fedlink.failpoints import reach
from fedserver.rounds.model import Round
from fedserver.runtime import records
from fedserver.runtime.parts import Parts
from fedserver.runtime.passing import may_pass
from fedserver.runtime.versions import READ_SECONDS
from fedserver.store.disk import is_disk
from fedserver.store.rows import RunRow

_TRY_AGAIN_SECONDS = 5.0


class Tidying:
    """Deletes for one run. Nothing waits for it, and what may go well later is tried again.

    Args:
        run: whose leavings these are.
        parts: the rest of the server.
    """

    def __init__(self, run: RunRow, parts: Parts) -> None:
        self._run_id = run.id
        self._parts = parts
        self._tasks: set[asyncio.Task[None]] = set()
        self._log = logs.get("rounds").bind(run=run.name)

    async def drop_updates(self, ended: Round) -> None:
        """Delete everything that was uploaded for a round."""
        try:
            await self._drop_updates(ended)
        except Exception as e:
            if not may_pass(e):
                raise
            self._say(e, "updates not deleted")
            self._begin(self._drop_later(ended))

    def retire(self) -> None:
        """Retire versions, on a task of its own: it waits for `blobs_lock`, whose holder may wait for the driver's."""
        self._begin(self._retire())

    @property
    def idle(self) -> bool:
        """Whether nothing is left to delete."""
        return not self._tasks

    async def close(self) -> None:
        """Stop; the next start sweeps what is left."""
        for task in list(self._tasks):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drop_updates(self, ended: Round) -> None:
        uploads = await self._parts.database.run(lambda c: records.forget_updates(c, self._run_id, ended))
        reach("updates.forgotten")
        try:
            await self._parts.versions.forget_uploads(uploads)
        except OSError:
            # The next start sweeps them; the run must not wait for that.
            self._log.exception("updates not deleted", round=ended.number)

    async def _drop_later(self, ended: Round) -> None:
        refused = True
        while refused:
            await asyncio.sleep(_TRY_AGAIN_SECONDS)
            try:
                await self._drop_updates(ended)
            except Exception as e:  # noqa: BLE001 - logged; the next start deletes them, too
                refused = may_pass(e)
                if not refused:
                    self._say(e, "updates not deleted")
            else:
                refused = False

    async def _retire(self) -> None:
        spared, said = True, False
        while spared:
            pause = READ_SECONDS
            try:
                spared = await self._parts.versions.retire(self._run_id)
            except Exception as e:  # noqa: BLE001 - logged; the next version, or the next start, retires them, too
                if not said:
                    self._say(e, "versions not retired")
                if not may_pass(e):
                    return
                pause, said = _TRY_AGAIN_SECONDS, True
            if spared:
                await asyncio.sleep(pause)

    def _say(self, error: Exception, what: str) -> None:
        # What the disk refuses, it has logged itself.
        if not is_disk(error):
            self._log.error(what, exc_info=error)
