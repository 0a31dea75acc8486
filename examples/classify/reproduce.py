"""R8 over four sites with uneven labels: federated, alone and pooled, beside TF-IDF and a linear SVM.

    python -m examples.classify.reproduce [--seeds 1,2] [--full] [DIRECTORY]

From each seed follow the sites' shares of each topic (Dirichlet(0.5)), the new head of MiniLM and the order of the
texts. Its last two layers and the head train; with `--full` every parameter does, which takes about twice as long.
docs/reproduction.md has the protocol. The last line is `result {json}`; the exit code is 1 if the federated accuracy
is on the mean more than 1.5 points below the pooled one, or not above that of the sites alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from examples.classify import data, scores
from examples.classify.sites import CORES, POOLED, Alone, Sites, Workload

NAMES = ("site-1", "site-2", "site-3", "site-4")
SEEDS = (1, 2, 3)
ALPHA = 0.5
MAX_LENGTH = 48
ROUNDS = 12
STEPS = 9
SERVER_RATE = 1.5
"""How far a version goes along the mean of the sites' changes, which partly cancel out: their labels differ."""
TESTED = 64
"""Texts of each site on which the versions of a federated run are measured meanwhile."""
TRAINED = {"train": ["bert.encoder.layer.[45].*", "bert.pooler.*", "classifier.*"]}
"""`[parameters]` of site.toml: the head and the last two of six layers."""
RATE = {"upper": 5e-4, "full": 3e-4}
GAP = 0.015
"""How far below the pooled accuracy the federated one may be."""
RUN_FILE = """\
name = "{name}"
workload = "r8-{seed}"
model = "init-{seed}"
rounds = {rounds}
seed = {seed}

[settings]
steps = {steps}
batch_size = 16
learning_rate = {rate}
warmup = 0.1
eval_batch_size = 32
eval_limit = {tested}

[cohort]
min_clients = {sites}

[evaluation]
enabled = {federated}

[server_optimizer]
learning_rate = {server_rate}
"""

Accuracies = dict[int, float]
"""By seed."""


@dataclass(frozen=True)
class Reproduction:
    """What is run.

    Attributes:
        sites: where.
        seeds: from which seeds.
        full: whether every parameter trains.
    """

    sites: Sites
    seeds: Sequence[int]
    full: bool

    def workload(self, seed: int) -> Workload:
        """What the sites offer for a seed."""
        tables = {} if self.full else {"parameters": TRAINED}
        return Workload(f"r8-{seed}", f"seed-{seed}", MAX_LENGTH, tables)

    def init(self, seed: int) -> Path:
        """Where a seed's starting weights lie."""
        return self.sites.root / f"init-{seed}"

    def model(self, seed: int, who: str) -> Path:
        """Where a trained model lies."""
        return self.sites.root / "models" / f"{who}-{seed}"

    def run_file(self, name: str, seed: int, steps: int, *, federated: bool = False) -> Path:
        """Write a run file, for all sites together or for somebody alone."""
        path = self.sites.root / f"{name}.toml"
        rate = RATE["full" if self.full else "upper"]
        text = RUN_FILE.format(
            name=name,
            seed=seed,
            rounds=ROUNDS,
            steps=steps,
            rate=rate,
            tested=TESTED,
            sites=len(NAMES),
            federated=json.dumps(federated),
            server_rate=SERVER_RATE if federated else 1.0,
        )
        path.write_text(text, encoding="utf-8")
        return path

    def prepare(self) -> None:
        """Fetch and deal the texts."""
        self.sites.prepare()
        for seed in self.seeds:
            data.deal(self.sites.data, NAMES, alpha=ALPHA, seed=seed)

    def federate(self) -> None:
        """Run FedAvg from every seed, and export what it gives."""
        with contextlib.ExitStack() as processes:
            self.sites.start(processes, NAMES, [self.workload(seed) for seed in self.seeds])
            for seed in self.seeds:
                name, site = f"r8-{seed}", self.sites.root / "sites" / NAMES[0] / "site.toml"
                self.sites.init_model(site, name, self.init(seed), seed, quiet=True)
                run_file = self.run_file(name, seed, STEPS, federated=True)
                self.sites.operate(["run", "create", str(run_file)], quiet=True)
                for evaluated in self.sites.evaluations(name):
                    accuracy = f"{evaluated['metrics']['accuracy']:.4f} on {TESTED} texts of each site"
                    print(f"  round {evaluated['version']} of {ROUNDS}: accuracy {accuracy}", flush=True)
                self.sites.operate(["model", "export", name, str(self.model(seed, "federated"))], quiet=True)

    def train_alone(self) -> None:
        """Train on the pooled texts and on each site's, from every seed."""
        jobs = []
        for who in (POOLED, *NAMES):
            # A pooled model sees as many texts as all sites together.
            steps = STEPS * len(NAMES) if who == POOLED else STEPS
            for seed in self.seeds:
                run_file = self.run_file(f"{who}-{seed}", seed, steps)
                jobs.append(Alone(who, self.workload(seed), run_file, self.init(seed), self.model(seed, who)))
        self.sites.train_alone(jobs)

    def scores(self) -> dict[str, Accuracies]:
        """Accuracy of every model on all texts to test on."""
        whose = [(who, seed) for who in ("federated", *NAMES, POOLED) for seed in self.seeds]
        models = [self.model(seed, who) for who, seed in whose]
        print(f"testing {len(models)} models on {data.COUNTS['test']} texts", flush=True)
        found = scores.score(models, self.sites.data / "test.jsonl", MAX_LENGTH, CORES)
        accuracies = dict[str, Accuracies]()
        for (who, seed), score in zip(whose, found, strict=True):
            accuracies.setdefault(who, {})[seed] = score["accuracy"]
        return accuracies


