"""Three sites on this machine, each with one kind of Shakespeare's plays and a copy of the same language model."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples import federation
from examples.llm import plays, weights
from examples.training import PLAIN, Training, tables_toml

HERE = Path(__file__).resolve().parent
RUN = "shakespeare"
SITES = list(plays.PLAYS)
MODEL = "smollm2"
PROMPT = "ROMEO.\nWhat light is this"
SITE = """\
name = "{name}"
server = "{server}"

[workload.shakespeare]
trainer = "causal_lm"
model = "../../smollm2"
metrics = ["loss", "perplexity"]

[workload.shakespeare.data]
train = {train}
test = {test}
max_length = 64
packing = false          # an example is a passage, so that all sites' examples together are the pooled ones
prompts = {prompts}
sample_tokens = 32

[workload.shakespeare.lora]
rank = 8
"""
FEW = 200
"""Passages that each site takes where the rate is measured: a trial is judged by a quarter of what there is."""


@dataclass(frozen=True)
class Sites(federation.Federation):
    """Three sites, in a directory with the prepared plays and the model."""

    training: Training = PLAIN

    def prepare(self) -> None:
        """Empty the directory, but for the plays and the model, which are fetched if they are not there.

        Raises:
            RuntimeError: they cannot be fetched.
        """
        data = self.root / "data"
        plays.prepare(data)
        weights.prepare(self.root / MODEL)
        for name in SITES:
            passages = (data / f"{name}-train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            few = passages[:: max(1, len(passages) // FEW)][:FEW]
            (data / f"{name}-few.jsonl").write_text("".join(few), encoding="utf-8")
        self.clear()

    @property
    def passages(self) -> str:
        """Which file of a site's passages is trained on."""
        return "few" if self.training.measures else "train"

    def start(self, processes: contextlib.ExitStack, server: str, environ: Mapping[str, str]) -> None:
        """Start every site's daemon; the tragedies' site is to continue a prompt."""
        for name in SITES:
            site = self.site(name, [name], [name], server=server, prompts=[PROMPT] if name == "tragedies" else [])
            self.start_site(processes, site, environ)

    def site(
        self,
        name: str,
        train: Sequence[str],
        test: Sequence[str],
        *,
        server: str = federation.NOWHERE,
        prompts: Sequence[str] = (),
    ) -> Path:
        """Write a site.toml; returns it."""
        path = self.root / "sites" / name / "site.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        files = {
            kind: json.dumps([f"../../data/{n}-{file}.jsonl" for n in names])
            for kind, file, names in (("train", self.passages, train), ("test", "test", test))
        }
        text = SITE.format(name=name, server=server, prompts=json.dumps(prompts), **files)
        text += tables_toml(RUN, self.training.tables)
        path.write_text(text, encoding="utf-8")
        return path

    def run_file(
        self,
        name: str,
        rounds: int,
        steps: int,
        *,
        rate: float | str | None = None,
        evaluate: bool = True,
        samples: int = 0,
    ) -> Path:
        """Complete run.toml, with another rate if one is given; returns the completed copy."""
        path = self.root / f"{name}.toml"
        common = (HERE / "run.toml").read_text(encoding="utf-8")
        if not evaluate:
            common = common.replace("[evaluation]\n", "[evaluation]\nenabled = false\n")
        if rate is not None:
            common = re.sub(r"(?m)^learning_rate = .*", f"learning_rate = {json.dumps(rate)}", common)
        head = f'name = "{name}"\nrounds = {rounds}\n'
        path.write_text(f"{head}{common}steps = {steps}\nsamples = {samples}\n", encoding="utf-8")
        return path

    def samples(self) -> list[str]:
        """What each version made of the prompt, the starting model first."""
        found = [json.loads(line) for path in self.root.glob("sites/*/**/samples/*.jsonl") for line in path.open()]
        return [str(line["text"]) for line in sorted(found, key=lambda line: int(line["version"]))]


def threads(processes: int) -> dict[str, str]:
    """The environment in which so many trainers at a time share this machine's cores."""
    return {"OMP_NUM_THREADS": str(max(1, cores() // processes)), "TOKENIZERS_PARALLELISM": "false"}


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
