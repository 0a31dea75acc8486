"""The trainer process: `python -m fedclient.trainer.worker FD`; without FD, one of several, which its launcher started.

    load the class ── "ready" ──▶ wait for a job ──▶ build (once) · load · seed · user's code · write ── "done" ──┐
                                        ▲                                                                        │
                                        └────────────────────────────────────────────────────────────────────────┘

FD is one end of a socket pair (`fedclient.trainer.wire` says what goes over it). Tracebacks
and whatever the user's code prints go to stderr and stdout, which are the site's log.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

from fedclient.trainer.api import Bounds, CancelledJob, Context, Site, Workload, derive_seed
from fedclient.trainer.checkpoint import Checkpoints, CheckpointUnusable
from fedclient.trainer.circumstances import data_files, surroundings, versions
from fedclient.trainer.files import Loader, ModelDirectory, Shard, hand_over_update, write_model, write_update
from fedclient.trainer.found import Finding, Found, fingerprint
from fedclient.trainer.memory import free_device_memory, is_out_of_memory, keep_whole, peak_device_memory
from fedclient.trainer.options import BUILT_IN, SCRIPT_SUFFIX
from fedclient.trainer.own_base import BaseMismatchError, OwnBase
from fedclient.trainer.pipe import Pipe
from fedclient.trainer.schema import check_found, left_open, parse_settings, settings_schema
from fedclient.trainer.script import script_class
from fedclient.trainer.share import Limits, Share
from fedclient.trainer.state import State
from fedclient.trainer.team import SOCKET, Team, does_share
from fedclient.trainer.undone import seed_everything
from fedclient.trainer.wire import (
    PROTOCOL,
    Description,
    Device,
    FailReason,
    Failure,
    Job,
    JobKind,
    Progress,
    Result,
    Start,
    Write,
)
from fedlink import failpoints
from fedlink.companions import ADAPTER_WEIGHTS, MODEL_WEIGHTS, is_companion
from fedlink.failpoints import reach
from fedlink.memory import peak_memory

_NOTHING = Result(0, 0, {}, 0.0)
"""What a rank has to tell of a job that another one speaks for."""
_MAX_TEXT = 4000
_BATCH = "batch_size"
_ALIVE_EVERY = 0.5


class WorkloadError(Exception):
    """The class named in site.toml cannot be used, or not for this job; the message says why."""


@dataclass(frozen=True)
class _Built:
    """A model as the class built it with a seed, and what is known of it."""

    seed: int
    model: Any
    state: State
    loader: Loader
    base: OwnBase
    whole: bool


class Channel(Protocol):
    """What is used of `Pipe`."""

    def shard(self, wait: float) -> str | None:
        """The name of the next shard of the job under way."""
        ...

    def cancelled(self) -> bool:
        """Whether the daemon has cancelled the job under way."""
        ...

    def send(self, kind: str, table: Mapping[str, Any]) -> None:
        """Send one message."""
        ...


class Worker:
    """One workload's jobs, one after the other, on one device.

    The model is built once for each seed and kept; every job finds it as a fresh process would.
    """

    def __init__(self, start: Start, pipe: Channel, team: Team | None = None) -> None:
        self._pipe = pipe
        self._team = team or Team()
        self._start = start
        self._class = find_class(start.trainer, Path(start.directory))
        self._schema = settings_schema(self._class.Settings)
        site = Site(start.site, Path(start.directory), start.data, start.options, Path(start.kept))
        self._workload = self._class(site)
        self._context = Context(settings=None)
        self._checkpoints: Checkpoints | None = None
        self._model: _Built | None = None
        self._finding: Finding | None = None

    @property
    def main_thread(self) -> queue.SimpleQueue[Callable[[], None]] | None:
        """See `Workload`."""
        return self._workload.main_thread

    def description(self) -> Description:
        """What the class offers."""
        return Description(self._schema, abilities(self._class), _devices(self._device))

    @property
    def _device(self) -> str:
        return self._team.place(_resolve(self._start.device))

    def run(self, job: Job) -> Result | Failure:
        """Do one job; whatever the user's code raises becomes a Failure."""
        try:
            result = self._begin(job)
            self._workload.end_job(failed=False)
        except CancelledJob:
            failure = Failure(FailReason.CANCELLED, step=self._context.step)
        except BaseException as error:  # noqa: BLE001 - sys.exit() in user code is a failure like any other
            traceback.print_exc()
            failure = failure_of(error, self._context.step)
            if self._team.lost(error):
                text = f"rank {self._team.rank} of the trainer's processes lost another one, step {failure.step}"
                failure = replace(failure, reason=FailReason.CRASHED, text=text)
        else:
            if not self._workload.reuses_model:
                self._drop_model()
            return result
        if failure.reason is FailReason.OUT_OF_MEMORY:
            self._back_off()
        self._workload.end_job(failed=True)
        # What failed half-way may be in any state: the next job builds anew.
        self._close_checkpoints()
        self._drop_model()
        return replace(failure, memory_bytes=peak_memory())

    def _begin(self, job: Job) -> Result:
        self._finding = None
        try:
            return self._run(job)
        except CheckpointUnusable as e:
            assert self._checkpoints is not None
            self._checkpoints.put_aside(str(e))
        # Half of what was to be brought back may have been. No shard is told twice, and by now all are there.
        self._drop_model()
        return self._run(replace(job, awaited=False), resume=False)

    def _run(self, job: Job, *, resume: bool = True, measured: frozenset[str] = frozenset()) -> Result:
        self._context = Context(settings=None)
        self._close_checkpoints()
        if job.kind in (JobKind.INIT, JobKind.DESCRIBE):
            return self._alone(job)
        searches = job.kind is not JobKind.EVALUATE and bool(left_open(self._schema, job.settings))
        shared = searches or self._is_shared(job)
        directory, built = self._loaded(job, self._team if shared else Team(), measured)
        ctx = self._context
        if searches:
            # As it was while a batch was looked for, also where that was another process.
            keep_whole()
            found = self._found(job, built)
            if job.kind is JobKind.CALIBRATE:
                return Result(0, ctx.step, {}, 0.0, memory_bytes=peak_memory(), found=found)
            # As if nothing had been measured: with a model built anew. By now all shards are there.
            resolved = replace(job, settings={**job.settings, **found}, awaited=False)
            return self._run(resolved, resume=resume, measured=frozenset(found))
        checkpoints = self._workload.reuses_model and job.checkpoint_every and _ability(job) == "train"
        if job.checkpoint_dir and checkpoints:
            self._use_checkpoints(job, job.checkpoint_dir, built.state, resume=resume)
        if not shared and self._team.whole:
            if self._team.rank:
                return _NOTHING
            self._team.go_alone()
        seed_everything(ctx.seed)
        began = time.monotonic()
        if _ability(job) == "train":
            ctx.begin(_share(job))
        gradient = self._compute(job, built)
        seconds = time.monotonic() - began + ctx.earlier_seconds
        examples = ctx.counted()
        files = self._handed_over(job, built.state, directory, gradient) if job.kind is JobKind.TRAIN else ()
        if self._team.rank:
            return _NOTHING
        return Result(
            examples,
            ctx.step,
            ctx.metrics,
            seconds,
            files,
            peak_memory(),
            peak_device_memory(),
            examples_seen=ctx.examples_seen,
            cut=ctx.cut,
        )

    def _loaded(self, job: Job, team: Team, measured: frozenset[str]) -> tuple[ModelDirectory, _Built]:
        """The model with the version's weights."""
        if job.model_dir is None:
            raise WorkloadError(f"a job to {job.kind.value} needs the model's directory")
        directory = ModelDirectory.read(job.model_dir)
        self._context = ctx = self._new_context(job, team, measured)
        self._workload.begin_job(ctx)
        built = self._built(job.seed, self._team)
        # Only now: a class may import torch no sooner than it builds its model.
        ctx.device = self._device
        built.base.check(directory.base, ctx.alive)
        frozen = {s.name for s in directory.specs.values() if s.role.value == "frozen"}
        built.state.begin(training=job.kind is JobKind.TRAIN, device=ctx.device, frozen=frozen)
        built.base.settle()
        built.loader.load(directory, job.model_key, ctx.alive, self._arriving(directory) if job.awaited else None)
        return directory, built

    def _handed_over(self, job: Job, state: State, directory: ModelDirectory, gradient: Any) -> tuple[Path, ...]:
        """The update in files, which the first rank writes."""
        alive = self._context.alive
        if self._team.rank:
            if not self._team.whole:
                hand_over_update(state, directory, write=job.write, gradient=gradient, alive=alive)
            return ()
        if self._team.whole:
            self._team.go_alone()
        files = write_update(
            state,
            directory,
            _out_dir(job),
            write=job.write,
            update_dtype=job.update_dtype,
            gradient=gradient,
            alive=alive,
            wrote=self._wrote,
        )
        reach("trainer.update")
        return files

    def _found(self, job: Job, built: _Built) -> dict[str, float]:
        """The settings that are "auto": as they were found before, or measured now."""
        names = left_open(self._schema, job.settings)
        may = left_open(self._schema, None)
        fixed = {name: value for name, value in job.settings.items() if name not in may}
        team = self._team
        given = {name: job.settings.get(name) for name in may}
        start, here = self._start.to_json() | {"kept": ""}, surroundings(self._class, _devices(self._device)[0])
        kind: list[Any] = [start, fixed, job.limits, job.share, here]
        files = data_files(Path(self._start.directory), self._start.data, self._context.alive)
        if team.world_size > 1:
            kind.append([team.world_size, team.whole])
        self._finding = finding = Finding(
            run=f"{job.run}/{job.client}",
            names=tuple(names),
            given=json.dumps(given),
            kind=json.dumps(kind, sort_keys=True),
            model=fingerprint(built.state, self._context.alive),
            passing=json.dumps([files, job.rounds, job.asked]),
        )
        kept = Found(Path(self._start.kept))
        by_run = job.kind is not JobKind.CALIBRATE
        found: dict[str, float] | None = team.told(None if team.rank else kept.look(finding, by_run=by_run))
        if found is None:
            self._context.note(f"measures {', '.join(names)}")
            seed_everything(self._context.seed)
            self._context.expect(_share(job))
            measured = self._workload.calibrate(built.model, self._context)
            found = team.told(check_found(self._schema, names, measured, self._context.limits))
            if not job.max_steps and not team.rank:
                kept.put(finding, found)
        self._context.note("found " + ", ".join(f"{name} {value:g}" for name, value in found.items()))
        self._drop_model()
        return found

    def _back_off(self) -> None:
        """Memory ran out: if it was with a batch that was measured, the next attempt takes half of it."""
        ctx, finding = self._context, self._finding
        if finding is None or _BATCH not in ctx.measured:
            return
        size = int(getattr(ctx.settings, _BATCH))
        less = max(size // 2, math.ceil(ctx.limits.get(_BATCH, Bounds()).minimum or 1))
        if less < size and Found(Path(self._start.kept)).lower(finding, _BATCH, less):
            self._say(f"memory ran out with the measured batch of {size}: from now on {less} are taken")

    def _alone(self, job: Job) -> Result:
        """What no model is trained for: the first rank does it, and speaks for all."""
        if self._team.rank:
            return _NOTHING
        if job.kind is JobKind.INIT:
            return self._init(job)
        return Result(0, 0, {}, 0.0, memory_bytes=peak_memory(), data=dict(self._workload.describe_data()))

    def _use_checkpoints(self, job: Job, directory: Path, state: State, *, resume: bool) -> None:
        self._checkpoints = self._new_checkpoints(job, directory, state)
        if resume:
            self._checkpoints.look()
            if not self._team.all_true(self._checkpoints.saved is not None):
                self._checkpoints.close()
        self._context.use_checkpoints(self._checkpoints)

    def _compute(self, job: Job, built: _Built) -> Any:
        ctx, model = self._context, built.model
        ability = _ability(job)
        if ability not in abilities(self._class):
            raise WorkloadError(f"{self._class.__name__} has no method {ability!r}")
        if ability == "evaluate":
            with built.state.evaluating():
                ctx.log(**self._workload.evaluate(model, ctx))
            return None
        built.loader.forget()
        if ability == "gradient":
            with ctx.team.training(model, ctx):
                return self._workload.gradient(model, ctx)
        try:
            with ctx.team.training(model, ctx):
                self._workload.train(model, ctx)
                ctx.agree()
        except Exception as error:
            if ctx.unproven and not is_out_of_memory(error) and not self._team.lost(error):
                raise CheckpointUnusable(f"going on from it ended in {type(error).__name__}") from error
            raise
        if ctx.resuming:
            raise CheckpointUnusable("the training ended before it came to it")
        return None

    def _is_shared(self, job: Job) -> bool:
        """Whether the ranks share the work of a job; else the first one does it alone."""
        ability = _ability(job)
        return ability == "train" or does_share(getattr(self._class, ability))

    def _new_checkpoints(self, job: Job, directory: Path, state: State) -> Checkpoints:
        """Checkpoints that are good for nothing but this very job, on this data, by this code's versions."""
        table = job.to_json()
        limits = ("max_steps", "asked", "share")
        own = ("settings", "seed", "client", "run", "round", "rounds", "version", "model_key", *limits)
        # Where the state directory lies is no matter; what an older release did not know is not said if it is not set.
        start = {name: value for name, value in self._start.to_json().items() if name != "kept"}
        late = {"rounds": job.rounds, "options": start["options"], "asked": job.asked, "share": job.share}
        news = {name for name, value in late.items() if not value}
        owner = {name: table[name] for name in own} | start | {"device": "", "versions": versions(("numpy", "torch"))}
        owner = {name: value for name, value in owner.items() if name not in news}
        return Checkpoints(
            directory,
            owner=json.dumps(owner, sort_keys=True),
            every=math.inf if self._team.rank and self._team.whole else job.checkpoint_every,
            state=state,
            device=self._context.device,
            alive=self._context.alive,
            say=self._say,
            team=self._team,
        )

    def _say(self, text: str) -> None:
        print(f"fedclient: {text}", file=sys.stderr, flush=True)  # noqa: T201 - the site's log of this process
        self._context.note(text)

    def _close_checkpoints(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.close()
            self._checkpoints = None

    def _init(self, job: Job) -> Result:
        self._context = Context(settings=None, report=self._report, cancelled=self._pipe.cancelled)
        self._drop_model()
        self._workload.begin_job(self._context)
        built = self._built(job.seed, Team())
        base = built.base.tensors(self._context.alive)
        if job.model_dir is not None:
            built.loader.load(ModelDirectory.read(job.model_dir), "", self._context.alive)
        path = _out_dir(job) / (ADAPTER_WEIGHTS if base else MODEL_WEIGHTS)
        write_model(built.state, path, base)
        files = [path]
        for name, data in sorted(self._workload.model_files().items()):
            if not is_companion(name) or not isinstance(data, bytes):
                raise WorkloadError(f"model_files gave {name!r}: no file of that name, or not bytes, goes with a model")
            files.append(_out_dir(job) / name)
            files[-1].write_bytes(data)
        return Result(0, 0, {}, 0.0, tuple(files))

    def _built(self, seed: int, team: Team) -> _Built:
        held = self._model
        if held is None or (held.seed, held.whole) != (seed, team.whole) or held.base.touched:
            self._drop_model()
            seed_everything(seed)
            workload = self._workload
            with team.building(frozen_base=workload.frozen_base):
                model = workload.build_model()
            names, frozen_base = workload.tensor_names(model), workload.frozen_base
            state, base = team.laid_out(model, names, frozen_base=frozen_base, device=self._device, say=self._say)
            self._model = held = _Built(seed, model, state, Loader(state), base, team.whole)
        return held

    def _drop_model(self) -> None:
        self._model = None
        gc.collect()
        free_device_memory()

    def _new_context(self, job: Job, team: Team, measured: frozenset[str]) -> Context:
        return Context(
            settings=parse_settings(self._class.Settings, job.settings),
            seed=derive_seed(job.seed, job.client, job.round, job.kind),
            client=job.client,
            run=job.run,
            round=job.round,
            rounds=job.rounds,
            version=job.version,
            max_steps=job.max_steps,
            measured=measured,
            kept=Path(self._start.kept) if self._start.kept else None,
            limits={name: Bounds(*bounds) for name, bounds in job.limits.items()},
            report=self._report,
            cancelled=self._pipe.cancelled,
            team=team,
        )

    def _arriving(self, directory: ModelDirectory) -> Iterator[Shard]:
        """The shards of a model that is still being fetched, each once it is there."""
        left = {shard.path.name: shard for shard in directory.shards}
        while left:
            # Also while bytes move and no shard is whole, the daemon must hear from this process.
            self._context.alive()
            name = self._pipe.shard(_ALIVE_EVERY)
            if name is not None:
                yield left.pop(name)

    def _wrote(self, path: Path) -> None:
        self._pipe.send("wrote", {"name": path.name})
        reach("trainer.wrote")

    def _report(self, progress: Progress) -> None:
        self._pipe.send("progress", replace(progress, memory_bytes=peak_memory()).to_json())


def check_protocol(version: int) -> None:
    """Refuse a daemon of another version.

    Raises:
        WorkloadError: it speaks another protocol than this file's.
    """
    if version != PROTOCOL:
        raise WorkloadError(f"the daemon speaks pipe protocol {version}, this trainer {PROTOCOL}; restart the daemon")


def find_class(trainer: str, directory: Path) -> type[Workload]:
    """Import `module:Class`, looked up in `directory` first, then among the installed packages; or what stands for it.

    A built-in workload has a name instead, and a script its path, relative to `directory`.

    Raises:
        WorkloadError: there is no such class, or it is no usable Workload.
        Exception: whatever importing the module raises.
    """
    sys.path.insert(0, str(directory))
    if trainer.endswith(SCRIPT_SUFFIX):
        return script_class(directory / trainer)
    module, _, name = BUILT_IN.get(trainer, trainer).partition(":")
    found = getattr(importlib.import_module(module), name, None)
    if not isinstance(found, type) or not issubclass(found, Workload):
        raise WorkloadError(f"{trainer}: there is no class {name} in it that derives from fedclient.trainer.Workload")
    if found.build_model is Workload.build_model or not abilities(found):
        raise WorkloadError(f"{trainer}: it needs build_model and at least one of {', '.join(Workload.abilities)}")
    measured = left_open(settings_schema(found.Settings), None)
    if measured and "calibrate" not in abilities(found):
        raise WorkloadError(f"{trainer}: {measured[0]} may be \"auto\", but the class has no method 'calibrate'")
    return found


def abilities(found: type[Workload]) -> tuple[str, ...]:
    """Which of `Workload.abilities` a class implements."""
    return tuple(name for name in Workload.abilities if getattr(found, name) is not getattr(Workload, name))


def failure_of(error: BaseException, step: int) -> Failure:
    """What is reported of an exception."""
    reason = FailReason.OUT_OF_MEMORY if is_out_of_memory(error) else FailReason.EXCEPTION
    if isinstance(error, BaseMismatchError):
        reason = FailReason.BASE_MISMATCH
    return Failure(reason, type(error).__name__, step, peak_memory(), str(error)[:_MAX_TEXT])


def _share(job: Job) -> Share:
    return Share(Limits.of(job.asked), Limits.of(job.share))


def _ability(job: Job) -> str:
    if job.kind is JobKind.EVALUATE:
        return "evaluate"
    return "gradient" if job.write is Write.GRADIENT else "train"


def _out_dir(job: Job) -> Path:
    if job.out_dir is None:
        raise WorkloadError(f"a job to {job.kind.value} needs a directory for the result")
    return job.out_dir


def _resolve(device: str) -> str:
    if device != "auto":
        return device
    if "torch" not in sys.modules:
        return "cpu"
    from fedclient.trainer.torch_state import best_device  # noqa: PLC0415 - imports torch

    return best_device()


def _devices(wanted: str) -> tuple[Device, ...]:
    found = [Device("cpu")]
    if "torch" in sys.modules:
        from fedclient.trainer.torch_state import accelerators  # noqa: PLC0415 - imports torch

        found += [Device(*accelerator) for accelerator in accelerators()]
    own = _resolve(wanted)
    first = next((d for d in found if d.name == own), Device(own))
    return (first, *(d for d in found if d.name != own))


def _meet() -> tuple[Team, Any]:
    if SOCKET not in os.environ:
        return Team(), Pipe(int(sys.argv[1]))
    from fedclient.trainer.ranks import join  # noqa: PLC0415 - imports torch

    return join()


def main() -> int:
    """Serve jobs until the daemon goes; the exit code is 1 if the class could not be loaded."""
    failpoints.arm(os.environ)
    team, pipe = _meet()
    message = pipe.receive()
    try:
        check_protocol(message["protocol"])
        worker = Worker(Start.from_json(message), pipe, team)
        pipe.send("ready", worker.description().to_json())
    except BaseException as error:  # noqa: BLE001 - reported whatever it is
        traceback.print_exc()
        pipe.send("failed", failure_of(error, 0).to_json())
        return 1
    if worker.main_thread is None:
        _serve(pipe, worker)
    threading.Thread(target=_serve, args=(pipe, worker), name="fedclient-jobs", daemon=True).start()
    while True:
        worker.main_thread.get()()


def _serve(pipe: Pipe, worker: Worker) -> NoReturn:
    try:
        while True:
            answer = worker.run(Job.from_json(pipe.receive()))
            pipe.send("done" if isinstance(answer, Result) else "failed", answer.to_json())
    except BaseException:  # noqa: BLE001 - on a thread it would end that thread alone
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
