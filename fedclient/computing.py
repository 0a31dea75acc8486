"""The first arrow of a task: the model is fetched, the trainer trains.

The trainer starts, builds its model and loads each shard while the ones after it are fetched; what
it has written of its update is sent while it writes the rest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from structlog.typing import FilteringBoundLogger

from fedclient.ahead import Ahead
from fedclient.arrivals import Arrivals
from fedclient.launch import FailReason, Job, JobKind, Progress, Result, TrainerFailed, Write
from fedclient.policy import Terms
from fedclient.session import BACKOFF
from fedclient.spool import Order, refuses
from fedclient.status import Status
from fedclient.tools import Tools
from fedclient.update import update_files
from fedlink import log
from fedlink.failpoints import reach
from fedlink.manifest import Manifest
from fedlink.tensors import Kind

SEARCHES = 16
"""Processes that one measurement may cost: the system may kill what takes too much memory."""


class TrainerHandle(Protocol):
    """What is used of `fedclient.launch.Trainer`."""

    async def run(
        self,
        job: Job,
        on_progress: Callable[[Progress], None],
        *,
        shards: AsyncIterable[str],
        on_file: Callable[[str], None],
    ) -> Result:
        """Do one job; see there."""

    async def cancel(self) -> None:
        """Stop the job under way."""


GetTrainer = Callable[[], Awaitable[TrainerHandle]]
"""Gives the trainer of a task's workload on the device the task was given."""


class Computation:
    """One task being computed.

    Args:
        tools: the daemon's.
        order: what the server asked for.
        terms: the site's, for its workload.
        status: told how far it is.
        logger: of the task.

    Attributes:
        ahead: what has been named and sent of the update, once it is computed.
    """

    def __init__(self, tools: Tools, order: Order, terms: Terms, status: Status, logger: FilteringBoundLogger) -> None:
        self.ahead: Ahead | None = None
        self._tools = tools
        self._order = order
        self._terms = terms
        self._status = status
        self._log = logger
        self._trainer: TrainerHandle | None = None
        self._began = 0.0

    async def run(self, get_trainer: GetTrainer) -> Result:
        """Fetch and train.

        Raises:
            Refused: the site does not allow it.
            TrainerFailed: the trainer gave no result.
            FedlinkError: the task or the session is over, or the model cannot be had.
            OSError: the disk refuses.
        """
        tools, order = self._tools, self._order
        settings = self._terms.accept(order)
        model_dir = tools.spool.model_dir(order.token)
        self._status.enter("downloading")
        self._began = time.monotonic()
        manifest = await tools.transfer.begin(order, model_dir)
        files = update_files(manifest, order.update_dtype) if order.update else {}
        await tools.on_disk(tools.spool.prepare_update, order.token, files)
        job = Job(
            kind=JobKind(order.activity),
            settings=settings,
            seed=order.seed,
            client=tools.client,
            run=order.run,
            round=order.round,
            rounds=order.rounds,
            version=order.version,
            model_dir=model_dir,
            awaited=True,
            model_key=order.model.digest.hex(),
            out_dir=tools.spool.update_dir(order.token),
            write=Write.GRADIENT if order.update is Kind.GRADIENT else Write.DELTA,
            update_dtype=order.update_dtype or "F32",
            checkpoint_dir=tools.spool.checkpoint_dir(order) if order.update is Kind.DELTA else None,
            checkpoint_every=self._terms.settings.checkpoint_every,
            asked=order.work.table,
            share=self._terms.settings.share.table,
            limits=self._terms.limits,
        )
        arrived = Arrivals()
        fetching = asyncio.create_task(self._fetch(manifest, model_dir, arrived))
        training = asyncio.create_task(self._train(get_trainer, job, arrived, files))
        try:
            await asyncio.wait({fetching, training}, return_when=asyncio.FIRST_EXCEPTION)
            if fetching.done() and fetching.exception():
                # The trainer waits for shards that will not come; it stays warm.
                await self.stop()
                fetching.result()
            result = training.result()
        finally:
            for part in (fetching, training):
                part.cancel()
            await asyncio.gather(fetching, training, return_exceptions=True)
        self._log.info(
            "computed",
            activity=order.activity,
            examples=result.num_examples,
            steps=result.steps,
            **({"cut": result.cut} if result.cut else {}),
            seconds=since(self._began),
        )
        return result

    async def stop(self) -> None:
        """Stop the job under way, if there is one, without losing the warm process."""
        if self._trainer:
            await self._trainer.cancel()

    async def _fetch(self, manifest: Manifest, model_dir: Path, arrived: Arrivals) -> None:
        await self._tools.transfer.fetch(self._order, manifest, model_dir, self._status.advance, arrived.add)
        arrived.end()
        self._log.info("downloaded", activity=self._order.activity, seconds=since(self._began))
        reach("model.fetched")
        self._status.enter("computing")
        self._began = time.monotonic()

    async def _train(self, get_trainer: GetTrainer, job: Job, arrived: Arrivals, files: dict[str, int]) -> Result:
        killed = 0
        while True:
            try:
                return await self._attempt(await get_trainer(), job, arrived, files)
            except TrainerFailed as e:
                if order_is_search(self._order, e) and killed < SEARCHES:
                    # It knows what it was killed for, and goes on with less.
                    killed += 1
                    self._log.info("a search for what fits goes on in a new process", because=e.message)
                    continue
                if not e.no_room or not self._order.update or not await self._waited_for_room():
                    raise

    async def _attempt(self, trainer: TrainerHandle, job: Job, arrived: Arrivals, files: dict[str, int]) -> Result:
        order, tools = self._order, self._tools
        update_dir, on_bytes = tools.spool.update_dir(order.token), partial(self._status.advance_in, "uploading")
        ahead = Ahead(tools.transfer, order, update_dir, files, on_bytes)
        self._trainer = trainer
        try:
            result = await trainer.run(job, self._note_progress, shards=arrived, on_file=ahead.wrote)
        except BaseException:
            # What it wrote is written over by the next attempt, maybe by other bits.
            await ahead.stop()
            raise
        finally:
            self._trainer = None
        self.ahead = ahead
        return result

    async def _waited_for_room(self) -> bool:
        """Wait until an update fits on the site's disk, as every other attempt would fail at the same place.

        False if it fits at once: then it was not this disk that had no room.
        """
        attempts, seldom, size = 0, log.Seldom(), self._order.max_update_bytes
        recycler = self._tools.spool.recycler
        spare = recycler.held
        await asyncio.to_thread(recycler.clear)
        update_dir = self._tools.spool.update_dir(self._order.token)
        while refusal := await asyncio.to_thread(refuses, update_dir, size):
            if seldom.due():
                text = "the site's disk has no room for the update; the training waits, and then goes on"
                self._log.error(text, error=refusal, bytes=size)
            attempts += 1
            await asyncio.sleep(BACKOFF.delay(attempts, self._tools.rng))
        return attempts > 0 or spare > 0

    def _note_progress(self, progress: Progress) -> None:
        if progress.note:
            self._log.info(progress.note, step=progress.step)
        self._status.advance_in("computing", progress.step, progress.total)
        for name, value in self._terms.let_out(progress.metrics).items():
            self._status.points[name] = (value, progress.step)


def order_is_search(order: Order, failure: TrainerFailed) -> bool:
    """Whether a task only measures, and its process has ended for what it tried."""
    return bool(order.calibrate) and failure.reason is FailReason.CRASHED


def since(began: float) -> float:
    """Seconds since a time of `time.monotonic`, for logs."""
    return round(time.monotonic() - began, 3)
