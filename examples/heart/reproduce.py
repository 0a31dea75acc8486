"""FLamby's accuracies on Fed-Heart-Disease, through a real server and four real daemons.

    python -m examples.heart.reproduce [--seeds 42,45] [DIRECTORY]

FedAvg as FLamby ran it, from its five seeds (or some of them), and the model trained on the
pooled rows; FLamby's published numbers are printed beside ours. docs/reproduction.md explains both. The last line
is `result {json}`; the exit code is 1 if a mean is further than 0.003 from FLamby's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.heart.hospitals import HERE, HOSPITALS, Hospitals

PUBLISHED = {
    "fedavg": {42: 0.7520, 43: 0.7638, 44: 0.7638, 45: 0.7008, 46: 0.7598},
    "pooled": {42: 0.7913, 43: 0.7953, 44: 0.7953, 45: 0.7992, 46: 0.7953},
}
"""FLamby's accuracy on all 254 test rows, by seed; flamby/results in its repository has them."""
TOLERANCE = 0.003
ROUNDS = 15


def main(root: Path, seeds: Sequence[int]) -> bool:
    """Run everything in `root`, which is emptied first (but for the data); answers whether the means are FLamby's."""
    federation = Hospitals(root)
    federation.prepare()
    started = time.monotonic()
    console = Console()
    ours: dict[str, dict[int, float]] = {"fedavg": {}, "pooled": {}}
    with contextlib.ExitStack() as processes:
        federation.start(processes, normalise="own")
        for seed in seeds:
            federation.init_model(weights(root, seed), seed, quiet=True)
            ours["fedavg"][seed] = federated(federation, console, seed)
    site = federation.site("pooled", HOSPITALS, HOSPITALS)
    for seed in seeds:
        with console.status(f"seed {seed}: pooled rows, 50 epochs"):
            run_file = write_run_file(root, "pooled", seed)
            ours["pooled"][seed] = federation.train_alone(site, run_file, weights(root, seed))[-1]
        console.print(f"seed {seed}: pooled rows, 50 epochs: accuracy {ours['pooled'][seed]:.4f}", highlight=False)
    return report(console, ours, time.monotonic() - started)


def weights(root: Path, seed: int) -> Path:
    """Where a seed's starting weights lie."""
    return root / f"init-{seed}.safetensors"


def write_run_file(root: Path, kind: str, seed: int) -> Path:
    """The protocol's run file, completed for a seed."""
    path = root / f"{kind}-{seed}.toml"
    head = f'name = "{kind}-{seed}"\nmodel = "{weights(root, seed).stem}"\nseed = {seed}\n'
    path.write_text(head + (HERE / f"flamby-{kind}.toml").read_text(encoding="utf-8"), encoding="utf-8")
    return path


def federated(federation: Hospitals, console: Console, seed: int) -> float:
    """Run FedAvg from a seed's weights; answers the last version's accuracy on all test rows."""
    federation.operate(["run", "create", str(write_run_file(federation.root, "fedavg", seed))], quiet=True)
    line = f"seed {seed}: FedAvg"
    version, accuracy = -1, 0.0
    with console.status(line) as status:
        for evaluated in federation.evaluations(f"fedavg-{seed}"):
            version, accuracy = evaluated["version"], evaluated["metrics"]["accuracy"]
            status.update(f"{line}, round {version} of {ROUNDS}: accuracy {accuracy:.4f}")
    if version != ROUNDS:
        raise RuntimeError(f"the run of seed {seed} ended without an evaluation of version {ROUNDS}; see the logs")
    console.print(f"{line}, {version} rounds: accuracy {accuracy:.4f}", highlight=False)
    return float(accuracy)


def report(console: Console, ours: dict[str, dict[int, float]], seconds: float) -> bool:
    """Print the comparison and the result line; answers whether the means are FLamby's."""
    table = Table(box=None)
    for title in ("seed", "FedAvg", "FLamby's", "pooled", "FLamby's"):
        table.add_column(title, justify="left" if title == "seed" else "right")
    published = {kind: {seed: PUBLISHED[kind][seed] for seed in ours[kind]} for kind in ours}
    columns = [values for kind in ours for values in (ours[kind], published[kind])]
    for seed in ours["fedavg"]:
        table.add_row(str(seed), *(f"{column[seed]:.4f}" for column in columns))
    measures = {"mean": statistics.mean, "std": statistics.stdev}
    if len(ours["fedavg"]) == 1:
        del measures["std"]
    for name, measure in measures.items():
        table.add_row(f"[bold]{name}[/bold]", *(f"[bold]{measure(c.values()):.4f}[/bold]" for c in columns))
    console.print("\nAccuracy on all 254 test rows of Fed-Heart-Disease")
    console.print(table, "")
    good = True
    result: dict[str, object] = {}
    for kind, values in ours.items():
        mean, wanted = statistics.mean(values.values()), statistics.mean(published[kind].values())
        if abs(mean - wanted) > TOLERANCE:
            good = False
            console.print(f"{kind}: the mean {mean:.4f} is further than {TOLERANCE} from FLamby's {wanted:.4f}")
        result |= {f"{kind}_{name}": round(measure(values.values()), 4) for name, measure in measures.items()}
        result[kind] = {str(seed): round(value, 4) for seed, value in values.items()}
    result["seconds"] = round(seconds, 1)
    console.print(f"took {seconds:.0f} s", highlight=False)
    print(f"result {json.dumps(result)}", flush=True)
    return good


def arguments() -> tuple[Path, list[int]]:
    """The command line: where to work, and from which seeds."""
    parser = argparse.ArgumentParser(description="FLamby's accuracies on Fed-Heart-Disease.")
    parser.add_argument("directory", nargs="?", default=".demo/reproduce", type=Path)
    parser.add_argument("--seeds", default=",".join(map(str, PUBLISHED["fedavg"])), help="some of 42 to 46")
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",") if seed.isdigit()]
    if not seeds or not set(seeds) <= set(PUBLISHED["fedavg"]):
        parser.error("--seeds: name some of 42, 43, 44, 45, 46, with commas")
    return given.directory.resolve(), sorted(set(seeds))


if __name__ == "__main__":
    try:
        sys.exit(not main(*arguments()))
    except KeyboardInterrupt:
        sys.exit("interrupted; every process it started has been told to stop")
    except RuntimeError as e:
        sys.exit(f"reproduce: {e}")
