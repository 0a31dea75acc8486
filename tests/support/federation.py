"""A federation of real processes in a directory: one server, its sites, and lines that a test can hold."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import grpc
import ml_dtypes  # noqa: F401 - gives numpy the dtypes that safetensors files may hold
import numpy as np
from safetensors.numpy import load_file, save_file

from fedlink import rpc
from fedlink.v1 import admin_service_pb2 as admin_pb
from fedlink.v1 import admin_service_pb2_grpc as admin_grpc
from fedserver.settings import admin_socket
from tests.support.line import Line
from tests.support.zygote import Command, begin

T = TypeVar("T")
PATIENCE = 120.0
"""Seconds after which a test gives up; far more than anything takes, even on a busy machine."""
CLASSES = Path(__file__).parent / "classes"


def until(look: Callable[[], T], what: str, *, seconds: float = PATIENCE) -> T:
    """Look again and again until there is something to see; returns it."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.02)
    return seen


def program(name: str) -> str:
    """The installed command beside this Python."""
    return str(Path(sys.executable).parent / name)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Daemon:
    """A process in the background, the leader of its own session; its output goes to a file."""

    def __init__(self, command: list[str], log: Path, *, cwd: Path, env: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as out:
            self.process = begin(command, cwd=cwd, env=env, stdout=out.fileno(), stderr=out.fileno())

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL the process itself and nothing that it started."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def stop(self) -> int:
        """SIGTERM, and wait; returns the exit code."""
        self.process.terminate()
        return self.process.wait(PATIENCE)

    def wait(self) -> int:
        """Wait for it to end by itself; returns the exit code."""
        return self.process.wait(PATIENCE)

    def clean(self) -> None:
        """Leave nothing of it behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)

    def text(self) -> str:
        """Everything it has said."""
        return self.log.read_text(errors="replace")


class Federation(contextlib.ExitStack):
    """A server's data directory and some sites below one directory; every process ends with the context."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.data_dir = root / "server"
        self.address = ""
        self.server: Daemon | None = None
        self.sites: dict[str, Site] = {}

    def __enter__(self) -> Self:
        self.root.mkdir(parents=True, exist_ok=True)
        return self

    # --- Processes

    def start_server(
        self, *options: str, listen: str = "", env: Mapping[str, str] | None = None, **tables: Any
    ) -> Self:
        """Start the server, after a kill on the same port; returns when it serves.

        Args:
            options: of `fedserver serve`.
            listen: address; by default that of before, or a free port on loopback.
            env: all its variables; by default ours.
            tables: what a fedserver.toml is to say, e.g. `tls={...}`.
        """
        listen = listen or self.address or "127.0.0.1:0"
        if tables:
            config = self.root / "fedserver.toml"
            config.write_text(toml(tables))
            options = ("--config", str(config), *options)
        written = self.data_dir / "address"
        written.unlink(missing_ok=True)
        command = [program("fedserver"), "serve", "--data-dir", str(self.data_dir), "--listen", listen, *options]
        self.server = server = self._daemon(command, "server", env)
        until(lambda: written.exists() or not server.running, "the server to start")
        assert server.running, server.text()
        self.address = written.read_text().strip()
        return self

    def kill_server(self) -> None:
        """SIGKILL the server."""
        assert self.server is not None
        self.server.kill()

    def site(self, name: str, trainer: str, *, start: bool = True, **options: Any) -> Site:
        """Make a site with one workload; see `Site`."""
        self.sites[name] = site = Site(self, name, trainer, **options)
        if start:
            site.start()
        return site

    def _daemon(self, command: list[str], name: str, env: Mapping[str, str] | None = None) -> Daemon:
        daemon = Daemon(command, self.root / f"{name}.log", cwd=self.root, env=env)
        self.callback(daemon.clean)
        return daemon

    # --- Commands

    def call(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a `fedserver` command against this server, and expect an exit code."""
        return call("fedserver", *arguments, "--data-dir", str(self.data_dir), code=code, cwd=self.root)

    def json(self, *arguments: str) -> Any:
        """What a `fedserver` command prints with --json."""
        return json.loads(self.call(*arguments, "--json").stdout)

    def import_model(self, name: str, arrays: Mapping[str, np.ndarray], *options: str) -> None:
        """Import arrays as a model."""
        path = self.root / f"{name}.safetensors"
        save_file({k: np.ascontiguousarray(v).reshape(v.shape) for k, v in arrays.items()}, path)
        self.call("model", "import", str(path), *options)

    def create_run(self, name: str, *, workload: str, model: str, rounds: int = 1, **tables: Any) -> None:
        """Create a run through a run file."""
        path = self.root / f"{name}.toml"
        path.write_text(toml({"name": name, "workload": workload, "model": model, "rounds": rounds, **tables}))
        self.call("run", "create", str(path))

    def finish(self, run: str, *, code: int = 0) -> list[dict[str, Any]]:
        """Wait for a run to end; returns its events."""
        lines = self.call("run", "watch", run, "--json", code=code).stdout.splitlines()
        return [json.loads(line) for line in lines]

    def export(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of an exported model or version."""
        target = self.root / "exports" / name
        shutil.rmtree(target, ignore_errors=True)
        self.call("model", "export", name, str(target))
        arrays: dict[str, np.ndarray] = {}
        for file in target.glob("*.safetensors"):
            arrays |= load_file(file)
        return arrays

    # --- Quick looks, for waiting

    @contextlib.contextmanager
    def admin(self) -> Iterator[admin_grpc.AdminServiceStub]:
        """The operators' service."""
        with grpc.insecure_channel(f"unix:{admin_socket(self.data_dir)}", options=rpc.channel_options()) as channel:
            yield admin_grpc.AdminServiceStub(channel)

    def round(self, run: str, number: int) -> admin_pb.Round | None:
        """A round, or None if it has not begun or the server does not answer."""
        with self.admin() as stub, contextlib.suppress(grpc.RpcError):
            request = admin_pb.GetRoundRequest(run=run, number=number)
            found: admin_pb.Round = stub.GetRound(request, timeout=5).round
            return found
        return None

    def run_state(self, run: str) -> admin_pb.Run | None:
        """A run, or None if the server does not answer."""
        with self.admin() as stub, contextlib.suppress(grpc.RpcError):
            found: admin_pb.Run = stub.GetRun(admin_pb.GetRunRequest(run=run), timeout=5).run
            return found
        return None

    def until_version(self, run: str, version: int) -> None:
        """Wait until a run has committed a version."""
        until(lambda: (r := self.run_state(run)) and r.version >= version, f"version {version} of {run}")


class Site:
    """A directory with a site.toml, a control directory to steer its trainer by, and a daemon.

    Args:
        federation: where it belongs.
        name: of the site.
        trainer: MODULE:Class, or a script; MODULE.py is taken from tests/support/classes unless `source` names it.
        workload: what the workload is called.
        source: file of the module.
        data: `[workload.NAME.data]`; `control` is added.
        extra: further keys of site.toml.
        options: further keys of `[workload.NAME]`.
        server: address to connect to; by default the server's.
    """

    def __init__(
        self,
        federation: Federation,
        name: str,
        trainer: str,
        *,
        workload: str = "work",
        source: Path | None = None,
        data: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        server: str = "",
    ) -> None:
        self._federation = federation
        self.name = name
        self.directory = federation.root / "sites" / name
        self.control = self.directory / "control"
        self.control.mkdir(parents=True)
        script = trainer.endswith(".py")
        file = trainer if script else f"{trainer.partition(':')[0]}.py"
        shutil.copy(source or CLASSES / file, self.directory / file)
        self.config = self.directory / "site.toml"
        table = {"name": name, "server": server or federation.address, "devices": ["cpu"], **(extra or {})}
        offer = {"trainer": trainer, **(options or {})}
        if not script:
            offer["data"] = {"control": "control", **(data or {})}
        self.config.write_text(toml({**table, "workload": {workload: offer}}))
        self.command = [program("fedclient"), "start", "--config", str(self.config)]
        self.daemon: Daemon | None = None

    def start(self, *options: str, env: Mapping[str, str] | None = None) -> Daemon:
        """Start the daemon (again); `env` are all its variables, by default ours."""
        self.daemon = self._federation._daemon([*self.command, *options], self.name, env)
        return self.daemon

    def kill(self) -> None:
        """SIGKILL the daemon."""
        assert self.daemon is not None
        self.daemon.kill()

    def hold(self) -> None:
        """Let the trainer wait in its next step."""
        (self.control / "hold").touch()

    def release(self) -> None:
        """Let it go on."""
        (self.control / "hold").unlink()

    @property
    def trained(self) -> list[tuple[int, int]]:
        """Round and trainer's pid of every training begun."""
        path = self.control / "trained"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(r), int(pid)) for r, pid in (line.split() for line in lines)]

    def until_training(self, round_: int, *, times: int = 1) -> int:
        """Wait until a round's training has begun so many times; returns the trainer's pid."""
        begun = until(
            lambda: pids if len(pids := [pid for r, pid in self.trained if r == round_]) >= times else None,
            f"{self.name} to train round {round_}",
        )
        return begun[-1]


