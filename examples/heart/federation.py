"""A federation of hospitals on this machine: its processes, its files, and commands run against it."""

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

HERE = Path(__file__).resolve().parent
HOSPITALS = [data.slug(name) for name in data.HOSPITALS]
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
normalise = "{normalise}"
"""


@dataclass(frozen=True)
class Federation:
    """A directory with prepared data, the server's files, and those of each site."""

    root: Path

    @property
    def server_data(self) -> Path:
        """The server's data directory."""
        return self.root / "fedserver-data"

    def prepare(self) -> None:
        """Empty the directory, but for the data, which are fetched if they are not there."""
        data.prepare(self.root / "data")
        for old in ("sites", "fedserver-data", "model", "logs"):
            shutil.rmtree(self.root / old, ignore_errors=True)
        (self.root / "logs").mkdir(parents=True)

    def start(self, processes: contextlib.ExitStack, normalise: str = "shared") -> None:
        """Start the server and every hospital's daemon."""
        server = self._start_server(processes)
        for name in HOSPITALS:
            site = self.site(name, [name], [name], server=server, normalise=normalise)
            command = ["fedclient", "start", "--config", str(site)]
            processes.enter_context(background(command, self.root / "logs" / f"{name}.log"))

    def site(
        self,
        name: str,
        train: Sequence[str],
        test: Sequence[str],
        *,
        server: str = "127.0.0.1:1",
        normalise: str = "shared",
    ) -> Path:
        """Write a site.toml, and the workload's class beside it; returns the site.toml."""
        path = self.root / "sites" / name / "site.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / "heart.py", path.parent)
        files = {
            kind: json.dumps([f"../../data/{n}-{kind}.csv" for n in names])
            for kind, names in (("train", train), ("test", test))
        }
        path.write_text(SITE.format(name=name, server=server, normalise=normalise, **files), encoding="utf-8")
        return path

    def init_model(self, path: Path, seed: int, *, quiet: bool = False) -> None:
        """Write the weights that the class begins with after `torch.manual_seed(seed)`, and give them to the server."""
        site = str(self.root / "sites" / HOSPITALS[0] / "site.toml")
        command = ["fedclient", "init-model", "heart", "--config", site, "--seed", str(seed), "-o", str(path)]
        call(command, quiet=quiet)
        self.operate(["model", "import", str(path)], quiet=quiet)

    def operate(self, arguments: Sequence[str], *, quiet: bool = False) -> None:
        """Run a `fedserver` command that talks to the server."""
        call(["fedserver", *arguments, "--data-dir", str(self.server_data)], quiet=quiet)

    def evaluations(self, run: str) -> Iterator[dict[str, Any]]:
        """What every version of a run measured, as it comes; ends with the run."""
        command = ["fedserver", "run", "watch", run, "--json", "--data-dir", str(self.server_data)]
        with subprocess.Popen(program(command), stdout=subprocess.PIPE, text=True) as watch:
            assert watch.stdout is not None
            for line in watch.stdout:
                event = json.loads(line)
                if event["kind"] == "version_evaluated":
                    yield event["data"]
        if watch.returncode:
            sys.exit(f"run {run} did not complete; fedserver run show {run} --data-dir {self.server_data} says why")

    def train_alone(self, site: Path, run_file: Path, init: Path) -> list[float]:
        """Accuracy of every version of a model trained at one site, without a server."""
        command = ["fedclient", "train-local", "--config", str(site), "--settings", str(run_file)]
        command += ["--model", str(init), "--json"]
        done = subprocess.run(program(command), check=False, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed: {done.stderr.strip()}")
        return [version["evaluation"]["accuracy"] for version in json.loads(done.stdout)["versions"]]

    def _start_server(self, processes: contextlib.ExitStack) -> str:
        """Start the server on a free port; returns its address."""
        log = self.root / "logs" / "server.log"
        command = ["fedserver", "serve", "--data-dir", str(self.server_data), "--listen", "127.0.0.1:0"]
        process = processes.enter_context(background(command, log))
        address = self.server_data / "address"
        deadline = time.monotonic() + START_SECONDS
        while not address.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if not address.exists():
            sys.exit(f"the server did not start; see {log}")
        return address.read_text(encoding="ascii").strip()


def call(command: Sequence[str], *, quiet: bool = False) -> None:
    """Print and run a command, `quiet` without its output; end the program if it fails."""
    print(f"$ {' '.join(command)}", flush=True)
    code = subprocess.run(program(command), check=False, stdout=subprocess.DEVNULL if quiet else None).returncode
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
