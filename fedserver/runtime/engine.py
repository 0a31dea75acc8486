"""The engine: every live run, the clock, and what operators ask for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Connection

from fedlink import log as logs
from fedlink.config import explain
from fedlink.errors import FedlinkError, Reason
from fedlink.failpoints import reach
from fedlink.run_file import MAX_JSON_BYTES, MAX_ROUNDS, RunSpec
from fedserver.rounds.model import TaskState
from fedserver.runtime.board import OpenTask
from fedserver.runtime.driver import RunDriver
from fedserver.runtime.parts import Parts
from fedserver.runtime.planning import Plan, Planner
from fedserver.runtime.prediction import Prediction
from fedserver.runtime.tidying import Tidying
from fedserver.runtime.underway import UnderWay
from fedserver.runtime.versions import version_owner
from fedserver.runtime.whole import whole
from fedserver.store.disk import is_disk
from fedserver.store.queries import models as model_queries
from fedserver.store.queries import runs as q
from fedserver.store.queries import tasks as task_queries
from fedserver.store.rows import ModelRow, RunRow, VersionRow

_TICK_SECONDS = 0.25
_LOOK_EVERY = 4
"""Ticks between two looks at all sites: there may be thousands."""
_SETTLE_SECONDS = 0.05


class Engine:
    """Starts and feeds the drivers.

    Args:
        parts: the rest of the server.
        planner: says what a run would take.
        sites_changed: set when a site came, went or changed what it offers; the runs hear of it soon.

    Attributes:
        writers: each says who sends bytes at this moment; the services add themselves.
        drained: set when a draining server has nothing more to finish.
    """

    def __init__(self, parts: Parts, planner: Planner, sites_changed: asyncio.Event) -> None:
        self._parts = parts
        self._planner = planner
        self._db = parts.database
        self._drivers: dict[int, RunDriver] = {}
        self._leavings: list[Tidying] = []
        self._changed = sites_changed
        # Runs begin, and ended ones go on, one at a time: a run must never have two drivers.
        self._beginning = asyncio.Lock()
        self._loops: list[asyncio.Task[None]] = []
        self.writers: list[Callable[[], Iterable[str]]] = []
        self.drained = asyncio.Event()
        self._log = logs.get("engine")

    async def start(self) -> None:
        """Take up every live run and every open task again."""
        runs, tasks, untidy = await self._db.run(
            lambda c: (q.list_runs(c, states=q.LIVE_STATES), task_queries.open_tasks(c), q.ended_with_too_many(c)),
        )
        by_id = {r.id: r for r in runs}
        for task in tasks:
            if task.run_id in by_id:
                self._parts.board.add(by_id[task.run_id], [task], fresh=False)
        for run in runs:
            await self._drive(run)
        for run in untidy:
            # The server ended just after the run did.
            self._leavings.append(Tidying(run, self._parts))
            self._leavings[-1].retire()
        self._loops = [asyncio.create_task(self._clock()), asyncio.create_task(self._follow_sites())]
        if runs:
            self._log.info("recovered", runs=[r.name for r in runs], open_tasks=len(tasks))

    async def close(self) -> None:
        """Stop; the next start goes on from the database."""
        for loop in self._loops:
            loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await loop
        for driver in list(self._drivers.values()):
            await driver.close()
        for leavings in self._leavings:
            await leavings.close()

    # --- Tasks

    def driver_of(self, task: OpenTask) -> RunDriver:
        """The driver of a task's run.

        Raises:
            FedlinkError: ROUND_CLOSED if the run has ended.
        """
        driver = self._drivers.get(task.row.run_id)
        if driver is None:
            raise FedlinkError(Reason.ROUND_CLOSED, f"run {task.run.name!r} has ended; drop the task")
        return driver

    async def revive(self, task: OpenTask) -> None:
        """A site shows that it has a task: extend its lease, and bring it back if it was away."""
        self._parts.board.extend(task)
        task.fetched = True
        if task.state in (TaskState.PENDING, TaskState.AWAY):
            await self.driver_of(task).task_changed(task, TaskState.RUNNING)

    @whole
    async def release(self, client: str) -> None:
        """A site leaves: its open tasks go AWAY."""
        for task in self._parts.board.of_client(client):
            driver = self._drivers.get(task.row.run_id)
            if driver is not None and task.state in (TaskState.PENDING, TaskState.RUNNING):
                task.heard = time.time()
                await driver.task_changed(task, TaskState.AWAY)

    @whole
    async def revoke(self, client: str) -> None:
        """A site may not come any more: its open tasks are revoked, and it hears of it at once."""
        self._parts.board.wake(client)
        for task in self._parts.board.of_client(client):
            driver = self._drivers.get(task.row.run_id)
            if driver is not None:
                values = {"reason": "CLIENT_REVOKED", "message": "an operator revoked the client"}
                await driver.task_ended(task, TaskState.FAILED, values)

    # --- Runs

    @whole
    async def create(self, spec_json: str, request_id: bytes) -> RunRow:
        """Start a run; the same request again answers the same run.

        Raises:
            FedlinkError: BAD_RUN, RUN_EXISTS, MODEL_NOT_FOUND, BLOB_CORRUPT.
        """
        if len(request_id) != 16:
            raise FedlinkError(Reason.BAD_RUN, "request_id must have 16 bytes")
        async with self._beginning:
            again = await self._db.run(lambda c: q.run_by_request(c, request_id))
            if again is not None:
                return again
            spec = _parse_spec(spec_json)
            # Held, so that a version that is found is not retired before the run refers to it.
            async with self._parts.versions.blobs_lock:
                _, _, start = await self._parts.versions.find(spec.model)
                plan = await self._planner.plan(spec, await self._parts.access.model_manifest(start.digest))
                if plan.refusal:
                    raise FedlinkError(Reason.BAD_RUN, plan.refusal)
                run = await self._db.run(lambda c: _insert_run(c, spec, request_id, start, plan.prediction))
            reach("run.created")
            self._log.info("created", run=run.name, workload=spec.workload, rounds=spec.rounds, model=spec.model)
            await self._drive(run)
            return await self._db.run(lambda c: q.run_by_id(c, run.id))

    async def plan(self, spec_json: str, clients: int) -> tuple[str, Plan]:
        """What a run would take if so many sites could take part; 0 for those that are known.

        Returns:
            The full name of the model that it would start from, and the plan.

        Raises:
            FedlinkError: BAD_RUN, MODEL_NOT_FOUND, BLOB_CORRUPT.
        """
        spec = _parse_spec(spec_json)
        name, ref, _ = await self._parts.versions.find(spec.model)
        if not clients and not self._planner.known(spec):
            text = f"no site is known that offers workload {spec.workload!r}"
            raise FedlinkError(Reason.BAD_RUN, f"{text}; say with --clients how many there will be")
        return name, await self._planner.plan(spec, await self._parts.access.model_manifest(ref.digest), clients)

    async def _drive(self, run: RunRow, *, extended: bool = False) -> None:
        driver = RunDriver(run, self._parts, self._forget)
        self._drivers[run.id] = driver
        await driver.start(extended=extended)

    def _forget(self, run_id: int) -> None:
        if driver := self._drivers.pop(run_id, None):
            self._leavings.append(driver.tidying)

    def driver(self, run_id: int) -> RunDriver | None:
        """The driver of a run that has not ended."""
        return self._drivers.get(run_id)

    async def find(self, name: str) -> RunRow:
        """A run by name.

        Raises:
            FedlinkError: RUN_NOT_FOUND.
        """
        row = await self._db.run(lambda c: q.run_by_name(c, name))
        if row is None:
            raise FedlinkError(Reason.RUN_NOT_FOUND, f"there is no run {name!r}; see `fedserver run list`")
        return row

    async def live(self, name: str) -> RunDriver:
        """The driver of a run that must not have ended.

        Raises:
            FedlinkError: RUN_NOT_FOUND, RUN_STATE.
        """
        row = await self.find(name)
        driver = self._drivers.get(row.id)
        if driver is None:
            raise FedlinkError(Reason.RUN_STATE, f"run {name!r} is {row.state} already ({row.reason})")
        return driver

    @whole
    async def extend(self, name: str, rounds: int) -> RunRow:
        """Set the number of rounds; a run that has ended goes on.

        Raises:
            FedlinkError: RUN_NOT_FOUND, RUN_STATE if fewer than are done.
        """
        async with self._beginning:
            row = await self.find(name)
            if rounds < row.version or rounds > MAX_ROUNDS:
                have = f"run {name!r} has done {row.version} rounds"
                raise FedlinkError(Reason.RUN_STATE, f"{have}; it cannot have {rounds} (at most {MAX_ROUNDS})")
            driver = self._drivers.get(row.id)
            if driver is not None:
                await driver.set_rounds(rounds)
            elif rounds > row.version:
                await self._db.run(lambda c: _reopen(c, row, rounds))
                await self._drive(await self.find(name), extended=True)
            return await self.find(name)

    # --- Draining

    def drain(self) -> None:
        """Let nothing new begin from now on; `drained` is set when what is under way is finished."""
        if not self._parts.board.draining:
            self._log.info("draining", under_way=str(self.under_way()))
            self._parts.board.drain()

    def under_way(self) -> UnderWay:
        """What would be half-done if the server ended now."""
        tasks = self._parts.board.all()
        # With a disk that refuses uploads nobody knows when they go on.
        sending = not self._parts.disk.trouble
        uploads = {t.client for t in tasks if t.check or (sending and _sends_its_result(t))}
        uploads |= {name for writer in self.writers for name in writer()}
        aggregations = [d.row.name for d in self._drivers.values() if d.aggregating]
        return UnderWay(tuple(sorted(uploads)), tuple(sorted(aggregations)))

    # --- Time

    async def _clock(self) -> None:
        board, sites = self._parts.board, self._parts.sites
        for tick in itertools.count():
            await asyncio.sleep(_TICK_SECONDS)
            if tick % _LOOK_EVERY == 0:
                await self._guarded(sites.look_round)
            self._leavings = [left for left in self._leavings if not left.idle]
            if board.draining and not self.under_way():
                self.drained.set()
            for task in board.lapsed(sites.offers().keys()) if board.all() else ():
                if (of_run := self._drivers.get(task.row.run_id)) is not None:
                    await self._guarded(lambda of_run=of_run, task=task: of_run.task_lapsed(task))  # type: ignore[misc]
            for driver in list(self._drivers.values()):
                await self._guarded(lambda driver=driver: driver.tick(time.time()))  # type: ignore[misc]

    async def _follow_sites(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            # Sites often arrive together; one look at them all is enough.
            await asyncio.sleep(_SETTLE_SECONDS)
            for driver in list(self._drivers.values()):
                await self._guarded(driver.sites_changed)

    async def _guarded(self, work: Callable[[], Awaitable[Any]]) -> None:
        """One run's trouble must not stop the clock for the others."""
        try:
            await work()
        except Exception as e:  # noqa: BLE001 - logged, and tried again at the next tick
            # What the disk refuses, it has logged itself, once.
            if not is_disk(e):
                self._log.exception("tick failed")


