"""One of several processes that train a model together: how they meet, what they agree on, what they add up.

Each builds the model and loads the files itself. Rank 0 has the pipe to the daemon, tells the
others what it is told, and alone writes anything. All go through the same jobs and the same
steps; whoever fails tells the launcher (`fedclient.trainer.launcher`), which ends them all.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from fedclient.trainer.kept import give_random, take_random
from fedclient.trainer.memory import NUMBERED
from fedclient.trainer.nested import flatten, rebuild
from fedclient.trainer.own_base import OwnBase
from fedclient.trainer.pipe import Pipe, end_group
from fedclient.trainer.replicas import Replicas
from fedclient.trainer.sharded import ShardedState, Shards, shard
from fedclient.trainer.state import State
from fedclient.trainer.team import SOCKET, STRATEGY, Share, Team, share_of, to_line
from fedclient.trainer.torch_state import TorchState, best_device
from fedclient.trainer.wire import Failure
from fedclient.trainer.without_values import WithoutValues

_FOREVER = timedelta(days=365)
"""Jobs may be far between; whether a rank hangs is for the daemon to say."""
_PR_SET_PDEATHSIG = 1


class CannotPlaceError(RuntimeError):
    """The device is none for so many processes; the text says what to do."""


class Ranks(Team):
    """This process among several.

    Args:
        launcher: the connection to the launcher on this machine.
        local_rank: this process' number on this machine.
    """

    def __init__(self, launcher: socket.socket, local_rank: int) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.weight = 1 / self.world_size
        self.whole = os.environ[STRATEGY] != "fsdp"
        self._launcher = launcher
        self._local_rank = local_rank
        self._pipe: TeamPipe | None = None
        self.beside = int(os.environ["LOCAL_WORLD_SIZE"])
        self._jobs = self._meetings = self._step = 0
        self._seconds = 0.0
        self._group = dist.new_group(backend="gloo", timeout=_FOREVER)

    def told(self, table: Any = None) -> Any:
        """What rank 0 says, as JSON; the others are told it."""
        data = json.dumps(table, allow_nan=False).encode() if self.rank == 0 else b""
        size = torch.tensor([len(data)])
        dist.broadcast(size, 0, group=self._group)
        text = torch.empty(int(size), dtype=torch.uint8)
        if self.rank == 0:
            text.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(text, 0, group=self._group)
        return json.loads(text.numpy().tobytes())

    def go_alone(self) -> None:
        """See `Team`: it hears of a cancel at once."""
        if self._pipe is not None:
            self._pipe.alone = True
        self.idle()

    def all_true(self, mine: bool) -> bool:
        """Whether it is so at every rank."""
        found = torch.tensor([int(mine)])
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self._group)
        return bool(found)

    def first_says(self, mine: bool) -> bool:
        """See `Team`."""
        return bool(self.told(mine)) if not self.whole else mine

    def agree(self, step: int, seconds: float, saw: int | None = None) -> int | None:
        """See `Team`: whether the job is cancelled, and what time it is."""
        self._step = step
        self.weight = 1 / self.world_size
        self.meet()
        cancelled = self._pipe is not None and self._pipe.heard
        # Of the first two the others add nothing.
        said = [cancelled, seconds if self.rank == 0 else 0.0, saw is not None, saw or 0]
        words = torch.tensor(said, dtype=torch.float64)
        dist.all_reduce(words, group=self._group)
        over, self._seconds, counted, examples = words.tolist()
        if self._pipe is not None:
            self._pipe.agree(cancelled=bool(over))
        return int(examples) if counted else None

    def clock(self, seconds: float) -> float:  # noqa: ARG002 - its own would be another one
        """See `Team`."""
        return self._seconds

    def first(self, mine: float) -> float:
        """See `Team`."""
        self.meet()
        # Of what is not finite nothing finite is left.
        found = torch.tensor([mine if self.rank == 0 else mine * 0], dtype=torch.float64)
        dist.all_reduce(found, group=self._group)
        return float(found)

    def meet(self) -> None:
        """Say to the launcher that this rank waits for the others: who has not come yet may hang."""
        self._meetings += 1
        self._at()

    def idle(self) -> None:
        """Say to the launcher that this rank's part of a job is over: waiting for the next one is no hang."""
        self._say({"type": "idle"})

    def begin(self) -> None:
        """A job begins."""
        self._jobs += 1
        self._meetings = self._step = 0
        self._seconds = 0.0
        self._at()

    def alive(self) -> None:
        """Say to the launcher that this rank is at work, however long the others wait for it."""
        self._say({"type": "alive"})

    def _at(self) -> None:
        self._say({"type": "at", "job": self._jobs, "meeting": self._meetings, "step": self._step})

    def share(self, batch: Any) -> Share:
        """See `Team`."""
        return share_of(batch, self.rank, self.world_size)

    def summed(self, value: torch.Tensor) -> torch.Tensor:
        """See `Team`."""
        found = value.detach().clone()
        dist.all_reduce(found)
        return found

    def joined(self, value: torch.Tensor) -> torch.Tensor:
        """See `Team`: they may differ in length."""
        counts = torch.zeros(self.world_size, dtype=torch.int64)
        counts[self.rank] = len(value)
        dist.all_reduce(counts, group=self._group)
        parts = [value.new_zeros((int(counts.max()), *value.shape[1:])) for _ in range(self.world_size)]
        mine = torch.zeros_like(parts[0])
        mine[: len(value)] = value
        dist.all_gather(parts, mine)
        return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])

    def same_random(self, device: str) -> None:
        """See `Team`: what was drawn for batches of unequal size must not change the order of the data."""
        flat = flatten(take_random(device), "the random state")
        parts = [b"".join(bytes(view) for view in leaf.views()) for leaf in flat.leaves]
        shapes = [[leaf.dtype, list(leaf.shape)] for leaf in flat.leaves]
        told = self.told([flat.node, shapes, [part.hex() for part in parts]])
        give_random(rebuild(told[0], _Told(device, told[1], told[2])), device)

    def training(self, model: Any, ctx: Any) -> AbstractContextManager[object]:
        """See `Team`.

        Raises:
            TypeError: the model is no torch module.
        """
        if not isinstance(model, torch.nn.Module):
            raise TypeError(
                f"[distributed] of site.toml trains torch modules; build_model returned a {type(model).__name__}: "
                "leave it out"
            )
        return Replicas(model, self, ctx) if self.whole else Shards(model, self, ctx)

    def building(self, *, frozen_base: bool) -> AbstractContextManager[object]:
        """See `Team`: what no file of the run holds must be built with its values."""
        return nullcontext() if self.whole or frozen_base else WithoutValues()

    def laid_out(
        self,
        model: object,
        names: Mapping[str, str],
        *,
        frozen_base: bool,
        device: str,
        say: Callable[[str], None],
    ) -> tuple[State, OwnBase]:
        """See `Team`."""
        if self.whole or not isinstance(model, torch.nn.Module):
            return super().laid_out(model, names, frozen_base=frozen_base, device=device, say=say)
        base = OwnBase(TorchState(model, names, frozen_base=frozen_base)) if frozen_base else None
        if base:
            base.tensors(lambda: None)
        if not shard(model, self.world_size, device) and self.rank == 0:
            say(
                f"{type(model).__name__} has no parts that could be gathered one at a time, so each forward pass has "
                "it whole in every process: let its blocks be members of a ModuleList or Sequential, or name their "
                "classes in _no_split_modules of the model"
            )
        state = ShardedState(model, names, self, frozen_base=frozen_base)
        return state, base.moved_to(state) if base else OwnBase(state)

    def place(self, device: str) -> str:
        """See `Team`: a GPU of its own for each rank of a machine."""
        kind = device.partition(":")[0]
        if kind == "mps":
            raise CannotPlaceError(
                'device mps is for one process alone: leave [distributed] out of site.toml, or say devices = ["cpu"]'
            )
        if kind not in NUMBERED:
            return device
        if self._local_rank >= (count := torch.accelerator.device_count()):
            raise CannotPlaceError(f"[distributed] of site.toml wants a GPU for each process, and there are {count}")
        torch.accelerator.set_device_index(self._local_rank)
        return f"{kind}:{self._local_rank}"

    def lost(self, error: BaseException) -> bool:
        """See `Team`."""
        return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())

    def fail(self, failure: Failure) -> NoReturn:
        """Tell the launcher why this rank cannot go on, and wait for the end: the others would wait for it."""
        self._say({"type": "failed", **failure.to_json()})
        while True:
            signal.pause()

    def use(self, pipe: TeamPipe) -> None:
        """Agree with the others on what comes over the pipe."""
        self._pipe = pipe

    def _say(self, table: Mapping[str, Any]) -> None:
        self._launcher.sendall(to_line(table))


