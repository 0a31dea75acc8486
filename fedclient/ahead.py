"""The files of an update, named and sent while the trainer writes the ones after them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fedclient.arrivals import Arrivals
from fedclient.spool import Order
from fedclient.transfer import OnBytes, Transfer
from fedclient.update import LocalBlob
from fedlink import log
from fedlink.errors import FedlinkError
from fedlink.failpoints import reach


class Ahead:
    """Names each file of an update as soon as it is whole, and sends it, but for the last.

    The last one waits, so that no update is at the server before the journal knows of it.
    Nothing that goes wrong here is an error: what was not sent is sent with the whole update.

    Args:
        transfer: sends.
        order: the task.
        update_dir: where the files are written.
        files: names and about the sizes of all of them, in canonical order.
        on_bytes: told how far the sending is.

    Attributes:
        named: the files that have been named, by file name.
        sent: those that the server has.
    """

    def __init__(
        self, transfer: Transfer, order: Order, update_dir: Path, files: dict[str, int], on_bytes: OnBytes
    ) -> None:
        self.named: dict[str, LocalBlob] = {}
        self.sent: list[LocalBlob] = []
        self._transfer = transfer
        self._order = order
        self._update_dir = update_dir
        self._left = dict(files)
        self._last = next(reversed(files), "")
        self._total = sum(files.values())
        self._on_bytes = on_bytes
        self._written, self._ready = Arrivals(), Arrivals()
        self._parts: list[asyncio.Task[None]] = []

    def wrote(self, name: str) -> None:
        """A file is whole. A name that is not one of the update's is passed over, or one that was told before."""
        if self._left.pop(name, None) is None:
            return
        self._written.add(name)
        if not self._parts:
            self._parts = [asyncio.create_task(part) for part in (self._name_all(), self._send_all())]
        if not self._left:
            self._written.end()

    async def finish(self) -> None:
        """Wait until everything that was written is named, and sent as far as that goes."""
        self._written.end()
        if self._parts:
            await asyncio.wait(self._parts)

    async def stop(self) -> None:
        """End at once."""
        for part in self._parts:
            part.cancel()
        await asyncio.gather(*self._parts, return_exceptions=True)

    async def _name_all(self) -> None:
        try:
            async for name in self._written:
                self.named[name] = await asyncio.to_thread(LocalBlob.of, self._update_dir / name)
                if name != self._last:
                    self._ready.add(name)
        except OSError as e:
            _say(e)
        finally:
            self._ready.end()

    async def _send_all(self) -> None:
        size, limit = 0, self._order.max_update_bytes
        try:
            async for name in self._ready:
                blob = self.named[name]
                size += blob.ref.size
                if limit and max(size, self._total) > limit:
                    return
                await self._transfer.send_shard(self._order.token, blob, self._shifted(size - blob.ref.size))
                self.sent.append(blob)
                reach("update.ahead")
        except (FedlinkError, OSError) as e:
            _say(e)

    def _shifted(self, before: int) -> OnBytes:
        return lambda done, _size: self._on_bytes(before + done, self._total)


def _say(error: FedlinkError | OSError) -> None:
    log.get("task").info("the update is sent once it is whole, as sending its parts ahead failed", error=str(error))
