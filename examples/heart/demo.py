"""The demo: four hospitals train one model, and no row leaves a hospital.

    python demo.py [DIRECTORY]

Starts one `fedserver serve` and four `fedclient start` as processes of their own, creates the
run with the commands a person would type (each is printed), and then trains on each hospital
alone and on the pooled rows with `fedclient train-local` for comparison. The last line is
`result {json}`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
import matplotlib as mpl
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
RUN = "heart"
START_SECONDS = 60.0
SITE = """\
name = "{name}"
server = "{server}"

[workload.heart]
trainer = "heart:HeartDisease"

[workload.heart.data]
train = {train}
test = {test}
statistics = "../../data/statistics.json"
"""


@dataclass(frozen=True)
class Federation:
    """Where everything lies."""

    root: Path

    @property
    def server_data(self) -> Path:
        """The server's data directory."""
        return self.root / "fedserver-data"

    def site(self, name: str) -> Path:
        """A site's site.toml."""
        return self.root / "sites" / name / "site.toml"


def main(root: Path) -> None:
    """Run the demo in `root`, which is emptied first (but for the data)."""
    data.prepare(root / "data")
    for old in ("sites", "fedserver-data", "model", "logs"):
        shutil.rmtree(root / old, ignore_errors=True)
    (root / "logs").mkdir(parents=True)
    started = time.monotonic()
    federation = Federation(root)
    hospitals = [data.slug(name) for name in data.HOSPITALS]
    with contextlib.ExitStack() as processes:
        server = start_server(federation, processes)
        for name in hospitals:
            write_site(federation.site(name), name, server, train=[name], test=[name])
            command = ["fedclient", "start", "--config", str(federation.site(name))]
            processes.enter_context(background(command, root / "logs" / f"{name}.log"))
        init = root / "heart-init.safetensors"
        site = str(federation.site(hospitals[0]))
        call(["fedclient", "init-model", "heart", "--config", site, "--seed", "42", "-o", str(init)])
        operate(federation, ["model", "import", str(init)])
        operate(federation, ["run", "create", str(HERE / "run.toml"), "--follow"])
        versions = evaluations(federation)
        operate(federation, ["model", "export", RUN, str(root / "model")])
    local = {name: train_alone(federation, name, [name], hospitals, init) for name in hospitals}
    pooled = train_alone(federation, "pooled", hospitals, hospitals, init)
    seconds = time.monotonic() - started
    report(root, versions, local, pooled, seconds)


def start_server(federation: Federation, processes: contextlib.ExitStack) -> str:
    """Start the server on a free port; returns its address."""
    log = federation.root / "logs" / "server.log"
    command = ["fedserver", "serve", "--data-dir", str(federation.server_data), "--listen", "127.0.0.1:0"]
    process = processes.enter_context(background(command, log))
    address = federation.server_data / "address"
    deadline = time.monotonic() + START_SECONDS
    while not address.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if not address.exists():
        sys.exit(f"the server did not start; see {log}")
    return address.read_text(encoding="ascii").strip()


def write_site(path: Path, name: str, server: str, train: Sequence[str], test: Sequence[str]) -> None:
    """Write a site.toml, and the workload's class beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "heart.py", path.parent)
    files = {
        kind: json.dumps([f"../../data/{n}-{kind}.csv" for n in names])
        for kind, names in (("train", train), ("test", test))
    }
    path.write_text(SITE.format(name=name, server=server, **files), encoding="utf-8")


def evaluations(federation: Federation) -> list[dict[str, Any]]:
    """What every version measured, from the run's events."""
    command = ["fedserver", "run", "watch", RUN, "--json", "--data-dir", str(federation.server_data)]
    lines = subprocess.run(program(command), check=True, capture_output=True, text=True).stdout.splitlines()
    events = [json.loads(line) for line in lines]
    return [e["data"] for e in events if e["kind"] == "version_evaluated"]


def train_alone(
    federation: Federation, name: str, train: Sequence[str], test: Sequence[str], init: Path
) -> list[float]:
    """Accuracy of every version of a model trained without a server, on all hospitals' test rows."""
    site = federation.root / "sites" / f"alone-{name}" / "site.toml"
    write_site(site, f"alone-{name}", "127.0.0.1:1", train, test)
    command = ["fedclient", "train-local", "--config", str(site), "--settings", str(HERE / "run.toml")]
    command += ["--model", str(init), "--json"]
    done = subprocess.run(program(command), check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return [version["evaluation"]["accuracy"] for version in json.loads(done.stdout)["versions"]]


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


def operate(federation: Federation, arguments: Sequence[str]) -> None:
    """Run a `fedserver` command that talks to the server."""
    call(["fedserver", *arguments, "--data-dir", str(federation.server_data)])


def call(command: Sequence[str]) -> None:
    """Print and run a command; end the demo if it fails."""
    print(f"$ {' '.join(command)}", flush=True)
    code = subprocess.run(program(command), check=False).returncode
    if code:
        sys.exit(code)


@contextlib.contextmanager
def background(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command until the context ends; its output goes to a log."""
    print(f"$ {' '.join(command)} &", flush=True)
    with log.open("wb") as out, subprocess.Popen(program(command), stdout=out, stderr=out) as process:
        try:
            yield process
        finally:
            process.terminate()


def program(command: Sequence[str]) -> list[str]:
    """The command with the program beside this Python, whether the environment is activated or not."""
    return [str(Path(sys.executable).parent / command[0]), *command[1:]]


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else ".demo/heart").resolve())
    except KeyboardInterrupt:
        sys.exit("interrupted; every process it started has been told to stop")
    except RuntimeError as e:
        sys.exit(f"demo: {e}")
