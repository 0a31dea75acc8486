"""The tasks a registered daemon holds, and the devices it gives them.

A device computes one task at a time; the rest wait at the server. Delivering an update
needs no device, so the next task may compute meanwhile, as long as not too many updates
wait to be sent.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

from fedclient.computing import TrainerHandle
from fedclient.policy import Terms
from fedclient.session import TaskFailure
from fedclient.spool import Held, Order, Stage
from fedclient.tools import Tools
from fedclient.work import TASK_OVER, Work
from fedlink import log
from fedlink.errors import FedlinkError, Reason
from fedlink.failpoints import reach

POLL_WAIT = 30.0
"""Seconds one poll waits at the server, if it allows so much."""
DRAIN_PATIENCE = 30.0
"""Seconds without progress after which a draining daemon leaves an upload to its next start."""
DEREGISTER_PATIENCE = 5.0
"""Seconds a stopping daemon waits for the server to take note."""
UNSENT_PER_DEVICE = 2
"""Updates that may wait to be sent, for each device, before no further task is fetched."""


class TrainerPool(Protocol):
    """Who computes; `fedclient.agent.Trainers`."""

    async def get(self, workload: str, device: str) -> TrainerHandle:
        """The trainer of a workload on a device."""


class Desk:
    """The tasks a registered daemon holds, and the devices it gives them.

    Args:
        tools: what every task works with.
        terms: the site's terms, by workload.
        trainers: who computes.
        devices: one task each.
    """

    def __init__(self, tools: Tools, terms: Mapping[str, Terms], trainers: TrainerPool, devices: Sequence[str]) -> None:
        self._tools = tools
        self._terms = terms
        self._trainers = trainers
        self._log = log.get("agent").bind(client=tools.client)
        self._works: dict[bytes, Work] = {}
        self._running: dict[bytes, asyncio.Task[None]] = {}
        self._backlog: deque[Work] = deque()
        self._asked_again: set[bytes] = set()
        self._said: set[tuple[str, str]] = set()
        self._ended = asyncio.Event()
        self._unsent_limit = UNSENT_PER_DEVICE * len(devices)
        self._free: asyncio.Queue[str] = asyncio.Queue()
        for device in devices:
            self._free.put_nowait(device)

    async def serve(self, draining: asyncio.Event) -> None:
        """Work until drained, then end the session.

        Raises:
            FedlinkError: the server refuses this site for good.
        """
        try:
            async with asyncio.TaskGroup() as group:
                await self._go_on_with_held(group)
                aside = self._dispatch(group), self._confirm_completed(group), self._tools.spool.recycler.expiring()
                idle = [group.create_task(part) for part in aside]
                await draining.wait()
                self._log.info("draining", tasks=len(self._running))
                for task in idle:
                    task.cancel()
                await self._drain()
        except BaseExceptionGroup as group_error:
            raise _first_error(group_error) from None
        with contextlib.suppress(FedlinkError, TimeoutError):
            async with asyncio.timeout(DEREGISTER_PATIENCE):
                await self._tools.session.deregister()

    async def _go_on_with_held(self, group: asyncio.TaskGroup) -> None:
        for held in await self._tools.on_disk(self._tools.spool.load):
            work = self._adopt(held)
            if held.stage is Stage.FETCHED:
                self._backlog.append(work)
            elif held.stage is Stage.TRAINED:
                self._start(group, work)

    async def _dispatch(self, group: asyncio.TaskGroup) -> None:
        while True:
            device = await self._free.get()
            work = self._backlog.popleft() if self._backlog else await self._next_work(group)
            self._start(group, work, device)

    async def _next_work(self, group: asyncio.TaskGroup) -> Work:
        session, clock = self._tools.session, asyncio.get_running_loop().time
        while True:
            await self._room_for_updates()
            asked = clock()
            polled = await session.poll(list(self._works), POLL_WAIT)
            await self._release(polled.released)
            if polled.order and (work := await self._take(group, polled.order)):
                return work
            nothing_new = polled.order is None and all(token in self._running for token in polled.released)
            if nothing_new and clock() - asked < 0.5:
                # An answer so early and so empty: whoever gives it must not be asked in a tight loop.
                await asyncio.sleep(max(polled.retry_after, self._tools.rng.random()))
            else:
                await asyncio.sleep(polled.retry_after)

    async def _take(self, group: asyncio.TaskGroup, order: Order) -> Work | None:
        known = self._works.get(order.token)
        if known and known.held.completed and order.token in self._running:
            # It is being handed in again, or its acceptance noted: once more after that, as the server asks only once.
            self._asked_again.add(order.token)
        elif known and known.held.completed:
            self._log.warning("the server lost an accepted update and asks for it again", task=known.short_name)
            known.reopen()
            self._start(group, known)
            return None
        if known:
            await asyncio.sleep(1.0)  # it is being worked on; who asks again must not make this loop tight
            return None
        held = Held(order=order)
        try:
            await self._tools.on_disk(self._tools.spool.put, held)
        except OSError as e:
            self._log.error("cannot keep a task: the disk refuses", error=e.strerror)
            failure = TaskFailure("unavailable", f"the site's disk: {e.strerror}", retryable=True)
            with contextlib.suppress(FedlinkError):
                await self._tools.session.fail(order.token, failure)
            return None
        reach("task.kept")
        return self._adopt(held)

    async def _release(self, tokens: Sequence[bytes]) -> None:
        for token in tokens:
            # Looked up each time: while one is being forgotten, another may end by itself.
            work = self._works.get(token)
            if token in self._running and work:
                work.status.changed.set()  # the next beat tells the task itself
            elif work:
                del self._works[token]
                await work.forget()

    async def _confirm_completed(self, group: asyncio.TaskGroup) -> None:
        # A server that lost its memory or its disk cache may have lost accepted updates: each is handed in once more.
        returned = self._tools.session.returned
        while True:
            await returned.wait()
            returned.clear()
            for token, work in self._works.items():
                if work.held.completed and token not in self._running:
                    self._start(group, work)

    def _adopt(self, held: Held) -> Work:
        work = Work(self._tools, held, self._terms.get(held.order.workload), self._say_dropped)
        self._works[held.token] = work
        return work

    def _start(self, group: asyncio.TaskGroup, work: Work, device: str | None = None) -> None:
        task = group.create_task(self._see_through(work, device))
        self._running[work.held.token] = task
        # Not at the end of the task itself: a cancellation may come at any of its steps, its last ones included.
        task.add_done_callback(lambda _: self._seen_through(work))

    def _seen_through(self, work: Work) -> None:
        del self._running[work.held.token]
        if work.gone:
            del self._works[work.held.token]
        if work.held.token in self._asked_again:
            self._asked_again.remove(work.held.token)
            self._tools.session.returned.set()
        self._ended.set()

    async def _see_through(self, work: Work, device: str | None) -> None:
        course = asyncio.create_task(self._advance(work, device))
        # Also of an accepted update: if the server has lost it, it may take long to send once more.
        lease = asyncio.create_task(work.keep_lease())
        try:
            await _until_over(course, lease)
        except FedlinkError as e:
            if e.reason not in TASK_OVER:
                raise
            self._log.info("dropped a task that is over", task=work.short_name, reason=e.message)
            await self._abandon(work, course)
        except Exception as e:  # noqa: BLE001 - a defect met in one task must not take the others along
            self._log.exception("a task met a defect of this program", task=work.short_name)
            with contextlib.suppress(FedlinkError):
                await work.fail(TaskFailure("unavailable", f"internal error: {type(e).__name__}", retryable=True))
            await self._abandon(work, course)
        finally:
            for part in (course, lease):
                part.cancel()
            await asyncio.gather(course, lease, return_exceptions=True)

    async def _advance(self, work: Work, device: str | None) -> None:
        failure = None
        try:
            if device is not None:
                try:
                    failure = await work.compute(partial(self._trainers.get, work.order.workload, device))
                finally:
                    self._free.put_nowait(device)
            if failure is None:
                failure = await work.deliver()
            if failure is not None:
                await work.fail(failure)
        finally:
            await work.leave()

    async def _abandon(self, work: Work, course: asyncio.Task[None]) -> None:
        await work.stop_trainer()
        course.cancel()
        await asyncio.wait({course})
        await work.forget()

    async def _room_for_updates(self) -> None:
        while sum(w.status.activity == "uploading" for w in self._running_works()) >= self._unsent_limit:
            self._ended.clear()
            await self._ended.wait()

    async def _drain(self) -> None:
        clock = asyncio.get_running_loop().time
        for work in self._running_works():
            if work.status.activity != "uploading":
                self._running[work.held.token].cancel()
        while self._running:
            if clock() - max(w.status.moved for w in self._running_works()) > DRAIN_PATIENCE:
                self._log.warning("left unsent updates to the next start", tasks=len(self._running))
                for task in self._running.values():
                    task.cancel()
            await asyncio.wait(self._running.values(), timeout=1.0)

    def _running_works(self) -> list[Work]:
        return [self._works[token] for token in self._running]

    def _say_dropped(self, workload: str, metric: str) -> None:
        # That a site keeps what its data are like is the rule, and no news.
        if not metric.startswith("data.") and (workload, metric) not in self._said:
            self._said.add((workload, metric))
            self._log.warning(
                "kept a metric on this site",
                workload=workload,
                metric=metric,
                to_allow=f"add it to `metrics` in [workload.{workload}] of site.toml",
            )


async def _until_over(course: asyncio.Task[None], lease: asyncio.Task[str]) -> None:
    await asyncio.wait({course, lease}, return_when=asyncio.FIRST_COMPLETED)
    if not course.done():
        raise FedlinkError(Reason.ROUND_CLOSED, lease.result())
    course.result()


def _first_error(error: BaseExceptionGroup[BaseException]) -> BaseException:
    first: BaseException = error.subgroup(FedlinkError) or error
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first
