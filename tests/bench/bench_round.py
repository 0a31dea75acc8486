"""How long a round takes when training takes no time: real server, daemons, trainers, database and disk.

    python -m tests.bench.bench_round MODEL CLIENTS ROUNDS [--dir DIR] [--keep]

A line for each round goes to stderr; the last line of stdout is one JSON object. docs/benchmark.md says what each
number is and how it comes about.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from fedlink.v1 import admin_service_pb2 as pb
from tests.bench import weights
from tests.bench.processes import Sampler, Tree, allocated
from tests.support.federation import Daemon, Federation, program

MODELS = ("resnet18", "gpt2", "gpt2-medium", "gpt2-xl")
RUN = "bench"
HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
PHASES = {"downloaded": "down_s", "computed": "train_s", "accepted": "up_s"}
"""What a daemon's log says at the end of each phase of a task."""
CHECKED_FIRST = 3
"""So many rounds from the first, and the last one, are compared with the exact average."""
IN_MEMORY = ("tmpfs", "ramfs")
"""File systems that are no disk."""
_LONGEST_PATH = 65
_SETTLED = 1.0


class BenchError(Exception):
    """The benchmark cannot go on; the message says why."""


@dataclass
class Bench:
    """One measurement in a directory of its own."""

    model: str
    clients: int
    rounds: int
    root: Path
    say: Callable[[str], None]
    load: float = field(default_factory=lambda: round(os.getloadavg()[0], 2))
    commits: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    """Time and data of every `round_committed`."""
    cpu: list[dict[str, float]] = field(default_factory=list)
    """CPU seconds that each part had used when each round had been committed."""
    versions: dict[int, weights.Version] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Measure, and answer the JSON object."""
        with Federation(self.root) as federation, Sampler(federation.data_dir) as sampler:
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
        return self._result(sampler, self._phases(), left, deviations)

    # --- The federation

    def _start(self, federation: Federation, sampler: Sampler) -> None:
        federation.start_server()
        assert federation.server is not None
        sampler.watch(federation.server.pid, "server", summed=True)
        for number in range(self.clients):
            data = {"model": self.model, "number": number}
            site = federation.site(
                f"site-{number:02}", "adds:Adds", start=False, workload="bench", source=HERE / "adds.py", data=data
            )
            shutil.copy(HERE / "workload.py", site.directory)
            sampler.watch(site.start().pid, "daemons")

    def _import(self, federation: Federation) -> None:
        self.say(f"writing and importing {self.model}, {weights.size(self.model) / 1e6:.0f} MB")
        scratch = self.root / "import"
        scratch.mkdir()
        path = scratch / "initial.safetensors"
        command = [sys.executable, "-m", "tests.bench.weights", self.model, str(path)]
        self._command(federation, command, REPOSITORY)
        command = [program("fedserver"), "model", "import", str(path), "--data-dir", str(federation.data_dir)]
        # The command converts the files in TMPDIR, which may be in memory.
        self._command(federation, command, self.root, TMPDIR=str(scratch))
        shutil.rmtree(scratch)

    def _command(self, federation: Federation, command: list[str], cwd: Path, **env: str) -> None:
        log = self.root / "command.log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, cwd=cwd, env=os.environ | env)
        try:
            while process.poll() is None:
                self._check_processes(federation)
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            raise BenchError(f"{' '.join(command)} ended with {process.returncode}:\n{_tail(log)}")

    def _check_processes(self, federation: Federation) -> None:
        daemons: dict[str, Daemon | None] = {"the server": federation.server}
        daemons |= {name: site.daemon for name, site in federation.sites.items()}
        for name, daemon in daemons.items():
            if daemon is not None and not daemon.running:
                code = daemon.process.returncode
                raise BenchError(f"{name} ended with exit code {code}; the end of its log:\n{_tail(daemon.log)}")

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
                self.cpu.append(sampler.cpu_seconds())
                self.commits.append((event.time.ToMilliseconds() / 1000, data))
                if data["round"] <= min(CHECKED_FIRST, self.rounds - 1):
                    if data["round"] == 1:
                        self._hold(federation, 0)
                    self._hold(federation, data["round"])
                self.say(self._line(sampler))
            elif event.kind == "run_ended":
                if data["state"] != "completed":
                    raise BenchError(f"the run {data['state']}: {data['reason']}\n{self._logs(federation)}")
                return
            elif event.kind in ("task_failed", "task_refused", "task_retried", "round_failed"):
                self.say(f"{event.kind.replace('_', ' ')}: {data}")

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

    # --- The numbers

    def _phases(self) -> dict[int, dict[str, list[float]]]:
        """Seconds of each phase by round, one for each client, from the daemons' logs."""
        found: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for log in sorted(self.root.glob("site-*.log")):
            for line in log.read_text(errors="replace").splitlines():
                record = json.loads(line) if line.startswith("{") else {}
                if record.get("event") in PHASES and "seconds" in record:
                    found[record["round"]][PHASES[record["event"]]].append(record["seconds"])
        return found

    def _line(self, sampler: Sampler) -> str:
        number, took = len(self.commits), self._took()
        phases = self._phases()[number]
        means = "  ".join(f"{name} {statistics.median(phases[name]):.2f}" for name in PHASES.values() if phases[name])
        data = self.commits[-1][1]
        warm = f"{took[-1]:7.2f} s" if took else "warm-up"
        cpu = f"cpu_s {sum(self.cpu[-1].values()) - sum(self.cpu[-2].values()):.1f}  " if took else ""
        memory = sampler.trees[0].peak_together / 1e6
        return (
            f"round {number} of {self.rounds}: {warm}  {means}  aggregate_s {data['aggregate_seconds']:.2f}  {cpu}"
            f"server peak {memory:.0f} MB  disk {allocated(self.root / 'server') / 1e6:.0f} MB"
        )

    def _took(self) -> list[float]:
        times = [at for at, _ in self.commits]
        return [round(b - a, 3) for a, b in itertools.pairwise(times)]

    def _disk(self, samples: list[tuple[float, int]], left: int) -> tuple[list[int], list[int]]:
        """What each round left on the server's disk (the least there was in the next), and the most during each."""
        ends = [at for at, _ in self.commits]
        inside = [[size for at, size in samples if a <= at < b] for a, b in itertools.pairwise([0.0, *ends])]
        least = [min(sizes, default=0) for sizes in inside[1:]]
        return [*least, left], [max(sizes, default=0) for sizes in inside]

    def _result(
        self,
        sampler: Sampler,
        phases: dict[int, dict[str, list[float]]],
        left: int,
        deviations: dict[int, dict[str, float]],
    ) -> dict[str, Any]:
        measured = range(2, self.rounds + 1)
        server: Tree = sampler.trees[0]
        sites = sampler.trees[1:]
        records = [data for _, data in self.commits[1:]]
        after, during = self._disk(sampler.disk, left)
        return {
            "model": self.model,
            "clients": self.clients,
            "round_s": _median(self._took()),
            **{p: _median(s for n in measured for s in phases[n][p]) for p in PHASES.values()},
            "aggregate_s": _median(r["aggregate_seconds"] for r in records),
            "cpu_s": _median(sum(b.values()) - sum(a.values()) for a, b in itertools.pairwise(self.cpu)),
            "server_peak_rss_bytes": max(server.peak_together, server.peak_root),
            "client_peak_rss_bytes": max(t.peak_root for t in sites),
            "trainer_peak_rss_bytes": max(t.peak_child for t in sites),
            "bytes_down": int(statistics.median(r["bytes_down"] for r in records)),
            "bytes_up": int(statistics.median(r["bytes_up"] for r in records)),
            "disk_bytes": left,
            "max_deviation": max(d["deviation"] for d in deviations.values()),
            "load_average": self.load,
            "rounds": self.rounds,
            "model_bytes": weights.size(self.model),
            "cpu_s_by_part": {p: _median(b[p] - a[p] for a, b in itertools.pairwise(self.cpu)) for p in self.cpu[0]},
            "round_s_by_round": self._took(),
            "disk_by_round": after,
            "disk_peak_by_round": during,
            "deviation_by_round": {str(n): d for n, d in deviations.items()},
        }

    def _logs(self, federation: Federation) -> str:
        logs = [self.root / "server.log", *sorted(self.root.glob("site-*.log"))]
        logs += sorted(federation.root.glob("sites/*/fedclient-state/trainers/*.log"))
        return "\n".join(f"--- {log.relative_to(self.root)}\n{_tail(log)}" for log in logs)


