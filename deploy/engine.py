"""Docker or podman, whichever is there: the few things the demo asks of them."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

COMPOSE_FILE = Path(__file__).resolve().parent / "compose.yaml"
PROJECT = "fedlink-demo"
"""The `name` in compose.yaml, which engines put before the names of its volumes."""
CONFINED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none")
"""How a container beside those of compose.yaml runs: as they do, and without any network."""
_LABEL = "label=com.docker.compose"
_STARTED_BY_POLICY_SECONDS = 4.0


class EngineError(Exception):
    """No engine is there, or a command of it failed."""


@dataclass(frozen=True)
class Engine:
    """A container engine.

    Attributes:
        name: "docker" or "podman".
        compose: the command that reads compose files.
    """

    name: str
    compose: tuple[str, ...]

    def build(self, dockerfile: Path, image: str) -> None:
        """Build an image; BUILD_ARGS in the environment holds further options for the engine.

        Raises:
            EngineError: it did not build.
        """
        further = shlex.split(os.environ.get("BUILD_ARGS", ""))
        # Podman's own format has no health checks.
        environment = os.environ | {"BUILDAH_FORMAT": "docker", "DOCKER_BUILDKIT": "1"}
        root = dockerfile.parents[1]
        self._show([self.name, "build", *further, "-f", str(dockerfile), "-t", image, str(root)], env=environment)

    def up(self, *services: str, start: bool = True) -> None:
        """Create networks, volumes and containers, and start those of `services`, or all.

        Raises:
            EngineError: it did not work.
        """
        self._compose("up", "-d" if start else "--no-start", *services)

    def down(self) -> None:
        """Remove containers, networks and volumes."""
        self._compose("down", "-v")

    def fill(self, volume: str, directory: str, image: str, files: Mapping[str, bytes | Path]) -> None:
        """Put files into a volume, as the image's user.

        Raises:
            EngineError: it did not work.
        """
        mount = f"--volume={PROJECT}_{volume}:{directory}"
        self.once(image, f"tar -x -C {directory}", files, mount)

    def once(self, image: str, script: str, files: Mapping[str, bytes | Path], *options: str) -> bytes:
        """Run a script in a container of its own that reads `files` as a tar archive; returns what it prints.

        Raises:
            EngineError: the script failed.
        """
        command = [self.name, "run", "--rm", "-i", *CONFINED, *options, "--entrypoint=sh", image, "-ec", script]
        return self._output(command, pack(files))

    def container(self, service: str) -> str:
        """The id of a service's container.

        Raises:
            EngineError: there is none.
        """
        labels = (f"{_LABEL}.project={PROJECT}", f"{_LABEL}.service={service}")
        command = [self.name, "ps", "-a", "-q", "--no-trunc"]
        found = self._output([*command, *(f"--filter={label}" for label in labels)]).decode().split()
        if not found:
            raise EngineError(f"{self.name} knows no container of the service {service}")
        return found[0]

    def ask(self, service: str, *command: str, data: bytes | None = None) -> bytes:
        """Run a command in a service's container; returns what it prints.

        Raises:
            EngineError: the command failed.
        """
        return self._output([self.name, "exec", "-i", self.container(service), *command], data)

    def show(self, service: str, *command: str) -> int:
        """Run a command in a service's container for the person at the terminal; returns its exit status."""
        terminal = ["-t"] if sys.stdout.isatty() else []
        line = [self.name, "exec", *terminal, self.container(service), *command]
        return subprocess.run(line, check=False, stdin=None if terminal else subprocess.DEVNULL).returncode

    def healthy(self, service: str) -> bool:
        """Ask the health check of a service's image now; podman without systemd never asks by itself."""
        state = json.loads(self._output([self.name, "inspect", self.container(service)]))[0]
        test = (state["Config"].get("Healthcheck") or {}).get("Test") or []
        if test[:1] != ["CMD"]:
            raise EngineError(f"the image of {service} came without its health check; build it in the docker format")
        done = subprocess.run(
            [self.name, "exec", self.container(service), *test[1:]], check=False, capture_output=True, text=True
        )
        return done.returncode == 0

    def running(self, service: str) -> bool:
        """Whether a service's container runs."""
        state = json.loads(self._output([self.name, "inspect", self.container(service)]))[0]["State"]
        return bool(state["Running"])

    def kill(self, service: str) -> None:
        """SIGKILL to everything in a service's container."""
        self._output([self.name, "kill", "--signal=KILL", self.container(service)])

    def back(self, service: str) -> str:
        """See that a container runs, as it should after a kill; returns how it came to."""
        deadline = time.monotonic() + _STARTED_BY_POLICY_SECONDS
        while time.monotonic() < deadline:
            if self.running(service):
                return "by its restart policy"
            time.sleep(0.2)
        self._output([self.name, "start", self.container(service)])
        return f"with {self.name} start"

    def logs(self, service: str, lines: int) -> str:
        """The end of a service's log."""
        command = [self.name, "logs", f"--tail={lines}", self.container(service)]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return done.stdout.decode(errors="replace")

    def _compose(self, *arguments: str) -> None:
        self._show([*self.compose, "-f", str(COMPOSE_FILE), *arguments])

    def _show(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        print(f"$ {shlex.join(command)}", flush=True)
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
        if done.returncode:
            raise EngineError(f"{shlex.join(command)} failed:\n{_end(done.stdout + done.stderr)}")

    def _output(self, command: Sequence[str], data: bytes | None = None) -> bytes:
        done = subprocess.run(command, check=False, capture_output=True, input=data)
        if done.returncode:
            raise EngineError(f"{shlex.join(command)} failed:\n{_end(done.stderr.decode(errors='replace'))}")
        return done.stdout


def find() -> Engine:
    """The engine to use: docker if it answers, podman otherwise; ENGINE in the environment chooses one.

    Raises:
        EngineError: there is none, and why not.
    """
    composes = {
        "docker": (("docker", "compose"), ("docker-compose",)),
        "podman": (("podman-compose",), ("podman", "compose")),
    }
    chosen = os.environ.get("ENGINE", "")
    troubles = []
    for name in [chosen] if chosen else composes:
        if name not in composes:
            raise EngineError(f"ENGINE={name} is none that is known here; use docker or podman")
        if not _works(name, "info"):
            troubles.append(f"{name} {'does not answer' if shutil.which(name) else 'is not installed'}")
            continue
        for compose in composes[name]:
            if _works(*compose, "version"):
                return Engine(name, compose)
        troubles.append(f"{name} is there, but neither of " + " and ".join(" ".join(c) for c in composes[name]))
    raise EngineError(f"no container engine: {'; '.join(troubles)}. Install docker, or podman and podman-compose")


def pack(files: Mapping[str, bytes | Path]) -> bytes:
    """A tar archive; keys are for their owner only."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, source in files.items():
            data = source.read_bytes() if isinstance(source, Path) else source
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), int(time.time())
            member.mode = 0o600 if name.endswith(".key") else 0o644
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def unpack(archive: bytes, directory: Path) -> None:
    """Write the plain files of a tar archive into a directory, whatever directories they come with."""
    directory.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        for member in opened:
            file = opened.extractfile(member)
            if file:
                (directory / Path(member.name).name).write_bytes(file.read())


def _works(*command: str) -> bool:
    if not shutil.which(command[0]):
        return False
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _end(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-40:])
