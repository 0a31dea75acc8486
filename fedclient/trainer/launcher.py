"""Starts several trainer processes by torch's elastic launcher, and says in their name what became of them.

    python -m fedclient.trainer.launcher --processes 2 --home DIRECTORY FD

FD is the trainer's end of the pipe to the daemon; when it closes, all ends. The launcher gives it to rank 0, which
speaks for all (`fedclient.trainer.ranks`), over a socket in DIRECTORY.0 (or .1 beside another one), that only this
user can reach. Every rank of this machine stays connected there: it ends when the launcher does, and tells why it
failed before it is killed. On other machines FD is `fedclient join`'s, which hears by a byte that ranks are there.
No TCP port is opened by us on one machine; torch's own processes meet over a file, and connect by loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedclient.trainer.descent import kill_descendants
from fedclient.trainer.places import Places
from fedclient.trainer.team import SOCKET, STRATEGY, python_command, to_line
from fedclient.trainer.wire import MAX_LINE, FailReason, Failure
from fedlink.lock import take

_GRACE = 1.5
"""Seconds in which a rank that died may be found, once another has failed: the first is then the cause."""
_WORKER = "fedclient.trainer.worker"
_BESIDE = 64
"""Launchers of one workload and device that may work at the same time."""


class Watch:
    """What the ranks of this machine say, and the one verdict on them.

    Args:
        path: where to listen.
        options: of this program.
    """

    def __init__(self, path: str, options: argparse.Namespace) -> None:
        self._options = options
        self._pipe: int = options.pipe
        self._stall_after: float = options.stall_after
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._told: queue.Queue[Failure] = queue.Queue()
        self._places = Places()
        self._first: socket.socket | None = None
        """The connection to rank 0."""
        self._groups: list[int] = []
        """Of the ranks, each of which leads one."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        for work in (self._accept, self._follow, self._find_stalled, self._end_with_parent):
            threading.Thread(target=work, name="fedclient-ranks", daemon=True).start()

    def end(self, failure: Failure) -> None:
        """Tell the daemon, if nobody has yet, and kill every process."""
        with self._lock:
            with contextlib.suppress(OSError):
                line = to_line({"type": "failed", **failure.to_json()})
                socket.socket(fileno=os.dup(self._pipe)).sendall(line)
            print(f"fedclient: {failure.text or failure.exception_class}", file=sys.stderr, flush=True)  # noqa: T201 - the site's log
            # The ranks would end with this process, but not what they started; also what a dead one did.
            kill_descendants(os.getpid(), also=self._groups)
            os.kill(os.getpid(), signal.SIGKILL)

    def died(self, rank: int, code: int) -> None:
        """A rank's process is gone, by itself: one that has something to say waits to be ended."""
        step = self._places.step(rank)
        ended = f"by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"with exit code {code}"
        text = f"rank {rank} of the trainer's processes ended {ended}, step {step}"
        self.end(Failure(FailReason.CRASHED, text=text, exit_code=code, step=step))

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._hear, args=(connection,), name="fedclient-rank", daemon=True).start()

    def _hear(self, connection: socket.socket) -> None:
        rank = -1
        with connection.makefile("rb") as lines:
            while (line := lines.readline(MAX_LINE)).endswith(b"\n"):
                message: Mapping[str, Any] = json.loads(line)
                if message["type"] == "rank":
                    rank = int(message["rank"])
                    self._groups.append(int(message["pid"]))
                    self._places.idle(rank)
                    if rank == 0:
                        socket.send_fds(connection, [b"\n"], [self._pipe])
                        self._first = connection
                    else:
                        connection.sendall(b"\n")
                    if self._options.node:
                        os.write(self._pipe, b"\n")
                elif message["type"] == "at":
                    self._places.at(rank, message["job"], message["meeting"], message["step"])
                elif message["type"] == "idle":
                    self._places.idle(rank)
                elif message["type"] == "alive":
                    self._places.alive(rank)
                    self._relay(rank)
                else:
                    self._told.put(Failure.from_json(message))

    def _relay(self, rank: int) -> None:
        """Let the daemon hear, through rank 0, that another rank is at work that rank 0 may be waiting for."""
        if rank and self._first is not None:
            # A rank 0 that is stopped reads nothing, and is not to be waited for.
            with contextlib.suppress(OSError):
                self._first.send(b"\n", socket.MSG_DONTWAIT)

    def _follow(self) -> None:
        failure = self._told.get()
        # If another rank was killed, this one's trouble is that it lost it: that is found in the meantime.
        time.sleep(_GRACE)
        self.end(failure)

    def _find_stalled(self) -> None:
        while self._stall_after:
            time.sleep(min(1.0, self._stall_after / 20))
            if not self._options.node and not self._groups:
                self._find_lacking()
            # A little before the daemon, which would not know which of them it is.
            behind, step = self._places.stalled(0.9 * self._stall_after)
            if behind:
                who = "rank " + " and ".join(map(str, behind))
                text = (
                    f"{who} of the trainer's processes made no progress for {self._stall_after:g} s while the others "
                    f"waited for it, step {step}; all were killed"
                )
                self.end(Failure(FailReason.STALLED, text=text, step=step))

    def _find_lacking(self) -> None:
        """No rank is there yet: torch starts them when all machines have come."""
        nodes, rendezvous = self._options.nodes, self._options.rendezvous
        if nodes > 1 and time.monotonic() - self._began > 0.9 * self._stall_after:
            text = (
                f"{nodes} machines were to come to rendezvous {rendezvous}, and not all did within "
                f"{self._stall_after:g} s: run `fedclient join` on the others"
            )
            self.end(Failure(FailReason.STALLED, text=text))

    def _end_with_parent(self) -> None:
        closing = select.poll()
        # Nothing is read, which is for rank 0 to do: it is told of the other end's closing alone.
        closing.register(self._pipe, 0)
        closing.poll()
        self.end(Failure(FailReason.CRASHED, text="whoever started the trainer's processes is gone; they end"))