def bench(
    model: str, clients: int, rounds: int, directory: Path, *, keep: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure in a new directory below `directory`, which is removed in the end unless it shall be kept.

    Raises:
        BenchError: it cannot be measured here, or a process failed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _check_place(model, clients, rounds, directory)
    root = Path(tempfile.mkdtemp(prefix="round-", dir=directory.resolve()))
    try:
        return Bench(model, clients, rounds, root, say).run()
    finally:
        if keep:
            say(f"kept {root}")
        else:
            shutil.rmtree(root)


def _check_place(model: str, clients: int, rounds: int, directory: Path) -> None:
    """Refuse a place where the numbers would mean nothing, or where there is no room."""
    if rounds < 2:
        raise BenchError("the first round only warms up: ROUNDS must be at least 2")
    if (kind := file_system(directory)) in IN_MEMORY:
        raise BenchError(f"{directory} is in memory ({kind}), not on a disk; name another directory with DIR=")
    if len(os.fsencode(directory.resolve())) > _LONGEST_PATH:
        raise BenchError(f"{directory} is too long a path for the server's socket; name a shorter one with DIR=")
    # At the most: the imported model, the versions that are kept, made and compared, every update, and at each site its
    # model and its update.
    needed = weights.size(model) * (min(rounds + 1, 4 + CHECKED_FIRST) + 3 * clients)
    if (free := shutil.disk_usage(directory).free) < needed * 1.1:
        raise BenchError(f"{directory} has {free / 1e9:.1f} GB free, and {needed * 1.1 / 1e9:.1f} GB are needed")


def file_system(directory: Path) -> str:
    """The kind of file system a directory is on; empty where that cannot be known."""
    device = os.stat(directory).st_dev  # noqa: PTH116 - only the number is of interest
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    kinds = [line.partition(" - ")[2].split()[0] for line in lines if line.split()[2] == number]
    return kinds[0] if kinds else ""


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


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="bench-round", description="Measure a round whose training takes no time.")
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("clients", type=int)
    parser.add_argument("rounds", type=int)
    parser.add_argument("--dir", type=Path, default=REPOSITORY / ".bench", help="on a disk; 4 + 3 CLIENTS models large")
    parser.add_argument("--keep", action="store_true", help="leave everything in the directory")
    given = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Whatever ends it, its processes end too.
        signal.signal(number, signal.default_int_handler)
    try:
        result = bench(
            given.model,
            given.clients,
            given.rounds,
            given.dir,
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