def main(root: Path, seeds: Sequence[int], *, full: bool) -> bool:
    """Run everything in `root`, which is emptied first (but for the data); answers whether it is as it should be."""
    console = Console()
    reproduction = Reproduction(Sites(root), seeds, full)
    reproduction.prepare()
    started = time.monotonic()
    anchor = tf_idf(reproduction.sites.data)
    console.print(f"TF-IDF and a linear SVM on the pooled texts: accuracy {anchor:.4f}", highlight=False)
    reproduction.federate()
    reproduction.train_alone()
    return report(console, reproduction.scores(), anchor, time.monotonic() - started)


def tf_idf(directory: Path) -> float:
    """Accuracy of a linear SVM on TF-IDF, which knows nothing of language but these texts."""
    parts = {part: data.read(directory / f"{part}.jsonl") for part in data.COUNTS}
    texts = {part: [text["text"] for text in found] for part, found in parts.items()}
    labels = {part: [text["label"] for text in found] for part, found in parts.items()}
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LinearSVC())
    return float(model.fit(texts["train"], labels["train"]).score(texts["test"], labels["test"]))


def report(console: Console, found: Mapping[str, Accuracies], anchor: float, seconds: float) -> bool:
    """Print the comparison and the result line; answers whether the federation is as good as it should be."""
    seeds = list(found["federated"])
    local = {seed: statistics.mean(found[name][seed] for name in NAMES) for seed in seeds}
    columns = {"federated": found["federated"], "local": local, "pooled": found[POOLED]}
    table = Table(box=None)
    for title in ("seed", "federated", "each site alone", "mean of these", "pooled"):
        table.add_column(title, justify="left" if title == "seed" else "right")
    for seed in seeds:
        alone = " ".join(f"{found[name][seed]:.4f}" for name in NAMES)
        table.add_row(
            str(seed), f"{columns['federated'][seed]:.4f}", alone, f"{local[seed]:.4f}", f"{found[POOLED][seed]:.4f}"
        )
    measures = {"mean": statistics.mean} | ({"std": statistics.stdev} if len(seeds) > 1 else {})
    for name, measure in measures.items():
        cells = {kind: f"[bold]{measure(values.values()):.4f}[/bold]" for kind, values in columns.items()}
        table.add_row(f"[bold]{name}[/bold]", cells["federated"], "", cells["local"], cells["pooled"])
    console.print(
        f"\nAccuracy on all {data.COUNTS['test']} texts of R8's test set; TF-IDF and a linear SVM: {anchor:.4f}"
    )
    console.print(table, "")
    means = {kind: statistics.mean(values.values()) for kind, values in columns.items()}
    good = means["federated"] >= means["pooled"] - GAP and means["federated"] > means["local"]
    if not good:
        console.print(
            f"the federated accuracy should be above the sites' alone, and at most {GAP} below the pooled one"
        )
    result: dict[str, object] = {"tf_idf_svm": round(anchor, 4)}
    for kind, values in columns.items():
        result |= {f"accuracy_{kind}_{n}": round(measure(values.values()), 4) for n, measure in measures.items()}
        result[f"accuracy_{kind}"] = {str(seed): round(value, 4) for seed, value in values.items()}
    result["seconds"] = round(seconds, 1)
    console.print(f"took {seconds:.0f} s", highlight=False)
    print(f"result {json.dumps(result)}", flush=True)
    return good


def arguments() -> tuple[Path, list[int], bool]:
    """The command line: where to work, from which seeds, and what trains."""
    parser = argparse.ArgumentParser(description="R8 over four sites with uneven labels.")
    parser.add_argument("directory", nargs="?", default=".demo/reproduce-r8", type=Path)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="whole numbers, with commas")
    parser.add_argument("--full", action="store_true", help="train every parameter")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",") if seed.isdigit()]
    if not seeds:
        parser.error("--seeds: name whole numbers, with commas")
    return given.directory.resolve(), sorted(set(seeds)), given.full


if __name__ == "__main__":
    try:
        where, from_seeds, everything = arguments()
        sys.exit(not main(where, from_seeds, full=everything))
    except KeyboardInterrupt:
        sys.exit("interrupted; every process it started has been told to stop")
    except RuntimeError as e:
        sys.exit(f"reproduce: {e}")
