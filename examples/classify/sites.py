"""Sites with uneven shares of R8 on this machine: their data, their files, and models trained at one alone."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from examples import federation
from examples.classify import data
from examples.training import PLAIN, Training, tables_toml

POOLED = "pooled"
"""Who would have all sites' texts."""
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SITE = """\
name = "{name}"
server = "{server}"
"""
WORKLOAD = """
[workload.{name}]
trainer = "sequence_classification"
model = "../../data/{model}"
metrics = ["loss", "accuracy", "macro_f1"]

[workload.{name}.data]
train = "../../data/{dealt}/{who}-train.jsonl"
test = "../../data/{dealt}/{who}-test.jsonl"
labels = {labels}
max_length = {max_length}
"""


@dataclass(frozen=True)
class Workload:
    """A workload that every site offers, each with its own texts.

    Attributes:
        name: what runs call it.
        dealt: the directory that `data.deal` wrote, in the directory of the data.
        max_length: tokens of a text at most.
        tables: further tables of site.toml, by name: `parameters`, `lora`, `precision`, `distributed`.
    """

    name: str
    dealt: str
    max_length: int
    tables: Mapping[str, Mapping[str, object]]

    def toml(self, who: str) -> str:
        """Its part of a site.toml."""
        text = WORKLOAD.format(
            name=self.name,
            model=data.MODEL,
            dealt=self.dealt,
            who=who,
            labels=json.dumps(data.LABELS),
            max_length=self.max_length,
        )
        return text + tables_toml(self.name, self.tables)


@dataclass(frozen=True)
class Alone:
    """A training without a server.

    Attributes:
        who: whose texts are learned: a site's name, or POOLED.
        workload: which workload.
        run_file: rounds and settings.
        init: the weights to begin with.
        output: where the last version goes.
    """

    who: str
    workload: Workload
    run_file: Path
    init: Path
    output: Path


class Sites(federation.Federation):
    """Sites in a directory with prepared data."""

    @property
    def data(self) -> Path:
        """Where the data lie."""
        return self.root / "data"

    def prepare(self) -> None:
        """Empty the directory, but for the data, which are fetched if they are not there."""
        data.prepare(self.data)
        self.clear()

    def site(self, who: str, workloads: Sequence[Workload], server: str = federation.NOWHERE, name: str = "") -> Path:
        """Write the site.toml of somebody; returns its path."""
        name = name or who
        path = self.root / "sites" / name / "site.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = [SITE.format(name=name, server=server), *(workload.toml(who) for workload in workloads)]
        path.write_text("".join(parts), encoding="utf-8")
        return path

    def start(
        self,
        processes: contextlib.ExitStack,
        names: Sequence[str],
        workloads: Sequence[Workload],
        training: Training = PLAIN,
    ) -> None:
        """Start the server and the daemons of some sites."""
        server = self.start_server(processes)
        environ = threads(len(names) * training.processes)
        for name in names:
            self.start_site(processes, self.site(name, workloads, server), environ)

    def init_model(self, site: Path, workload: str, path: Path, seed: int, *, quiet: bool = False) -> None:
        """Write MiniLM with a new head drawn from a seed, and give it to the server."""
        command = ["fedclient", "init-model", workload, "--config", str(site), "--seed", str(seed), "-o", str(path)]
        federation.call(command, quiet=quiet)
        self.operate(["model", "import", str(path)], quiet=quiet)

    def train_alone(self, jobs: Sequence[Alone], training: Training = PLAIN) -> None:
        """Train without a server, as many jobs at a time as there are processors; the longest should come first.

        A line is printed as each is over.
        """
        lanes = training.lanes(len(jobs), CORES)
        environ = threads(lanes * training.processes)
        print(f"\nfor comparison, {len(jobs)} trainings alone, {lanes} at a time", flush=True)
        with ThreadPoolExecutor(lanes) as pool:
            for future in as_completed([pool.submit(self._train_alone, job, environ) for job in jobs]):
                print(f"  {future.result()}", flush=True)

    def _train_alone(self, job: Alone, environ: Mapping[str, str]) -> str:
        began = time.monotonic()
        site = self.site(job.who, [job.workload], name=f"alone-{job.who}-{job.workload.name}")
        versions = federation.train_alone(site, job.run_file, job.init, environ, output=job.output)
        steps = sum(version["steps"] for version in versions)
        return f"{job.who:<8} {job.workload.name:<8} {steps} steps, {time.monotonic() - began:.0f} s"


def threads(processes: int) -> dict[str, str]:
    """The environment in which so many processes share the processors.

    Trainings that all want every processor spend most of their time waiting for each other.
    """
    return {"OMP_NUM_THREADS": str(max(1, CORES // processes))}