class Gate(Line):
    """A line that stops carrying a connection's bytes towards the server after the first `after` of them.

    The connection stands still, with an upload in its middle, until `open` or until an end goes away.
    """

    def __init__(self, target: str, *, after: int) -> None:
        super().__init__(target)
        self._after = after

    def __enter__(self) -> Self:
        super().__enter__()
        self._held = self.stall(after_bytes=self._after, towards="server", times=None)
        return self

    def open(self) -> None:
        """Carry everything from now on."""
        self._held.release()

    def until_reached(self) -> None:
        """Wait until a connection is held."""
        self._held.until_fired()


def call(name: str, *arguments: str, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command, and expect an exit code, and never a traceback; an error is one line on stderr."""
    done = Command(program(name), *arguments, cwd=cwd).ended(PATIENCE)
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    assert done.returncode == code, f"{done.args} ended with {done.returncode}: {done.stdout}\n{done.stderr}"
    return done


def toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """A table in TOML; scalars and lists are written as in JSON."""
    plain = [f"{_key(k)} = {json.dumps(v)}" for k, v in table.items() if not isinstance(v, Mapping)]
    parts = ["\n".join(plain)]
    for key, inner in table.items():
        if isinstance(inner, Mapping):
            path = f"{prefix}{_key(key)}"
            parts.append(f"[{path}]\n{toml(inner, f'{path}.')}")
    return "\n".join(parts) + "\n"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def arrays_equal(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], names: Iterable[str] = ()) -> None:
    """The same tensors, bit for bit."""
    for name in names or expected:
        assert got[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    assert names or set(got) == set(expected)