def _sends_its_result(task: OpenTask) -> bool:
    """Whether a site sends a finished update: one that computes may have sent the first parts of it."""
    return task.sending and task.state is TaskState.RUNNING and task.activity in ("", "uploading")


def _parse_spec(spec_json: str) -> RunSpec:
    if len(spec_json.encode()) > MAX_JSON_BYTES:
        raise FedlinkError(Reason.BAD_RUN, f"the run file is larger than {MAX_JSON_BYTES} bytes as JSON")
    try:
        spec = RunSpec.model_validate_json(spec_json)
    except ValidationError as e:
        raise FedlinkError(Reason.BAD_RUN, explain(e, RunSpec)) from None
    if not spec.model:
        raise FedlinkError(Reason.BAD_RUN, "model: missing; name an imported model, or use `--from RUN@VERSION`")
    if spec.name is None:
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        spec = spec.model_copy(update={"name": f"{spec.workload[:48]}-{stamp}"})
    return spec


def _insert_run(
    c: Connection, spec: RunSpec, request_id: bytes, start: ModelRow | VersionRow, prediction: Prediction
) -> RunRow:
    assert spec.name is not None
    if q.run_by_name(c, spec.name) or model_queries.model(c, spec.name):
        raise FedlinkError(
            Reason.RUN_EXISTS, f"there is a run or model named {spec.name!r} already; choose another name"
        )
    now = time.time()
    run = q.insert_run(
        c,
        name=spec.name,
        request_id=request_id,
        spec=spec.model_dump_json(),
        state="active",
        rounds=spec.rounds,
        version=0,
        prediction=prediction.serialize(),
        created=now,
    )
    q.insert_version(
        c,
        run_id=run.id,
        number=0,
        digest=start.digest,
        manifest_size=start.manifest_size,
        size=start.size,
        tensors=start.tensors,
        master_digest=start.master_digest if isinstance(start, VersionRow) else None,
        created=now,
    )
    owner = version_owner(start.run_id, start.number) if isinstance(start, VersionRow) else f"model:{start.name}"
    model_queries.copy_refs(c, owner, version_owner(run.id, 0))
    q.add_event(c, run.id, "run_created", {"spec": json.loads(run.spec)}, now)
    return run


def _reopen(c: Connection, row: RunRow, rounds: int) -> None:
    q.save_run(c, row.id, rounds=rounds, state="active", reason="", ended=None)
    q.add_event(c, row.id, "run_extended", {"rounds": rounds}, time.time())