def main() -> int:
    """Launch, and wait; does not return unless nothing could be launched."""
    options = _options()
    processes = _processes(options)
    if processes * options.nodes == 1 and options.strategy == "ddp":
        os.set_inheritable(options.pipe, True)
        os.execv(sys.executable, [sys.executable, *python_command(_WORKER, [str(options.pipe)])])  # noqa: S606 - ourselves
    options.home, _held = _own(options.home)
    watch = Watch(short(options.home / "socket"), options)
    os.environ[SOCKET], os.environ[STRATEGY] = str(options.home / "socket"), options.strategy
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "2")
    try:
        _launch(options, processes)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the daemon waits to hear of it
        failures = getattr(error, "failures", None)
        if failures:
            # torch's agent has ended those that were left.
            rank = min(failures, key=lambda r: (failures[r].exitcode == -signal.SIGTERM, r))
            watch.died(rank, failures[rank].exitcode)
        text = f"the trainer's {processes} processes could not be started: {type(error).__name__}: {error}"
        watch.end(Failure(FailReason.CRASHED, type(error).__name__, text=text))
    watch.end(Failure(FailReason.CRASHED, text="the trainer's processes ended by themselves"))
    return 1


def _own(home: Path) -> tuple[Path, int]:
    """An empty directory beside which no other launcher works, as of a command next to another; and what holds it.

    What an earlier launcher left there is deleted: they all end by SIGKILL.
    """
    home.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for number in range(_BESIDE):
        own = home.with_name(f"{home.name}.{number}")
        held = os.open(f"{own}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if take(held):
            shutil.rmtree(own, ignore_errors=True)
            own.mkdir(mode=0o700)
            return own, held
        os.close(held)
    raise SystemExit(f"fedclient: {home}.0.lock and {_BESIDE - 1} others cannot be locked")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def short(path: Path) -> str:
    """A path by which a socket can be reached: theirs may have about a hundred letters only."""
    directory = Path("/proc/self/fd")
    if len(os.fsencode(path)) < 100 or not directory.is_dir():
        return str(path)
    return str(directory / str(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) / path.name)


def _launch(options: argparse.Namespace, processes: int) -> None:
    # It takes seconds, which a process that trains alone need not spend.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs  # noqa: PLC0415
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415

    if options.nodes == 1:
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
        # Else the agent would open a TCP store, which knows no password, to every network.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        meeting: dict[str, Any] = {
            "rdzv_backend": "c10d",
            "rdzv_endpoint": str(options.home / "rendezvous"),
            "rdzv_configs": {"store_type": "file"},
            "local_addr": "localhost",
        }
    else:
        meeting = {
            "rdzv_backend": "static",
            "rdzv_endpoint": options.rendezvous,
            "rdzv_configs": {"rank": options.node, "timeout": 86400},
        }
    config = LaunchConfig(
        min_nodes=options.nodes,
        max_nodes=options.nodes,
        nproc_per_node=processes,
        run_id="fedclient",
        max_restarts=0,
        # Else it makes one in the directory for temporary files, and leaves it there.
        logs_specs=DefaultLogsSpecs(str(options.home / "logs")),
        **meeting,
    )
    elastic_launch(config, sys.executable)(*python_command(_WORKER))


def _processes(options: argparse.Namespace) -> int:
    if options.processes != "auto":
        return int(options.processes)
    if options.device == "cpu":
        return 1
    import torch  # noqa: PLC0415 - only where it must be asked

    return max(1, torch.accelerator.device_count())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fedclient.trainer.launcher")
    parser.add_argument("--processes", default="auto")
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--node", type=int, default=0)
    parser.add_argument("--rendezvous", default="")
    parser.add_argument("--stall-after", type=float, default=0.0)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("pipe", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
