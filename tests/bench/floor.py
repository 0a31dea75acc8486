"""The floor under a round: `tcp_round.py` in a process of its own, timed, with its CPU seconds."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.place import HERE, BenchError

PROGRAM = HERE / "tcp_round.py"


@dataclass(frozen=True)
class Floor:
    """What some rounds of raw TCP took."""

    rounds: tuple[float, ...]
    """Seconds of each."""
    cpu: float
    """User and system seconds of all its processes, their start included."""


def raw_tcp(nbytes: int, clients: int, rounds: int, directory: Path) -> Floor:
    """Move and add `nbytes` for each client.

    Args:
        nbytes: of the model.
        clients: of the round.
        rounds: to do.
        directory: on the disk that Fedlink is measured on.

    Raises:
        BenchError: it failed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(PROGRAM), str(nbytes), str(clients), str(rounds)]
    with ended(command, TMPDIR=str(directory)) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BenchError(f"{PROGRAM.name} ended with {process.returncode}")
    return Floor(tuple(json.loads(said)["rounds"]), used.ru_utime + used.ru_stime)


@contextlib.contextmanager
def ended(command: Sequence[str], *, cwd: Path | None = None, **env: str) -> Iterator[subprocess.Popen[str]]:
    """A process with pipes, in a group of its own that ends with the context, whatever it started included."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
