"""A workload's trainer process, seen from the daemon: started, asked, watched, restarted, killed.

The process runs under the site's own Python, in a session of its own, without any of the
daemon's credentials. The messages are those of `fedclient.trainer.wire`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import fedclient
import fedlink
from fedclient.child import Child
from fedclient.settings import SiteSettings, WorkloadSettings
from fedclient.spool import DISK_REFUSES
from fedclient.trainer.team import python_command
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
from fedlink import failpoints, log

__all__ = [
    "Description",
    "Device",
    "FailReason",
    "Job",
    "JobKind",
    "Progress",
    "Result",
    "Trainer",
    "TrainerFailed",
    "Write",
]

_NO_ROOM = tuple(f"[Errno {number}]" for number in DISK_REFUSES)
_PASSING = (FailReason.OUT_OF_MEMORY, FailReason.CRASHED, FailReason.STALLED)
"""What another attempt may be spared."""
_QUOTES_NOTHING = frozenset(
    {
        "CannotCompileError",
        "CannotMeasureError",
        "CannotPlaceError",
        "DataError",
        "LimitUncountedError",
        "NothingFitsError",
        "PretrainedError",
    }
)
CANCEL_GRACE = 10.0
"""Seconds a job has to stop by itself when it is cancelled."""


class TrainerFailed(Exception):  # noqa: N818 - a verdict on the user's code, not an error of ours
    """A trainer gave no result.

    Attributes:
        reason: what went wrong; CANCELLED after `Trainer.cancel`.
        message: one sentence made here, which holds nothing of the site's data.
        exception_class: name of the exception the user's code raised, if it did.
        exit_code: of the process if it ended; negative for a signal; else 0.
        step: at which it happened.
        memory_bytes: peak resident memory of the process, 0 if unknown.
        retryable: whether another attempt may succeed.
        no_room: whether a disk had no room, or could not be written.
        output: the exception's own message and the end of the process's output. It may quote
            data: it may be sent or shown only where the site allows that (`share_errors`).
    """

    def __init__(
        self,
        reason: FailReason,
        message: str,
        *,
        exception_class: str = "",
        exit_code: int = 0,
        step: int = 0,
        memory_bytes: int = 0,
        retryable: bool = False,
        no_room: bool = False,
        output: str = "",
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.exception_class = exception_class
        self.exit_code = exit_code
        self.step = step
        self.memory_bytes = memory_bytes
        self.retryable = retryable
        self.no_room = no_room
        self.output = output

    @property
    def own_words(self) -> str:
        """What a built-in workload says of files and columns, quoting no value; else empty. It stays at the site."""
        return self.output.partition("\n")[0] if self.exception_class in _QUOTES_NOTHING else ""


class Trainer:
    """One workload's trainer process on one device.

    The process is started when it is needed, kept for `keep_warm` after its last job, and
    started again when it has died. One job at a time; a second `run` waits for the first.

    Args:
        site: the site's settings.
        workload: a name in `site.workload`.
        device: "cpu", "cuda:0", "mps", or "auto".
        runtime_dir: a directory of the daemon's for logs (`trainer-WORKLOAD-DEVICE.log`) and the
            private import path; made if missing. Several trainers may share it.
    """

    def __init__(self, site: SiteSettings, workload: str, device: str, runtime_dir: Path) -> None:
        self._site = site
        self._name = workload
        self._workload = site.workload[workload]
        self._device = device
        self._runtime_dir = runtime_dir
        self.log_path = runtime_dir / f"trainer-{workload}-{device.replace(':', '')}.log"
        """Where the process's stdout and stderr go; bounded."""
        self._log = log.get("trainer").bind(workload=workload, device=device)
        self._lock = asyncio.Lock()
        self._child: Child | None = None
        self._description: Description | None = None
        self._expiry: asyncio.Task[None] | None = None
        self._over: asyncio.Event | None = None
        self._cancelling = False
        self._closed = False

    async def describe(self) -> Description:
        """What the workload's class offers; starts the process if that isn't known yet.

        Raises:
            TrainerFailed: the class cannot be imported or is not a valid workload, or the process died.
            FedlinkError: BAD_CONFIG: the interpreter cannot be run.
        """
        async with self._lock:
            if self._description is None:
                async with self._busy():
                    await self._ready()
            assert self._description is not None
            return self._description

    async def run(
        self,
        job: Job,
        on_progress: Callable[[Progress], None],
        *,
        shards: AsyncIterable[str] | None = None,
        on_file: Callable[[str], None] = lambda _: None,
    ) -> Result:
        """Do one job. Cancelling the awaiting task kills the process.

        Args:
            job: what to do.
            on_progress: called on the event loop, a few times a second at most.
            shards: for an `awaited` model: the names of its files, each once it is whole; must not raise.
            on_file: called with the name of each file of an update once it is whole.

        Raises:
            TrainerFailed: it gave no result; the next `run` starts a fresh process if needed.
            FedlinkError: BAD_CONFIG: the interpreter cannot be run.
        """
        async with self._lock, self._busy():
            self._over = asyncio.Event()
            try:
                child = await self._ready()
                self._refuse_cancelled()
                await child.send("run", job.to_json())
                async with _beside(_tell(child, shards)):
                    return await self._watch(child, on_progress, on_file)
            finally:
                self._over.set()
                self._over = None

    async def cancel(self) -> None:
        """Ask the job under way to stop, and kill the process if it doesn't within a grace period.

        Returns when the job is over; its `run` raises TrainerFailed with reason CANCELLED.
        Does nothing if no job is under way.
        """
        over = self._over
        if over is None:
            return
        self._cancelling = True
        if self._child is not None:
            await self._child.send("cancel", {})
        try:
            async with asyncio.timeout(CANCEL_GRACE):
                await over.wait()
        except TimeoutError:
            if self._child is not None and not over.is_set():
                self._log.warning("the trainer did not stop when asked; it is killed")
                await self._child.end()
            await over.wait()

    async def close(self) -> None:
        """End the process and wait until it is gone. Safe to call twice; no job can be run afterwards."""
        self._closed = True
        if self._child is not None:
            await self._child.end()
        async with self._lock:
            await self._stop_expiry()
            await self._end()

    @contextlib.asynccontextmanager
    async def _busy(self) -> AsyncIterator[None]:
        self._cancelling = False
        self._refuse_cancelled()
        await self._stop_expiry()
        try:
            yield
        except TrainerFailed as e:
            self._log.info("trainer failed", reason=e.reason.value, error=e.message, output=str(self.log_path))
            stays = e.reason in (FailReason.EXCEPTION, FailReason.BASE_MISMATCH) and not self._workload.distributed
            if not stays and e.reason is not FailReason.CANCELLED:
                await self._end()
            raise
        except BaseException:
            await self._end()
            raise
        finally:
            if self._child is not None:
                self._expiry = asyncio.create_task(self._expire())

    async def _expire(self) -> None:
        await asyncio.sleep(self._workload.keep_warm)
        await self._end()

    async def _stop_expiry(self) -> None:
        expiry, self._expiry = self._expiry, None
        if expiry is not None:
            expiry.cancel()
            await asyncio.wait([expiry])

    async def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.end()

    async def _ready(self) -> Child:
        """The running process; started and described if there is none."""
        if self._child is not None and self._child.alive:
            return self._child
        await self._end()
        python = self._site.interpreter(self._name)
        self._runtime_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._child = child = await Child.spawn(
            [str(python), *trainer_program(self._workload, self._name, self._device, self._runtime_dir)],
            env=self._environment(python),
            cwd=self._site.directory,
            log=self.log_path,
        )
        await child.send("start", {"protocol": PROTOCOL, **self._start().to_json()})
        message = await self._receive(child, Progress(0, 0))
        if message["type"] != "ready":
            await self._end()
            await self._fail(child, message, f"its trainer {self._workload.trainer} cannot be used")
        description = Description.from_json(message)
        if self._workload.script and description.devices[0].name == _in_process(self._device) != self._device:
            own = replace(description.devices[0], name=self._device)
            description = replace(description, devices=(own, *description.devices[1:]))
        self._description = description
        return child

    def _environment(self, python: Path) -> dict[str, str]:
        env = trainer_environment(os.environ, python, link_packages(self._runtime_dir / "python"))
        return env | visible_devices(self._device, env) if self._workload.script else env

    def _start(self) -> Start:
        return Start(
            trainer=self._workload.trainer,
            workload=self._name,
            site=self._site.name,
            directory=str(self._site.directory),
            data=self._workload.data,
            device=_in_process(self._device) if self._workload.script else self._device,
            options=self._workload.options,
            kept=str(self._runtime_dir / "kept" / self._name),
        )

    async def _watch(
        self, child: Child, on_progress: Callable[[Progress], None], on_file: Callable[[str], None]
    ) -> Result:
        last = Progress(0, 0)
        while True:
            message = await self._receive(child, last)
            if message["type"] == "done":
                return Result.from_json(message)
            if message["type"] == "failed":
                await self._fail(child, message, "its trainer failed")
            if message["type"] == "wrote":
                on_file(message["name"])
                continue
            last = Progress.from_json(message)
            on_progress(last)

    async def _receive(self, child: Child, last: Progress) -> dict[str, Any]:
        """The next message; raises if the process has died, or shows no progress and is killed for it."""
        try:
            async with asyncio.timeout(self._workload.stall_after):
                message = await child.receive()
        except TimeoutError:
            message = None
            stalled = True
        else:
            stalled = False
        if message is not None:
            return message
        code = await child.end()
        self._refuse_cancelled()
        ended = f"by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"with exit code {code}"
        silence = f"made no progress for {self._workload.stall_after:g} s and was killed"
        raise TrainerFailed(
            FailReason.STALLED if stalled else FailReason.CRASHED,
            f"workload {self._name}: the trainer process {silence if stalled else f'ended {ended}'}, step {last.step}",
            exit_code=code,
            step=last.step,
            memory_bytes=last.memory_bytes,
            retryable=True,
            output=await child.tail(),
        )

    def _refuse_cancelled(self) -> None:
        if self._cancelling or self._closed:
            raise TrainerFailed(FailReason.CANCELLED, f"workload {self._name}: the job was cancelled")

    async def _fail(self, child: Child, message: Mapping[str, Any], what: str) -> NoReturn:
        failure = Failure.from_json(message)
        self._refuse_cancelled()
        cause = "it ran out of memory" if failure.reason is FailReason.OUT_OF_MEMORY else failure.exception_class
        no_room = failure.exception_class == "OSError" and failure.text.startswith(_NO_ROOM)
        if no_room:
            cause = "the site's disk is full or cannot be written"
        said = f"{what}: {cause}, step {failure.step}"
        if failure.reason in (FailReason.BASE_MISMATCH, FailReason.CRASHED, FailReason.STALLED):
            said = failure.text
        raise TrainerFailed(
            failure.reason,
            f"workload {self._name}: {said}",
            exception_class=failure.exception_class,
            exit_code=failure.exit_code,
            step=failure.step,
            memory_bytes=failure.memory_bytes,
            retryable=no_room or failure.reason in _PASSING,
            no_room=no_room,
            output=f"{failure.text}\n{await child.tail()}".strip(),
        )


