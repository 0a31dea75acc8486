"""How long a round takes when training takes no time: real server, daemons, trainers, database and disk.

    python -m tests.bench.bench_round MODEL CLIENTS ROUNDS [--trainer torch] [--tls] [--dir DIR] [--keep]

A line for each round goes to stderr; the last line of stdout is one JSON object. docs/performance.md says what each
number is and how it comes about.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from fedlink.v1 import admin_service_pb2 as pb
from tests.bench import weights
from tests.bench.place import CHECKED_FIRST, HERE, REPOSITORY, BenchError, check_place, tail
from tests.bench.processes import Sampler, allocated
from tests.bench.record import Record
from tests.bench.setting import Mutual, Setting
from tests.support.federation import Daemon, Federation, program

MODELS = ("bare", "tiny", "resnet18", "gpt2", "gpt2-medium", "gpt2-xl")
TRAINERS = {"numpy": "adds", "torch": "adds_torch"}
"""Modules of the training, by what it trains with."""
RUN = "bench"
_SETTLED = 1.0
_SAY_EVERY = 1.0


@dataclass
class Bench:
    """One measurement in a directory of its own."""

    model: str
    clients: int
    rounds: int
    root: Path
    say: Callable[[str], None]
    trainer: str = "numpy"
    setting: Setting = field(default_factory=Setting)
    versions: dict[int, weights.Version] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.record = Record(self.model, self.clients, self.rounds, self.root)
        self._said = 0.0

    def run(self) -> dict[str, Any]:
        """Measure, and answer the JSON object."""
        with self.setting.federation(self.root) as federation, Sampler(federation.data_dir) as sampler:
            self._start(federation, sampler)
            self._import(federation)
            federation.create_run(
                RUN, workload="bench", model="initial", rounds=self.rounds, cohort={"min_clients": self.clients}
            )
            self._follow(federation, sampler)
            left = _settled_size(federation.data_dir)
            for number in sorted({self.rounds - 1, self.rounds} - self.versions.keys()):
                self._hold(federation, number)
        # The processes are gone: nobody is disturbed by the comparison.
        deviations = self._deviations()
        return self.record.result(sampler, left, deviations)

    # --- The federation

    def _start(self, federation: Federation, sampler: Sampler) -> None:
        self.setting.start_server(federation)
        assert federation.server is not None
        sampler.watch(federation.server.pid, "server", summed=True)
        module = TRAINERS[self.trainer]
        for number in range(self.clients):
            name, data = f"site-{number:02}", {"model": self.model, "number": number}
            site = federation.site(
                name,
                f"{module}:Adds",
                start=False,
                workload="bench",
                source=HERE / f"{module}.py",
                data=data,
                extra=self.setting.site(federation, name),
            )
            shutil.copy(HERE / "workload.py", site.directory)
            sampler.watch(site.start().pid, "daemons")

    def _import(self, federation: Federation) -> None:
        self.say(f"writing and importing {self.model}, {weights.size(self.model) / 1e6:.0f} MB")
        scratch = self.root / "import"
        scratch.mkdir()
        path = scratch / "initial.safetensors"
        weights.write_initial(self.model, path)
        command = [program("fedserver"), "model", "import", str(path), "--data-dir", str(federation.data_dir)]
        # The command converts the files in TMPDIR, which may be in memory.
        importing = Daemon(command, self.root / "import.log", cwd=self.root, env=os.environ | {"TMPDIR": str(scratch)})
        try:
            while importing.running:
                self._check_processes(federation)
                time.sleep(0.05)
            if code := importing.wait():
                raise BenchError(f"`fedserver model import` ended with {code}:\n{tail(importing.log)}")
        finally:
            importing.clean()
        shutil.rmtree(scratch)

    def _check_processes(self, federation: Federation) -> None:
        daemons: dict[str, Daemon | None] = {"the server": federation.server}
        daemons |= {name: site.daemon for name, site in federation.sites.items()}
        for name, daemon in daemons.items():
            if daemon is not None and not daemon.running:
                code = daemon.process.returncode
                raise BenchError(f"{name} ended with exit code {code}; the end of its log:\n{tail(daemon.log)}")

    # --- The run

    def _follow(self, federation: Federation, sampler: Sampler) -> None:
        """Take the run's events until it has ended."""
        events: queue.Queue[pb.WatchRunResponse | Exception] = queue.Queue()
        threading.Thread(target=_watch, args=(federation, events), daemon=True).start()
        while True:
            self._check_processes(federation)
            try:
                event = events.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(event, Exception):
                self._check_processes(federation)
                raise BenchError(f"the server's events ended: {event}") from event
            data = json.loads(event.data_json)
            if event.kind == "round_committed":
                self.record.cpu.append(sampler.cpu_seconds())
                self.record.commits.append((event.time.ToMilliseconds() / 1000, data))
                if data["round"] <= min(CHECKED_FIRST, self.rounds - 1):
                    if data["round"] == 1:
                        self._hold(federation, 0)
                    self._hold(federation, data["round"])
                self._say_round(sampler)
            elif event.kind == "run_ended":
                if data["state"] != "completed":
                    raise BenchError(f"the run {data['state']}: {data['reason']}\n{self._logs(federation)}")
                return
            elif event.kind in ("task_failed", "task_refused", "task_retried", "round_failed"):
                self.say(f"{event.kind.replace('_', ' ')}: {data}")

    def _say_round(self, sampler: Sampler) -> None:
        # Reading the logs for a line takes longer than a round of a small model does.
        if time.monotonic() - self._said >= _SAY_EVERY:
            self.say(self.record.line(sampler))
            self._said = time.monotonic()

    def _hold(self, federation: Federation, number: int) -> None:
        with federation.admin() as stub:
            name = f"{RUN}@{number}"
            try:
                manifest = stub.GetModel(pb.GetModelRequest(name=name)).model.manifest.digest
            except grpc.RpcError as e:
                self._check_processes(federation)
                raise BenchError(f"version {number} cannot be compared: {e.details()}") from e
        target = self.root / "versions" / str(number)
        try:
            self.versions[number] = weights.Version.hold(federation.data_dir, manifest, target)
        except FileNotFoundError as e:
            raise BenchError(f"version {number} was deleted before it could be compared: {e}") from e

    def _deviations(self) -> dict[int, dict[str, float]]:
        """What `weights.deviation` finds for each round both of whose versions are held."""
        found = {}
        for number in sorted(self.versions):
            if number - 1 in self.versions:
                before, after = self.versions[number - 1], self.versions[number]
                found[number] = weights.deviation(before, after, self.clients)
                before.release()
                self.say(f"round {number}: largest deviation from the exact average {found[number]['deviation']:.3g}")
        return found

    def _logs(self, federation: Federation) -> str:
        logs = [self.root / "server.log", *sorted(self.root.glob("site-*.log"))]
        logs += sorted(federation.root.glob("sites/*/fedclient-state/trainers/*.log"))
        return "\n".join(f"--- {log.relative_to(self.root)}\n{tail(log)}" for log in logs)


