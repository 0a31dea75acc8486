"""What a run leaves behind and must not keep: the updates of rounds that are over, and old versions."""

from __future__ import annotations

import asyncio
import contextlib

from fedlink import log as logs
from fedlink.errors import FedlinkError
from fedlink.failpoints import reach
from fedserver.rounds.model import Round
from fedserver.runtime import records
from fedserver.runtime.parts import Parts
from fedserver.runtime.versions import READ_SECONDS
from fedserver.store.disk import is_disk
from fedserver.store.rows import RunRow


class Tidying:
    """Deletes for one run. Nothing waits for it, and what the disk refuses is tried again.

    Args:
        run: whose leavings these are.
        parts: the rest of the server.
    """

    def __init__(self, run: RunRow, parts: Parts) -> None:
        self._run_id = run.id
        self._parts = parts
        self._refused: dict[tuple[int, int], Round] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._log = logs.get("rounds").bind(run=run.name)

    async def drop_updates(self, ended: Round) -> None:
        """Delete everything that was uploaded for a round."""
        key = ended.number, ended.attempt
        try:
            uploads = await self._parts.database.run(lambda c: records.forget_updates(c, self._run_id, ended))
        except FedlinkError as e:
            if not is_disk(e):
                raise
            self._refused[key] = ended
            return
        reach("updates.forgotten")
        self._refused.pop(key, None)
        self._parts.access.forget(u.id for u in uploads)
        try:
            await self._parts.versions.forget_uploads(uploads)
        except OSError:
            # The next start sweeps them; the run must not wait for that.
            self._log.exception("updates not deleted", round=ended.number)

    async def again(self) -> None:
        """Try what the disk refused."""
        for ended in list(self._refused.values()):
            await self.drop_updates(ended)

    def retire(self) -> None:
        """Retire versions, on a task of its own: it waits for `blobs_lock`, whose holder may wait for the driver's."""
        task = asyncio.create_task(self._retire())
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def close(self) -> None:
        """Stop; the next start sweeps what is left."""
        for task in list(self._retiring):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _retire(self) -> None:
        try:
            spared = await self._parts.versions.retire(self._run_id)
            while spared:
                await asyncio.sleep(READ_SECONDS)
                spared = await self._parts.versions.retire(self._run_id)
        except Exception as e:  # noqa: BLE001 - tried again after the next version
            if not is_disk(e):
                self._log.exception("versions not retired")