async def _tell(child: Child, shards: AsyncIterable[str] | None) -> None:
    if shards is not None:
        async for name in shards:
            await child.send("shard", {"name": name})


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def trainer_program(
    workload: WorkloadSettings, name: str, device: str, runtime_dir: Path, *, node: int = 0
) -> list[str]:
    """What a trainer's interpreter is to run, with its arguments: the trainer, or what starts several.

    Args:
        workload: what is trained.
        name: what it is called.
        device: where.
        runtime_dir: as of `Trainer`.
        node: this machine's number among `nodes`.
    """
    several = workload.distributed
    if several is None or several.alone:
        return python_command("fedclient.trainer.worker")
    options = {
        "processes": several.processes,
        "strategy": several.strategy,
        "device": device,
        "nodes": several.nodes,
        "node": node,
        "rendezvous": several.rendezvous,
        "stall-after": workload.stall_after,
        "home": runtime_dir / f"ranks-{name}-{device.replace(':', '')}",
    }
    return python_command("fedclient.trainer.launcher", [f"--{key}={value}" for key, value in options.items()])


def link_packages(directory: Path) -> Path:
    """Make a directory that holds links to our two packages and nothing else, for the trainer's import path.

    The site's Python so finds `fedlink` and `fedclient` without the daemon's other packages.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for package in (fedlink, fedclient):
        link, target = directory / package.__name__, Path(package.__path__[0]).resolve()
        if not link.is_symlink() or link.readlink() != target:
            fresh = directory / f".{package.__name__}.{os.getpid()}"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(target, target_is_directory=True)
            fresh.replace(link)
    return directory


def visible_devices(device: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables by which a script sees no other device than its own, whatever it looks for; it is the first there.

    Args:
        device: one of "cpu", "cuda:0", "xpu:0", "mps" or "auto", which is the first.
        environ: where the variable may be already: the devices are then numbered by it.
    """
    variable = "ZE_AFFINITY_MASK" if device.startswith("xpu") else "CUDA_VISIBLE_DEVICES"
    if device in ("cpu", "mps"):
        return {variable: ""}
    number = int(device.partition(":")[2] or 0)
    given = environ.get(variable)
    names = [str(number)] if given is None else given.split(",")[number:]
    return {variable: names[0] if names else ""}


def _in_process(device: str) -> str:
    """What a script that sees no other calls its device."""
    kind = device.partition(":")[0]
    return f"{kind}:0" if kind in ("cuda", "xpu") else device


def trainer_environment(environ: Mapping[str, str], python: Path, packages: Path) -> dict[str, str]:
    """The environment of a trainer: the daemon's without anything that could be a credential for the server.

    A Python of the site's own also gets none of the daemon's Python settings.
    """
    foreign = python != Path(sys.executable)
    env = {
        name: value
        for name, value in environ.items()
        if name in (failpoints.VARIABLE, failpoints.LOG_VARIABLE)
        or (
            not name.upper().startswith(("FEDLINK_", "FEDCLIENT_", "FEDSERVER_"))
            and "TOKEN" not in name.upper()
            and not (foreign and name in ("PYTHONPATH", "PYTHONHOME"))
        )
    }
    paths = [str(packages), *filter(None, [env.get("PYTHONPATH")])]
    return env | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