def bench(
    model: str,
    clients: int,
    rounds: int,
    directory: Path,
    *,
    trainer: str = "numpy",
    setting: Setting | None = None,
    keep: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure in a new directory below `directory`, which is removed in the end unless it shall be kept.

    Args:
        model: one of `MODELS`.
        clients: sites.
        rounds: in all; the first one only warms up.
        directory: on a disk.
        trainer: one of `TRAINERS`.
        setting: where the federation stands; by default on loopback without TLS.
        keep: leave everything in the directory.
        say: told a line for each round, and what goes wrong.

    Raises:
        BenchError: it cannot be measured here, or a process failed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    check_place(model, clients, rounds, directory)
    root = Path(tempfile.mkdtemp(prefix="round-", dir=directory.resolve()))
    try:
        return Bench(model, clients, rounds, root, say, trainer, setting or Setting()).run()
    finally:
        if keep:
            say(f"kept {root}")
        else:
            shutil.rmtree(root)


def fresh_processes() -> None:
    """Have every process started afresh, as a user does: one that the tests fork has imported what it does not need."""
    os.environ["TESTS_FORK"] = "0"


def interruptible() -> None:
    """Whatever ends this process, what it started ends too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def _watch(federation: Federation, events: queue.Queue[pb.WatchRunResponse | Exception]) -> None:
    try:
        with federation.admin() as stub:
            for event in stub.WatchRun(pb.WatchRunRequest(run=RUN)):
                events.put(event)
    except grpc.RpcError as e:
        events.put(e)
    else:
        # Nobody reads it after `run_ended`; without that, it ends the waiting.
        events.put(BenchError("the run did not end"))


def _settled_size(directory: Path) -> int:
    """The size of a directory once it has stopped changing."""
    size, since = allocated(directory), time.monotonic()
    while time.monotonic() - since < _SETTLED:
        time.sleep(0.1)
        if (now := allocated(directory)) != size:
            size, since = now, time.monotonic()
    return size


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="bench-round", description="Measure a round whose training takes no time.")
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("clients", type=int)
    parser.add_argument("rounds", type=int)
    parser.add_argument("--trainer", choices=TRAINERS, default="numpy", help="what it trains with")
    parser.add_argument("--tls", action="store_true", help="mutual TLS")
    parser.add_argument("--dir", type=Path, default=REPOSITORY / ".bench", help="on a disk; 4 + 3 CLIENTS models large")
    parser.add_argument("--keep", action="store_true", help="leave everything in the directory")
    given = parser.parse_args()
    interruptible()
    fresh_processes()
    try:
        result = bench(
            given.model,
            given.clients,
            given.rounds,
            given.dir,
            trainer=given.trainer,
            setting=Mutual() if given.tls else None,
            keep=given.keep,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except BenchError as e:
        print(f"bench-round: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench-round: interrupted; its processes are ended, its directory is removed", file=sys.stderr)
        return 130
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