class TeamPipe:
    """The pipe to the daemon, as every rank sees it; stands for `Pipe`.

    All ranks receive the same, at the same places: rank 0 tells the others. What another rank sends goes nowhere.
    """

    def __init__(self, ranks: Ranks, pipe: Pipe | None) -> None:
        self._ranks = ranks
        self._pipe = pipe
        self._cancelled = False
        self._telling = threading.Lock()
        self._progress: Mapping[str, Any] | None = None
        """What was last told of the job under way."""
        self.alone = False
        """Whether nothing is to be agreed on until the next job."""

    def receive(self) -> dict[str, Any]:
        """See `Pipe`."""
        self._ranks.idle()
        self.alone = False
        message: dict[str, Any] = self._ranks.told(self._pipe.receive() if self._pipe else None)
        self._cancelled = False
        self._ranks.begin()
        return message

    def shard(self, wait: float) -> str | None:
        """See `Pipe`."""
        name: str | None
        name, self._cancelled = self._ranks.told(
            [self._pipe.shard(wait), self._pipe.cancelled()] if self._pipe else None
        )
        return name

    @property
    def heard(self) -> bool:
        """Whether this very process was told that the job is cancelled."""
        return self._pipe is not None and self._pipe.cancelled()

    def agree(self, *, cancelled: bool) -> None:
        """Take up whether the job is cancelled, as all ranks know it now."""
        self._cancelled = cancelled

    def cancelled(self) -> bool:
        """Whether the job was cancelled when that was last agreed on."""
        return self.heard if self.alone else self._cancelled

    def send(self, kind: str, table: Mapping[str, Any]) -> None:
        """See `Pipe`; a failure is the launcher's to tell."""
        if kind == "failed" and table["reason"] != "cancelled":
            self._ranks.fail(Failure.from_json(table))
        # Those who wait for this one learn in this way that it is at work.
        self._ranks.alive()
        if self._pipe:
            with self._telling:
                if kind != "wrote":
                    self._progress = {**table, "note": ""} if kind == "progress" else None
                self._pipe.send(kind, table)

    def relay(self) -> None:
        """Another rank is at work, which this one may be waiting for: the daemon hears of it as of this one's own."""
        with self._telling:
            if self._pipe and self._progress is not None:
                self._pipe.send("progress", self._progress)


