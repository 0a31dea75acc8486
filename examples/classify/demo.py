"""The demo: three sites fine-tune a text classifier together, and no text leaves a site.

    python -m examples.classify.demo [--seconds N] [--processes N] [--learning-rate auto] [DIRECTORY]

Every parameter of MiniLM trains and travels, 91 MB each way. The sites hold Reuters texts of eight topics, each other
shares of each. There is no training code: site.toml names the built-in workload. Starts one `fedserver serve` and
three `fedclient start` as processes of their own, creates the run with the commands a person would type (each is
printed), and then trains on each site alone and on the pooled texts with `fedclient train-local`, in equal steps. How
many steps those are follows from how long one takes on this machine. The last line is `result {json}`.

With `--learning-rate auto` the sites measure the rate before the first round, for which the demo takes longer; every
training alone then has the rate of the run, so that only the texts differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.console import Console
from rich.table import Table

from examples import federation
from examples.classify import data, scores
from examples.classify.sites import CORES, POOLED, Alone, Sites, Workload, threads
from examples.training import Training, add_options, chosen

RUN = "topics"
NAMES = ("site-1", "site-2", "site-3")
SEED = 1
TESTS = 400
MAX_LENGTH = 48
BATCH = 8
ROUNDS = 4
SECONDS = 300.0
"""What the demo may take on a machine with nothing else to do, but for fetching."""
OVERHEAD = 20.0
"""Seconds for the server, for weights on their way, and for the plot."""
PRUDENCE = 1.2
"""Times vary by as much from one minute to the next."""
FORWARD = 0.3
"""What testing a batch costs, in steps."""
FEWEST_STEPS, MOST_STEPS = 5, 40
"""In a round, however slow or fast the machine."""
PROBE = 4
RATE = 3e-4
RUN_FILE = """\
name = "{name}"
workload = "topics"
model = "topics-init"
rounds = {rounds}
seed = {seed}

[settings]
steps = {steps}
batch_size = {batch}
learning_rate = {rate}
warmup = 0.1
eval_batch_size = 32

[cohort]
min_clients = {sites}

[calibration]
deadline = "12h"

[evaluation]
enabled = {evaluation}
"""


@dataclass
class Course:
    """What became of the federated run: its versions' evaluations, and what its rounds moved and took."""

    versions: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)
    """Settings that the sites have measured."""

    @property
    def bytes_per_round(self) -> int:
        """Down and up, all sites together."""
        moved: list[int] = [r["bytes_down"] + r["bytes_up"] for r in self.rounds]
        return round(statistics.mean(moved))


def main(root: Path, seconds: float, training: Training) -> None:
    """Run the demo in `root`, which is emptied first (but for the data)."""
    sites = Sites(root)
    sites.prepare()
    data.deal(sites.data, NAMES, alpha=0.5, seed=SEED, tests=TESTS)
    started = time.monotonic()
    workload = Workload(RUN, f"seed-{SEED}", MAX_LENGTH, training.tables)
    show_shares(sites, workload)
    init = root / "topics-init"
    with contextlib.ExitStack() as processes:
        sites.start(processes, NAMES, [workload], training)
        sites.init_model(root / "sites" / NAMES[0] / "site.toml", RUN, init, SEED)
        steps = affordable_steps(sites, workload, init, seconds, training)
        rate = RATE if training.learning_rate is None else training.learning_rate
        run_file = write_run_file(root, RUN, steps, rate)
        if training.measures:
            print("first the sites measure the learning rate, which takes longer than to train", flush=True)
        sites.operate(["run", "create", str(run_file)], quiet=True)
        course = follow(sites)
        sites.operate(["model", "export", RUN, str(root / "model")])
    # The rate that was measured for all, so that nothing but the texts differs.
    run_file = write_run_file(root, "alone", steps, course.measured.get("learning_rate", rate))
    jobs = [Alone(who, workload, run_file, init, root / "alone" / who) for who in (POOLED, *NAMES)]
    sites.train_alone(jobs, training)
    alone = {job.who: job.output for job in jobs}
    models = {"federated": root / "model"} | alone
    tests = sites.data / workload.dealt / f"{POOLED}-test.jsonl"
    found = dict(zip(models, scores.score(list(models.values()), tests, MAX_LENGTH, CORES), strict=True))
    report(root, course, found, steps, time.monotonic() - started)


