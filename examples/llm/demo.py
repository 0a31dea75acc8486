"""The demo: three sites with one kind of Shakespeare's plays each fine-tune one language model by LoRA.

    python -m examples.llm.demo [--seconds 300] [--rounds N --steps N] [--processes N] [--learning-rate auto]
        [DIRECTORY]

Starts one `fedserver serve` and three `fedclient start` as processes of their own. What trains is the built-in
`causal_lm`, by site.toml alone. The demo measures how long a step takes, chooses how many there is time for, runs the
federation with the commands a person would type, and then trains at each site alone and on the pooled passages with
`fedclient train-local`, as many steps. The last line is `result {json}`.

With `--learning-rate auto` the sites measure the rate before the first round, for which the demo takes longer, though
each takes a few of its passages only. Every training alone then has the rate of the run, so that only the passages
differ.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from examples import federation
from examples.llm.budget import ALONE, BATCH, Machine, Plan, plan
from examples.llm.report import Comparison, report
from examples.llm.sites import RUN, SITES, Sites, cores, threads
from examples.training import Training, add_options
from examples.training import chosen as training_of

INIT = "adapter-init"
PROBE_STEPS = 3


def main(root: Path, seconds: float, wanted: Plan | None, training: Training) -> None:
    """Run the demo in `root`, which is emptied first, but for the plays and the model.

    Args:
        root: where everything goes.
        seconds: how long it may take, about.
        wanted: how much is trained; None: as much as there is time for.
        training: how.
    """
    sites = Sites(root, training)
    sites.prepare()
    started = time.monotonic()
    with contextlib.ExitStack() as processes:
        server = sites.start_server(processes)
        machine = measure(sites)
        chosen = wanted or plan(machine, seconds)
        print(
            f"a step of {BATCH} passages takes {machine.step:.2f} s with {machine.lanes} trainers at a time: "
            f"{chosen.rounds} rounds of {chosen.steps} steps at each site"
        )
        sites.operate(["model", "import", str(root / INIT)])
        sites.start(processes, server, threads(len(SITES) * training.processes))
        run_file = sites.run_file(RUN, chosen.rounds, chosen.steps, rate=training.learning_rate, samples=1)
        if training.measures:
            print("first the sites measure the learning rate, which takes longer than to train", flush=True)
        sites.operate(["run", "create", str(run_file), "--follow"])
        events = list(sites.events(RUN))
        sites.operate(["model", "export", RUN, str(root / "model")])
    measured: dict[str, float] = next((e["data"]["settings"] for e in events if e["kind"] == "run_calibrated"), {})
    alone = train_alone(sites, chosen.rounds * chosen.steps, measured.get("learning_rate", training.learning_rate))
    comparison = Comparison(
        versions=[event["data"] for event in events if event["kind"] == "version_evaluated"],
        rounds=[event["data"] for event in events if event["kind"] == "round_committed"],
        alone={name: perplexity(versions) for name, versions in alone.items()},
        measured=measured,
        samples=sites.samples(),
        steps=chosen.steps,
        step_seconds=machine.step,
        seconds=time.monotonic() - started,
    )
    report(root, comparison)


def measure(sites: Sites) -> Machine:
    """Write the starting adapter and, at the same time, see how fast trainers are when there is one in every lane."""
    lanes = sites.training.lanes(len(SITES), cores())
    environ = threads(len(SITES) * sites.training.processes)
    run_file = sites.run_file("probe", 1, PROBE_STEPS, evaluate=False)
    places = [sites.site(f"probe-{lane}", [SITES[lane]], SITES) for lane in range(lanes)]
    with ThreadPoolExecutor(lanes) as pool:
        started = time.monotonic()
        probes = [pool.submit(federation.train_alone, site, run_file, None, environ) for site in places]
        command = ["fedclient", "init-model", RUN, "--config", str(sites.site("first", SITES, SITES)), "--seed", "42"]
        federation.call([*command, "-o", str(sites.root / INIT)])
        trained = [probe.result()[-1] for probe in probes]
    step = max(1 / version["train"]["steps_per_second"] for version in trained)
    # One more than there are lanes have loaded everything.
    start = (time.monotonic() - started - step * PROBE_STEPS) * lanes / (lanes + 1)
    return Machine(step, start, lanes)


def train_alone(sites: Sites, steps: int, rate: float | str | None) -> dict[str, list[dict[str, Any]]]:
    """What a training of so many steps gives without a server, at each site and on the pooled passages."""
    lanes = sites.training.lanes(ALONE, cores())
    environ = threads(lanes * sites.training.processes)
    # In one round: no optimizer begins anew, which is rather to their advantage.
    run_file = sites.run_file("alone", 1, steps, rate=rate)
    places = {name: sites.site(f"{name}-alone", [name], SITES) for name in SITES}
    places["pooled"] = sites.site("pooled", SITES, SITES)
    print(f"\ntraining {steps} steps at each site alone, and on the pooled passages", flush=True)
    pool, found = ThreadPoolExecutor(lanes), dict[str, list[dict[str, Any]]]()
    try:
        begun = {
            name: pool.submit(federation.train_alone, site, run_file, sites.root / INIT, environ)
            for name, site in places.items()
        }
        for name, future in begun.items():
            found[name] = future.result()
            print(f"  {name:<10} perplexity {perplexity(found[name]):.2f}", flush=True)
    finally:
        # Interrupted, or one failed: the others need not begin.
        pool.shutdown(cancel_futures=True)
    return found


def perplexity(versions: list[dict[str, Any]]) -> float:
    """Of the last version, on all sites' held-out passages."""
    return float(versions[-1]["evaluation"]["perplexity"])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Federated LoRA fine-tuning of a language model.")
    parser.add_argument("directory", nargs="?", default=".demo/llm", type=Path)
    parser.add_argument("--seconds", type=float, default=300, help="how long it may take, about")
    parser.add_argument("--rounds", type=int, help="instead of as many as there is time for")
    parser.add_argument("--steps", type=int, help="of each site in each round; belongs to --rounds")
    add_options(parser)
    found = parser.parse_args()
    if (found.rounds is None) != (found.steps is None):
        parser.error("give both of --rounds and --steps, or none")
    return found


if __name__ == "__main__":
    given = arguments()
    try:
        wanted = Plan(given.rounds, given.steps) if given.rounds else None
        main(given.directory.resolve(), given.seconds, wanted, training_of(given))
    except KeyboardInterrupt:
        sys.exit("interrupted; every process it started has been told to stop")
    except RuntimeError as e:
        sys.exit(f"demo: {e}")
