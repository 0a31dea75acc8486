"""A federation on this machine, for the demos: its processes, its files, and commands run against it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 60.0
TELL_SECONDS = 30.0
NOWHERE = "127.0.0.1:1"
"""The server of a site that trains alone."""


@dataclass(frozen=True)
class Federation:
    """A directory with the server's files, and those of each site in `sites`."""

    root: Path

    @property
    def server_data(self) -> Path:
        """The server's data directory."""
        return self.root / "fedserver-data"

    def clear(self) -> None:
        """Delete what an earlier demo left there, but for the data."""
        for old in ("sites", "fedserver-data", "model", "logs"):
            shutil.rmtree(self.root / old, ignore_errors=True)
        (self.root / "logs").mkdir(parents=True)

    def start_server(self, processes: contextlib.ExitStack) -> str:
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

    def start_site(self, processes: contextlib.ExitStack, site: Path, environ: Mapping[str, str] | None = None) -> None:
        """Start the daemon of a site.toml; `environ` goes over this process's environment."""
        command = ["fedclient", "start", "--config", str(site)]
        processes.enter_context(background(command, self.root / "logs" / f"{site.parent.name}.log", environ))

    def operate(self, arguments: Sequence[str], *, quiet: bool = False) -> None:
        """Run a `fedserver` command that talks to the server."""
        call(["fedserver", *arguments, "--data-dir", str(self.server_data)], quiet=quiet)

    def events(self, run: str) -> Iterator[dict[str, Any]]:
        """Every event of a run, as it comes; ends with the run."""
        command = ["fedserver", "run", "watch", run, "--json", "--data-dir", str(self.server_data)]
        with subprocess.Popen(program(command), stdout=subprocess.PIPE, text=True) as watch:
            assert watch.stdout is not None
            yield from map(json.loads, watch.stdout)
        if watch.returncode:
            sys.exit(f"run {run} did not complete; fedserver run show {run} --data-dir {self.server_data} says why")

    @contextlib.contextmanager
    def telling(self, run: str) -> Iterator[None]:
        """Print every now and then what a run waits for, until the context ends."""
        over = threading.Event()
        command = program(["fedserver", "run", "show", run, "--json", "--data-dir", str(self.server_data)])

        def tell() -> None:
            while not over.wait(TELL_SECONDS):
                shown = subprocess.run(command, check=False, capture_output=True, text=True)
                waiting = json.loads(shown.stdout)["waiting"] if shown.returncode == 0 else shown.stderr.strip()
                if waiting and not over.is_set():
                    print(waiting, flush=True)

        thread = threading.Thread(target=tell, name="telling")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def evaluations(self, run: str) -> Iterator[dict[str, Any]]:
        """What every version of a run measured, as it comes; ends with the run."""
        return (event["data"] for event in self.events(run) if event["kind"] == "version_evaluated")


def train_alone(
    site: Path,
    run_file: Path,
    init: Path | None,
    environ: Mapping[str, str] | None = None,
    *,
    output: Path | None = None,
) -> list[dict[str, Any]]:
    """Train at one site without a server; returns what `train-local --json` says of every version.

    Args:
        site: its site.toml.
        run_file: rounds and settings.
        init: the weights to begin with; None: what the class builds.
        environ: goes over this process's environment.
        output: where to write the last version.
    """
    command = ["fedclient", "train-local", "--config", str(site), "--settings", str(run_file), "--json"]
    command += ["--model", str(init)] if init else []
    command += ["--output", str(output)] if output else []
    done = subprocess.run(
        program(command), check=False, capture_output=True, text=True, env={**os.environ, **(environ or {})}
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr.strip()}")
    versions: list[dict[str, Any]] = json.loads(done.stdout)["versions"]
    return versions


def call(command: Sequence[str], *, quiet: bool = False) -> None:
    """Print and run a command, `quiet` without its output; end the program if it fails."""
    print(f"$ {' '.join(command)}", flush=True)
    code = subprocess.run(program(command), check=False, stdout=subprocess.DEVNULL if quiet else None).returncode
    if code:
        sys.exit(code)


@contextlib.contextmanager
def background(
    command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command until the context ends; its output goes to a log."""
    print(f"$ {' '.join(command)} &", flush=True)
    env = {**os.environ, **(environ or {})}
    with log.open("wb") as out, subprocess.Popen(program(command), stdout=out, stderr=out, env=env) as process:
        try:
            yield process
        finally:
            process.terminate()


def program(command: Sequence[str]) -> list[str]:
    """The command with the program beside this Python, whether the environment is activated or not."""
    return [str(Path(sys.executable).parent / command[0]), *command[1:]]