def write_run_file(root: Path, name: str, steps: int, rate: float | str, rounds: int = ROUNDS) -> Path:
    """Write a run file; only the federated run evaluates its versions."""
    path = root / f"{name}.toml"
    evaluation = json.dumps(name == RUN)
    text = RUN_FILE.format(
        name=name,
        rounds=rounds,
        seed=SEED,
        steps=steps,
        rate=json.dumps(rate),
        sites=len(NAMES),
        batch=BATCH,
        evaluation=evaluation,
    )
    path.write_text(text, encoding="utf-8")
    return path


def show_shares(sites: Sites, workload: Workload) -> None:
    """Print how often each site has each topic."""
    table = Table(box=None)
    for title in ("texts to train on", *data.LABELS, "all"):
        table.add_column(title, justify="right")
    for name in NAMES:
        counts = data.counts(sites.data / workload.dealt / f"{name}-train.jsonl")
        table.add_row(name, *map(str, counts.values()), str(sum(counts.values())))
    Console().print(table, "")


def affordable_steps(sites: Sites, workload: Workload, init: Path, seconds: float, training: Training) -> int:
    """Steps in a round, so that the demo takes about so many seconds; measured and printed."""
    run_file = write_run_file(sites.root, "probe", PROBE, RATE, rounds=1)
    lanes = training.lanes(len(NAMES), CORES)
    environ = threads(len(NAMES) * training.processes)

    def measure(name: str) -> float:
        site = sites.site(name, [workload], name=f"probe-{name}")
        versions = federation.train_alone(site, run_file, init, environ)
        rate: float = versions[-1]["train"]["steps_per_second"]
        return 1 / rate

    began = time.monotonic()
    with ThreadPoolExecutor(lanes) as pool:
        step: float = max(pool.map(measure, NAMES[:lanes]))
    start = max(0.0, time.monotonic() - began - PROBE * step)
    steps = plan(seconds, step, start, lanes)
    print(f"a step of {BATCH} texts takes {step:.2f} s here: {ROUNDS} rounds of {steps} steps at each site", flush=True)
    return steps


def plan(seconds: float, step: float, start: float, lanes: int) -> int:
    """Steps in a round; `lanes` trainers run at a time, each of which takes `start` seconds to load everything."""
    trainings = 2 * len(NAMES) + 1
    # Each version, and each model at the end.
    testing = (ROUNDS + 1 + len(NAMES) + 2) * TESTS / BATCH * FORWARD
    left = seconds / PRUDENCE - OVERHEAD - start * (1 + trainings / lanes)
    steps = (left * lanes / step - testing) / (ROUNDS * trainings)
    return min(MOST_STEPS, max(FEWEST_STEPS, int(steps)))


def follow(sites: Sites) -> Course:
    """Print each version's accuracy and macro-F1, overall and by site, as they come; until then, what is waited for."""
    course = Course()
    with contextlib.ExitStack() as beginning:
        beginning.enter_context(sites.telling(RUN))
        for event in sites.events(RUN):
            if event["kind"] == "round_committed":
                course.rounds.append(event["data"])
            elif event["kind"] == "run_calibrated":
                course.measured = event["data"]["settings"]
                print("measured: " + ", ".join(f"{name} {value:g}" for name, value in course.measured.items()))
            elif event["kind"] == "version_evaluated":
                course.versions.append(event["data"])
                if len(course.versions) == 1:
                    beginning.close()
                    print(heading(), flush=True)
                print(line(course), flush=True)
    return course


def heading() -> str:
    """The titles of the table of versions."""
    names = "".join(f"{name:>15}" for name in NAMES)
    return f"\n{'accuracy / macro-F1':>21}{names}{'down':>10}{'up':>10}{'seconds':>9}"


