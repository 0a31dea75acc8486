"""The updates that come first in a round, added up while other sites are still out.

When the last site has sent its update, what it has to wait for is so much shorter. All of
this is a cache, as `fedserver.aggregation.prefix` has it: the version has the same bits without
it, and whatever is in its way ends it for this attempt at the round.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from fedlink import log as logs
from fedlink.errors import FedlinkError
from fedlink.manifest import Manifest
from fedserver.aggregation.pipeline import SummingReducer
from fedserver.aggregation.prefix import PrefixSums
from fedserver.aggregation.presets import pipeline_for
from fedserver.rounds.model import Round
from fedserver.runtime import records
from fedserver.runtime.footprint import max_update_bytes, next_version_bytes, sums_bytes
from fedserver.runtime.parts import Parts
from fedserver.runtime.wanted import Unwanted, step_back, while_wanted
from fedserver.store.queries import tasks as task_queries
from fedserver.store.rows import RunRow

LEAST = 4
"""Updates that a pass is worth: its sums cost as much to read as two updates, and as two more to write."""
PATIENCE = 1.0
"""Seconds for which so many are there first: where all sites send at once, the processors have better things to do."""
_NICE = 10
"""Behind those that hash and check what the other sites send."""


class EarlyFold:
    """Adds up for one run. One pass at a time in the whole server, on a thread of its own.

    Args:
        run: whose rounds these are.
        parts: the rest of the server.
        ask_again: called in a round with what is wrong with an update; whether its site is asked for it again.
    """

    def __init__(self, run: RunRow, parts: Parts, ask_again: Callable[[Round, FedlinkError], Awaitable[bool]]) -> None:
        self._run_id = run.id
        self._spec = run.parsed
        self._reducer = pipeline_for(self._spec).reducer
        self._parts = parts
        self._ask_again = ask_again
        self._of = (0, 0)
        self._given_up = False
        self._ready: float | None = None
        self._sums: PrefixSums | None = None
        self._pass: asyncio.Task[None] | None = None
        self._cleaning: set[asyncio.Task[None]] = set()
        self._log = logs.get("rounds").bind(run=run.name)

    def consider(self, run: RunRow, current: Round) -> None:
        """Begin if it pays; for every tick of a round that collects.

        Args:
            run: its row now.
            current: the round.
        """
        if self._of != (current.number, current.attempt):
            self.drop()
            self._of, self._given_up = (current.number, current.attempt), False
        if self._given_up or self._parts.disk.trouble:
            # Somebody else may need the room.
            self.drop()
        elif isinstance(self._reducer, SummingReducer) and not self._busy:
            first = current.first
            if len(first) - (self._sums.count if self._sums else 0) < LEAST:
                self._ready = None
            elif self._ready is None:
                self._ready = time.monotonic()
            elif time.monotonic() - self._ready >= PATIENCE:
                self._ready = None
                self._sums = self._sums or self._parts.versions.new_sums(f"early-{run.id}-{current.number}")
                self._pass = asyncio.create_task(self._go(run, current, frozenset(first), self._sums, self._reducer))

    @property
    def _busy(self) -> bool:
        """Whether this run adds up, or another one does."""
        return self._parts.adding_up.locked() or (self._pass is not None and not self._pass.done())

    async def taken(self) -> PrefixSums | None:
        """Hand over what there is, and end the pass that is under way; whoever has it drops it."""
        if self._pass is not None:
            self._pass.cancel()
            await asyncio.wait([self._pass])
        sums, self._sums = self._sums, None
        return sums

    def drop(self) -> None:
        """Throw away what there is, soon."""
        running, sums = self._pass, self._sums
        self._pass = self._sums = self._ready = None
        if sums is not None:
            if running is not None:
                running.cancel()
            task = asyncio.create_task(_clean(running, sums))
            self._cleaning.add(task)
            task.add_done_callback(self._cleaning.discard)

    async def close(self) -> None:
        """Stop, and leave nothing."""
        self.drop()
        for task in list(self._cleaning):
            await task

    async def _go(
        self, run: RunRow, current: Round, first: frozenset[str], sums: PrefixSums, reducer: SummingReducer
    ) -> None:
        try:
            async with self._parts.adding_up:
                try:
                    self._given_up = not await self._add(run, current, first, sums, reducer)
                except FedlinkError as e:
                    self._given_up = not await self._ask_again(current, e)
        except Exception as e:  # noqa: BLE001 - the version is made without it, and says then what is wrong
            self._given_up = True
            self._log.warning("not folded early", round=current.number, because=str(e) or type(e).__name__)

    async def _add(
        self, run: RunRow, current: Round, first: frozenset[str], sums: PrefixSums, reducer: SummingReducer
    ) -> bool:
        """Add what the sums lack of the first updates; false if there is no room."""
        started = time.monotonic()
        accepted, base = await self._parts.database.run(lambda c: records.aggregation_inputs(c, run, current))
        tasks = [t for t in accepted if t.client in first][sums.count :]
        uploads = await self._parts.database.run(lambda c: task_queries.task_uploads(c, [t.id for t in tasks]))
        model = await self._parts.access.model_manifest(base.digest)
        out = sum(not t.state.final for t in current.tasks.values())

        def work(unwanted: Unwanted) -> bool:
            if not self._has_room(model, out, sums):
                return False
            updates = self._parts.versions.contributions(tasks, uploads)
            sums.add(model, updates, reducer, unwanted=unwanted)
            return True

        with ThreadPoolExecutor(1, "early", partial(step_back, _NICE)) as thread:
            done = await while_wanted(work, thread)
        if done:
            seconds = round(time.monotonic() - started, 3)
            self._log.info("folded early", round=current.number, updates=len(tasks), still_out=out, seconds=seconds)
        return done

    def _has_room(self, model: Manifest, out: int, sums: PrefixSums) -> bool:
        """Whether there is room besides what the round still has to write."""
        needed = next_version_bytes(model) + out * max_update_bytes(model, self._spec)
        return self._parts.disk.room >= needed + sums_bytes(model) - sums.size


async def _clean(running: asyncio.Task[None] | None, sums: PrefixSums) -> None:
    if running is not None:
        await asyncio.wait([running])
    await asyncio.to_thread(sums.drop)
