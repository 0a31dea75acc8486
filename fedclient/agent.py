"""The daemon, put together: one process of a site.

    describe the workloads ▶ register ▶ go on with held tasks ▶ poll ⟲ ▶ drain ▶ deregister

`fedclient.desk` holds the tasks, `fedclient.work` sees one through.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedclient.desk import Desk
from fedclient.launch import Description, Trainer, TrainerFailed
from fedclient.patience import Patience
from fedclient.policy import Terms
from fedclient.pulse import Pulse
from fedclient.session import DeviceInfo, Session
from fedclient.settings import SiteSettings
from fedclient.spool import BlobCache, Spool
from fedclient.tools import Tools
from fedclient.transfer import Transfer
from fedlink.errors import FedlinkError, Reason

MakeTrainer = Callable[[SiteSettings, str, str, Path], Trainer]
"""Makes the trainer of a workload on a device, given a directory for its logs."""


class Agent:
    """One daemon process of a site.

    Args:
        site: its settings.
        make_trainer: how trainer processes are made.
        rng: source of jitter.
        patience: how long it waits for a server that says nothing; by default as the settings say.
    """

    def __init__(
        self,
        site: SiteSettings,
        *,
        make_trainer: MakeTrainer = Trainer,
        rng: random.Random | None = None,
        patience: Patience | None = None,
    ) -> None:
        self._site = site
        self._patience = patience or Patience.of(site.transfer_stall_after)
        self._rng = rng or random.Random()  # noqa: S311 - jitter, no secret
        self._trainers = Trainers(site, make_trainer)
        self._draining = asyncio.Event()
        self._pulse = Pulse(site.state_dir)

    def drain(self) -> None:
        """Take no further task, let uploads finish, hand the rest back, and let `run` return."""
        self._pulse.phase = "draining"
        self._draining.set()

    async def run(self) -> None:
        """Serve the server until drained.

        Raises:
            FedlinkError: the configuration is wrong, or the server refuses this site for good.
        """
        spool = Spool(self._site.state_dir)
        disk = ThreadPoolExecutor(1, "fedclient-spool")
        try:
            async with contextlib.AsyncExitStack() as stack:
                await stack.enter_async_context(self._pulse.beating())
                stack.push_async_callback(self._trainers.close)
                desk = await self._unless_draining(self._open(spool, disk, stack))
                if desk:
                    await desk.serve(self._draining)
        finally:
            disk.shutdown()
            spool.close()

    async def _open(self, spool: Spool, disk: ThreadPoolExecutor, stack: contextlib.AsyncExitStack) -> Desk:
        terms, devices = await self._trainers.describe()
        offers = [t.offer for t in terms.values()]
        session = await stack.enter_async_context(
            Session(self._site, offers, devices, rng=self._rng, patience=self._patience)
        )
        self._pulse.phase = "looking for the server"
        await session.open()
        self._pulse.phase = "serving"
        cache = BlobCache(self._site.state_dir / "cache", self._site.cache_limit, spool.recycler)
        tools = Tools(session, spool, Transfer(session, cache), disk, self._rng, self._site.name)
        return Desk(tools, terms, self._trainers, self._site.devices)

    async def _unless_draining(self, opening: Coroutine[object, object, Desk]) -> Desk | None:
        task, draining = asyncio.create_task(opening), asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait({task, draining}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for pending in (task, draining):
                pending.cancel()
            await asyncio.gather(task, draining, return_exceptions=True)


class Trainers:
    """The trainer processes of a site: one for each workload on each device, made when first needed.

    Args:
        site: its settings.
        make_trainer: how trainer processes are made.
    """

    def __init__(self, site: SiteSettings, make_trainer: MakeTrainer) -> None:
        self._site = site
        self._make = make_trainer
        self._trainers: dict[tuple[str, str], Trainer] = {}
        self._resolved: dict[str, DeviceInfo] = {}

    async def describe(self) -> tuple[dict[str, Terms], list[DeviceInfo]]:
        """Ask every workload what it offers: the site's terms for each, and the devices.

        Raises:
            FedlinkError: BAD_CONFIG, naming the workload whose class cannot be used.
        """
        names, device = sorted(self._site.workload), self._site.devices[0]
        descriptions = await asyncio.gather(*(self._describe(name, device) for name in names))
        terms = {
            name: Terms.of(name, self._site.workload[name], description)
            for name, description in zip(names, descriptions, strict=True)
        }
        known = {d.name: DeviceInfo(d.name, d.model, d.memory_bytes) for d in descriptions[0].devices}
        for configured in self._site.devices:
            # The trainer says first what the device it was given stands for.
            stands_for = next(iter(known.values())) if configured == device and known else DeviceInfo(configured)
            self._resolved[configured] = known.get(configured, stands_for)
        return terms, list(self._resolved.values())

    async def get(self, workload: str, device: str) -> Trainer:
        """The trainer of a workload on a device; other workloads leave an accelerator first, for its memory."""
        if self._resolved[device].name != "cpu":
            others = [(name, at) for name, at in self._trainers if at == device and name != workload]
            await asyncio.gather(*(self._trainers.pop(key).close() for key in others))
        return self._trainer(workload, device)

    async def close(self) -> None:
        """End every process."""
        await asyncio.gather(*(t.close() for t in self._trainers.values()))

    def _trainer(self, workload: str, device: str) -> Trainer:
        key = workload, device
        if key not in self._trainers:
            self._trainers[key] = self._make(self._site, workload, device, self._site.state_dir / "trainers")
        return self._trainers[key]

    async def _describe(self, workload: str, device: str) -> Description:
        try:
            return await self._trainer(workload, device).describe()
        except TrainerFailed as e:
            said = e.output.strip().partition("\n")[0]
            raise FedlinkError(Reason.BAD_CONFIG, f"{e.message}{': ' if said else ''}{said}") from None
