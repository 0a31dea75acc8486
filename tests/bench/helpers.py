"""Processes of the benchmark's own beside a server: they are told a line, and answer one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedlink.v1 import admin_service_pb2 as pb
from tests.bench.floor import ended
from tests.bench.place import REPOSITORY, BenchError
from tests.support.federation import Federation

WORKLOAD = "bench"
"""That helpers offer, and runs name."""


class Helper:
    """A process that answers each line with one JSON object.

    Args:
        process: with pipes.
        name: for people.
    """

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self._process = process
        self._name = name

    def tell(self, line: str) -> None:
        """Send it a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Its next answer; waits for it.

        Raises:
            BenchError: it has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"{self._name} ended with {self._process.wait()}; what it said is above")
        found: dict[str, Any] = json.loads(line)
        return found


@contextlib.contextmanager
def helper(module: str, *arguments: str, prefix: tuple[str, ...] = ()) -> Iterator[Helper]:
    """A module of the benchmark in a process of its own, behind a command that starts it, if there is one."""
    command = [*prefix, sys.executable, "-m", f"tests.bench.{module}", *arguments]
    with ended(command, cwd=REPOSITORY) as process:
        yield Helper(process, module)


@contextlib.contextmanager
def federation_below(directory: Path, model: Mapping[str, np.ndarray]) -> Iterator[Federation]:
    """A server without sites, with a model imported as "start", in a directory that is removed in the end."""
    directory.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="server-", dir=directory.resolve()) as root,
        Federation(Path(root)) as federation,
    ):
        federation.start_server()
        federation.import_model("start", model)
        yield federation


def create_run(federation: Federation, name: str, clients: int) -> None:
    """Create a run of one round, by the call itself: a command would first take half a second to begin."""
    table = {"name": name, "workload": WORKLOAD, "model": "start", "rounds": 1, "cohort": {"min_clients": clients}}
    request = pb.CreateRunRequest(spec_json=json.dumps(table), request_id=os.urandom(16))
    with federation.admin() as stub:
        stub.CreateRun(request, timeout=120)


def stop_run(federation: Federation, name: str) -> None:
    """End it; its updates go."""
    with federation.admin() as stub:
        stub.StopRun(pb.StopRunRequest(run=name), timeout=120)
