"""The demo: four hospitals train one model, and no row leaves a hospital.

    python -m examples.heart.demo [DIRECTORY]

Starts one `fedserver serve` and four `fedclient start` as processes of their own, creates the
run with the commands a person would type (each is printed), and then trains on each hospital
alone and on the pooled rows with `fedclient train-local` for comparison. The last line is
`result {json}`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.console import Console
from rich.table import Table

from examples.heart.hospitals import HERE, HOSPITALS, Hospitals

RUN = "heart"
RUN_FILE = HERE / "run.toml"


def main(root: Path) -> None:
    """Run the demo in `root`, which is emptied first (but for the data)."""
    federation = Hospitals(root)
    federation.prepare()
    started = time.monotonic()
    init = root / "heart-init.safetensors"
    with contextlib.ExitStack() as processes:
        federation.start(processes)
        federation.init_model(init, seed=42)
        federation.operate(["run", "create", str(RUN_FILE), "--follow"])
        versions = list(federation.evaluations(RUN))
        federation.operate(["model", "export", RUN, str(root / "model")])
    local = {name: train_alone(federation, name, [name], init) for name in HOSPITALS}
    pooled = train_alone(federation, "pooled", HOSPITALS, init)
    seconds = time.monotonic() - started
    report(root, versions, local, pooled, seconds)


def train_alone(federation: Hospitals, name: str, train: list[str], init: Path) -> list[float]:
    """Accuracy of every version of a model trained without a server, on all hospitals' test rows."""
    return federation.train_alone(federation.site(f"alone-{name}", train, HOSPITALS), RUN_FILE, init)


def report(
    root: Path, versions: list[dict[str, Any]], local: dict[str, list[float]], pooled: list[float], seconds: float
) -> None:
    """Print the comparison, draw the plot, and end with the result line."""
    federated = [v["metrics"]["accuracy"] for v in versions]
    table = Table(box=None)
    table.add_column("trained on")
    table.add_column("accuracy", justify="right")
    table.add_row("[bold]four hospitals, federated[/bold]", f"[bold]{federated[-1]:.4f}[/bold]")
    for name, curve in local.items():
        table.add_row(f"{name} alone", f"{curve[-1]:.4f}")
    table.add_row("pooled rows (what nobody may do)", f"{pooled[-1]:.4f}")
    print("\nAccuracy on all 254 test rows, after equal steps")
    Console().print(table, "")
    plot = root / "accuracy.png"
    draw(plot, federated, local, pooled)
    model = root / "model" / "model.safetensors"
    print(f"model  {model}\nplot   {plot}")
    result = {
        "run": RUN,
        "rounds": len(federated) - 1,
        "accuracy_federated": round(federated[-1], 4),
        "accuracy_local": {name: round(curve[-1], 4) for name, curve in local.items()},
        "accuracy_pooled": round(pooled[-1], 4),
        "accuracy_per_hospital": {
            name: round(site["metrics"]["accuracy"], 4) for name, site in versions[-1]["clients"].items()
        },
        "seconds": round(seconds, 1),
        "model_path": str(model),
        "plot_path": str(plot),
    }
    print(f"result {json.dumps(result)}", flush=True)


def draw(path: Path, federated: list[float], local: dict[str, list[float]], pooled: list[float]) -> None:
    """Plot accuracy by round."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after the backend is chosen

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, curve in local.items():
        axes.plot(curve, linewidth=1, alpha=0.8, label=f"{name} alone")
    axes.plot(pooled, "k--", linewidth=1.5, label="pooled rows")
    axes.plot(federated, color="tab:red", linewidth=2.5, label="federated")
    axes.set(
        xlabel="round (100 steps at each site)", ylabel="accuracy, 254 test rows", title="Heart disease, four hospitals"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else ".demo/heart").resolve())
    except KeyboardInterrupt:
        sys.exit("interrupted; every process it started has been told to stop")
    except RuntimeError as e:
        sys.exit(f"demo: {e}")
