"""Starts several trainer processes by torch's elastic launcher, and says in their name what became of them.

    python -m fedclient.trainer.launcher --processes 2 --home DIRECTORY FD

FD is the trainer's end of the pipe to the daemon. The launcher gives it to rank 0, which speaks for all
(`fedclient.trainer.ranks`), over a socket in DIRECTORY, that only this user can reach. Every rank of this
machine stays connected there: it ends when the launcher does, and tells why it failed before it is killed.
No TCP port is opened by us on one machine; torch's own processes meet over a file, and connect by loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedclient.trainer.places import Places
from fedclient.trainer.team import SOCKET, STRATEGY, python_command, to_line
from fedclient.trainer.wire import MAX_LINE, FailReason, Failure

_GRACE = 1.5
"""Seconds in which a rank that died may be found, once another has failed: the first is then the cause."""
_WORKER = "fedclient.trainer.worker"


class Watch:
    """What the ranks of this machine say, and the one verdict on them.

    Args:
        path: where to listen.
        pipe: the descriptor for rank 0; None on a machine that it is not on.
        stall_after: seconds after which a rank that the others wait for counts as hanging; 0: never.
    """

    def __init__(self, path: str, pipe: int | None, stall_after: float) -> None:
        self._pipe = pipe
        self._stall_after = stall_after
        self._lock = threading.Lock()
        self._told: queue.Queue[Failure] = queue.Queue()
        self._places = Places()
        self._first: socket.socket | None = None
        """The connection to rank 0."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        for work in (self._accept, self._follow, self._find_stalled):
            threading.Thread(target=work, name="fedclient-ranks", daemon=True).start()

    def end(self, failure: Failure) -> None:
        """Tell the daemon, if nobody has yet, and kill every process."""
        with self._lock:
            if self._pipe is not None:
                with contextlib.suppress(OSError):
                    line = to_line({"type": "failed", **failure.to_json()})
                    socket.socket(fileno=os.dup(self._pipe)).sendall(line)
            print(f"fedclient: {failure.text or failure.exception_class}", file=sys.stderr, flush=True)  # noqa: T201 - the site's log
            # The ranks, which lead sessions of their own, end with this process.
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
                    self._places.idle(rank)
                    if rank == 0 and self._pipe is not None:
                        socket.send_fds(connection, [b"\n"], [self._pipe])
                        self._first = connection
                    else:
                        connection.sendall(b"\n")
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
            # A little before the daemon, which would not know which of them it is.
            behind, step = self._places.stalled(0.9 * self._stall_after)
            if behind:
                who = "rank " + " and ".join(map(str, behind))
                text = (
                    f"{who} of the trainer's processes made no progress for {self._stall_after:g} s while the others "
                    f"waited for it, step {step}; all were killed"
                )
                self.end(Failure(FailReason.STALLED, text=text, step=step))


def main() -> int:
    """Launch, and wait; does not return unless nothing could be launched."""
    options = _options()
    processes = _processes(options)
    if processes * options.nodes == 1:
        os.set_inheritable(options.pipe, True)
        os.execv(sys.executable, [sys.executable, *python_command(_WORKER, [str(options.pipe)])])  # noqa: S606 - ourselves
    home = options.home
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True, mode=0o700)
    path = short(home / "socket")
    watch = Watch(path, options.pipe, options.stall_after)
    os.environ[SOCKET], os.environ[STRATEGY] = str(home / "socket"), options.strategy
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
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


def short(path: Path) -> str:
    """A path by which a socket can be reached: theirs may have about a hundred letters only."""
    directory = Path("/proc/self/fd")
    if len(os.fsencode(path)) < 100 or not directory.is_dir():
        return str(path)
    return str(directory / str(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) / path.name)


def _launch(options: argparse.Namespace, processes: int) -> None:
    # It takes seconds, which a process that trains alone need not spend.
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
    parser.add_argument("pipe", type=int, nargs="?")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