def join() -> tuple[Ranks, TeamPipe]:
    """Meet the other ranks, as the environment of torch's launcher says."""
    if sys.platform == "linux":
        # The launcher starts each rank in a session of its own; also one that is stopped ends with it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    home = Path(os.environ.pop(SOCKET)).parent
    launcher = socket.socket(socket.AF_UNIX)
    launcher.connect(_reachable(home / "socket"))
    launcher.sendall(to_line({"type": "rank", "rank": rank, "pid": os.getpid()}))
    _, fds, _, _ = socket.recv_fds(launcher, 1, 1)
    heard = _Heard()
    threading.Thread(target=_end_with, args=(launcher, heard), name="fedclient-launcher", daemon=True).start()
    kind = best_device().partition(":")[0]
    backend = f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}" if kind in NUMBERED else "gloo"
    if int(os.environ["LOCAL_WORLD_SIZE"]) == world_size:
        where = f"file://{home / 'store'}"
        dist.init_process_group(backend, init_method=where, rank=rank, world_size=world_size, timeout=_FOREVER)
    else:
        dist.init_process_group(backend, timeout=_FOREVER)
    ranks = Ranks(launcher, int(os.environ["LOCAL_RANK"]))
    pipe = TeamPipe(ranks, Pipe(fds[0]) if fds else None)
    ranks.use(pipe)
    heard.pipe = pipe
    return ranks, pipe


def _reachable(path: Path) -> str:
    from fedclient.trainer.launcher import short  # noqa: PLC0415 - it is the program that started this one

    return short(path)


class _Heard:
    """Who is told of other ranks' signs of life, once there is somebody."""

    pipe: TeamPipe | None = None


def _end_with(launcher: socket.socket, heard: _Heard) -> None:
    while launcher.recv(1):
        if heard.pipe is not None:
            heard.pipe.relay()
    end_group()


class _Told:
    """Leaves that came from another rank, for `nested.rebuild`."""

    def __init__(self, device: str, shapes: list[Any], parts: list[str]) -> None:
        self.device = device
        self._shapes = shapes
        self._parts = parts

    def leaf(self, number: int) -> tuple[str, tuple[int, ...]]:
        dtype, shape = self._shapes[number]
        return dtype, tuple(shape)

    def mapped(self, _number: int) -> None:
        return None

    def fill(self, number: int, view: memoryview) -> None:
        view[:] = bytes.fromhex(self._parts[number])
