"""What is noted down while rounds run, and the numbers that come of it."""

from __future__ import annotations

import itertools
import json
import os
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench import weights
from tests.bench.place import median
from tests.bench.processes import Sampler, Tree, allocated

PHASES = {"downloaded": "down_s", "computed": "train_s", "accepted": "up_s"}
"""What a daemon's log says at the end of each phase of a task."""


@dataclass
class Record:
    """One measurement's notes."""

    model: str
    clients: int
    rounds: int
    root: Path
    """Where the server's directory and the daemons' logs are."""
    load: float = field(default_factory=lambda: round(os.getloadavg()[0], 2))
    commits: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    """Time and data of every `round_committed`."""
    cpu: list[dict[str, float]] = field(default_factory=list)
    """CPU seconds that each part had used when each round had been committed."""

    def took(self) -> list[float]:
        """Seconds from each commit to the next."""
        times = [at for at, _ in self.commits]
        return [round(b - a, 3) for a, b in itertools.pairwise(times)]

    def phases(self) -> dict[int, dict[str, list[float]]]:
        """Seconds of each phase by round, one for each client, from the daemons' logs."""
        found: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for log in sorted(self.root.glob("site-*.log")):
            for line in log.read_text(errors="replace").splitlines():
                record = json.loads(line) if line.startswith("{") else {}
                if record.get("event") in PHASES and "seconds" in record:
                    found[record["round"]][PHASES[record["event"]]].append(record["seconds"])
        return found

    def line(self, sampler: Sampler) -> str:
        """The last round for people."""
        number, took = len(self.commits), self.took()
        phases = self.phases()[number]
        means = "  ".join(f"{name} {statistics.median(phases[name]):.2f}" for name in PHASES.values() if phases[name])
        data = self.commits[-1][1]
        warm = f"{took[-1]:7.2f} s" if took else "warm-up"
        cpu = f"cpu_s {sum(self.cpu[-1].values()) - sum(self.cpu[-2].values()):.1f}  " if took else ""
        memory = sampler.trees[0].peak_together / 1e6
        return (
            f"round {number} of {self.rounds}: {warm}  {means}  aggregate_s {data['aggregate_seconds']:.2f}  {cpu}"
            f"server peak {memory:.0f} MB  disk {allocated(self.root / 'server') / 1e6:.0f} MB"
        )

    def result(self, sampler: Sampler, left: int, deviations: dict[int, dict[str, float]]) -> dict[str, Any]:
        """The JSON object.

        Args:
            sampler: what was seen of the processes.
            left: bytes on the server's disk in the end.
            deviations: by round, from `weights.deviation`.
        """
        phases, measured = self.phases(), range(2, self.rounds + 1)
        server: Tree = sampler.trees[0]
        sites = sampler.trees[1:]
        records = [data for _, data in self.commits[1:]]
        after, during = self._disk(sampler.disk, left)
        used = [sum(b.values()) - sum(a.values()) for a, b in itertools.pairwise(self.cpu)]
        return {
            "model": self.model,
            "clients": self.clients,
            "round_s": median(self.took()),
            **{p: median(s for n in measured for s in phases[n][p]) for p in PHASES.values()},
            "aggregate_s": median(r["aggregate_seconds"] for r in records),
            "cpu_s": median(used),
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
            "cpu_s_by_part": {p: median(b[p] - a[p] for a, b in itertools.pairwise(self.cpu)) for p in self.cpu[0]},
            "round_s_by_round": self.took(),
            **{f"{p}_by_round": [median(phases[n][p]) for n in measured] for p in PHASES.values()},
            "cpu_s_by_round": [round(seconds, 2) for seconds in used],
            "disk_by_round": after,
            "disk_peak_by_round": during,
            "deviation_by_round": {str(n): d for n, d in deviations.items()},
        }

    def _disk(self, samples: list[tuple[float, int]], left: int) -> tuple[list[int], list[int]]:
        """What each round left on the server's disk (the least there was in the next), and the most during each."""
        ends = [at for at, _ in self.commits]
        inside = [[size for at, size in samples if a <= at < b] for a, b in itertools.pairwise([0.0, *ends])]
        least = [min(sizes, default=0) for sizes in inside[1:]]
        return [*least, left], [max(sizes, default=0) for sizes in inside]