def line(course: Course) -> str:
    """The newest version's line of the table."""
    version = course.versions[-1]
    cells = [version, *(version["clients"].get(name, {}) for name in NAMES)]
    texts = [
        "{accuracy:.3f} / {macro_f1:.3f}".format(**cell["metrics"]) if cell.get("metrics") else "" for cell in cells
    ]
    moved = next((r for r in course.rounds if r["version"] == version["version"]), None)
    rest = (
        f"{moved['bytes_down'] / 1e6:>7.1f} MB{moved['bytes_up'] / 1e6:>7.1f} MB{moved['seconds']:>9.1f}"
        if moved
        else ""
    )
    return f"{version['version']:>4}{texts[0]:>17}" + "".join(f"{text:>15}" for text in texts[1:]) + rest


def report(root: Path, course: Course, found: dict[str, scores.Score], steps: int, seconds: float) -> None:
    """Print the comparison, draw the plot, and end with the result line."""
    table = Table(box=None)
    for title in ("trained on", "accuracy", "macro-F1"):
        table.add_column(title, justify="left" if title == "trained on" else "right")
    local = {measure: statistics.mean(found[name][measure] for name in NAMES) for measure in ("accuracy", "macro_f1")}
    rows = {"[bold]three sites, federated[/bold]": found["federated"]}
    rows |= {f"{name} alone": found[name] for name in NAMES}
    rows |= {"mean of the sites alone": local, "pooled texts (what nobody may do)": found[POOLED]}
    for title, values in rows.items():
        table.add_row(title, f"{values['accuracy']:.4f}", f"{values['macro_f1']:.4f}")
    print(f"\nOn {TESTS} held-out texts, after {ROUNDS * steps} steps each; models as exported, loaded by transformers")
    Console().print(table, "")
    plot = root / "classify.png"
    draw(plot, course, found, steps)
    print(f"model  {root / 'model'}\nplot   {plot}")
    result: dict[str, object] = {"run": RUN, "rounds": ROUNDS, "steps": steps, "measured": course.measured}
    for measure in ("accuracy", "macro_f1"):
        result |= {
            f"{measure}_federated": round(found["federated"][measure], 4),
            f"{measure}_local": round(local[measure], 4),
            f"{measure}_pooled": round(found[POOLED][measure], 4),
        }
    result |= {
        "accuracy_by_site_alone": {name: round(found[name]["accuracy"], 4) for name in NAMES},
        "accuracy_by_version": [round(version["metrics"]["accuracy"], 4) for version in course.versions],
        "bytes_per_round": course.bytes_per_round,
        "seconds": round(seconds, 1),
        "model_path": str(root / "model"),
        "plot_path": str(plot),
    }
    print(f"result {json.dumps(result)}", flush=True)


def draw(path: Path, course: Course, found: dict[str, scores.Score], steps: int) -> None:
    """Plot accuracy by round, with what the others reached in as many steps."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after the backend is chosen

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(
        [v["metrics"]["accuracy"] for v in course.versions], "o-", color="tab:red", linewidth=2.5, label="federated"
    )
    for number, name in enumerate(NAMES):
        axes.axhline(found[name]["accuracy"], color=f"C{number}", linewidth=1, alpha=0.8, label=f"{name} alone")
    axes.axhline(found[POOLED]["accuracy"], color="k", linestyle="--", linewidth=1.5, label="pooled texts")
    axes.set(
        xlabel=f"round ({steps} steps at each site)",
        ylabel=f"accuracy, {TESTS} held-out texts",
        title="Reuters topics, three sites, every parameter of MiniLM",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def arguments() -> tuple[Path, float, Training]:
    """The command line: where to work, for how long, and how to train."""
    parser = argparse.ArgumentParser(description="Three sites fine-tune a text classifier together.")
    parser.add_argument("directory", nargs="?", default=".demo/classify", type=Path)
    parser.add_argument("--seconds", default=SECONDS, type=float, help="about how long it may take")
    add_options(parser)
    given = parser.parse_args()
    return given.directory.resolve(), given.seconds, chosen(given)


if __name__ == "__main__":
    try:
        main(*arguments())
    except KeyboardInterrupt:
        sys.exit("interrupted; every process it started has been told to stop")
    except RuntimeError as e:
        sys.exit(f"demo: {e}")
