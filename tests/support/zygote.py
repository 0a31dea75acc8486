"""Commands without their imports: a process that has imported both programs, and forks a child for each command.

A fresh `fedserver` or `fedclient` spends most of its first second on imports; a forked one starts in a few
milliseconds. The child is what a fresh process would be: the leader of its own session, with its own environment,
directory and arguments, no descriptor but 0 to 2, and the interpreter's own end with its exit code. gRPC must not
have been used before a fork, and it has not: it is imported, and nothing more.

    process = zygote().spawn([program("fedserver"), "serve"], cwd=path, env=os.environ, log=path / "log")
    process.wait(10.0)

What is read at start-up, before any of our code, cannot be given to a child: variables of Python's and of the locale
must be those of the tests themselves. With TESTS_FORK=0 every command is a fresh process.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ENTRIES = {"fedserver": "fedserver.cli", "fedclient": "fedclient.cli"}
"""The programs, and the modules whose `main` they are."""
PRELOADED = (
    *ENTRIES.values(),
    "fedserver.app",
    "fedserver.modelexport",
    "fedserver.modelfiles",
    "fedserver.store.migrations",
    "sqlalchemy.dialects.sqlite.pysqlite",
    "fedclient.agent",
    "fedclient.checks.report",
    "fedclient.local",
)
"""What a command would import."""
_MAX_REQUEST = 1 << 17
_FIXED = ("PYTHON", "LC_", "LANG")


class Forked:
    """A child of the zygote's, with the manners of a `subprocess.Popen`.

    It stays a zombie until `poll` or `wait` has seen its end, so its pid is nobody else's before.
    """

    def __init__(self, zygote: Zygote, pid: int, argv: list[str]) -> None:
        self.pid = pid
        self.args = argv
        self.returncode: int | None = None
        self._zygote = zygote
        self._fd = os.pidfd_open(pid)
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._reap(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one.

        Raises:
            subprocess.TimeoutExpired: it still runs after so many seconds.
        """
        code = self._reap(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Signal it, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def _reap(self, seconds: float | None) -> int | None:
        if self.returncode is None:
            ready = select.poll()
            ready.register(self._fd, select.POLLIN)
            if not ready.poll(None if seconds is None else seconds * 1000):
                return None
        with self._lock:
            if self.returncode is None:
                self.returncode = self._zygote.ask({"reap": self.pid})
                os.close(self._fd)
        return self.returncode


class Zygote:
    """The process that forks; started at once, ended with `close` or with this process.

    Args:
        modules: what it imports beforehand.
    """

    def __init__(self, modules: Sequence[str] = PRELOADED) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.support.zygote", str(theirs.fileno()), *modules]
        # A BLAS makes a thread for each core when it is imported, and none should be there at a fork.
        env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        root = Path(__file__).parents[2]
        with theirs:
            self._process = subprocess.Popen(
                command,
                cwd=root,
                env=env,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._lock = threading.Lock()

    def spawn(
        self, argv: list[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, log: Path
    ) -> Forked:
        """Start a command in the background.

        Args:
            argv: the program's path, or that of a script (`.py`), and its arguments.
            cwd: its directory; by default this process's.
            env: all its variables; by default this process's.
            log: where its output is appended.
        """
        with log.open("ab") as out:
            return self.start(argv, cwd=cwd, env=env, stdout=out.fileno(), stderr=out.fileno())

    def start(
        self,
        argv: list[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: int,
        stderr: int,
    ) -> Forked:
        """The same with descriptors for its output, which the caller may close afterwards."""
        env = dict(os.environ if env is None else env)
        for name in {*env, *os.environ}:
            if name.startswith(_FIXED) and env.get(name) != os.environ.get(name):
                raise ValueError(f"{name} is read when Python starts; use subprocess where it matters")
        request = {"argv": argv, "cwd": str(cwd or Path.cwd()), "env": env}
        return Forked(self, self.ask(request, stdout, stderr), argv)

    def ask(self, request: Mapping[str, Any], *fds: int) -> int:
        """Have a request carried out; returns the number it is answered with."""
        with self._lock:
            socket.send_fds(self._ours, [json.dumps(request).encode()], list(fds))
            answer = self._ours.recv(64)
        assert answer, "the zygote has died"
        return int(answer)

    def close(self) -> None:
        """End it, and kill every child that has not been seen to end."""
        self._ours.close()
        self._process.wait()


@functools.cache
def zygote() -> Zygote:
    """This process's zygote."""
    made = Zygote()
    atexit.register(made.close)
    return made


def begin(
    argv: list[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, stdout: int, stderr: int
) -> Forked | subprocess.Popen[bytes]:
    """Start a command of ours in a session of its own: forked, or with TESTS_FORK=0 a fresh process."""
    if os.environ.get("TESTS_FORK", "1") != "0":
        return zygote().start(argv, cwd=cwd, env=env, stdout=stdout, stderr=stderr)
    return subprocess.Popen(
        argv,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


class Command(contextlib.ExitStack):
    """A command under way, whose output is kept for its end; it ends with the context at the latest.

    Args:
        argv: as for `Zygote.spawn`.
        cwd: its directory; by default this process's.
    """

    def __init__(self, *argv: str, cwd: Path | None = None) -> None:
        super().__init__()
        self._argv = list(argv)
        directory = Path(self.enter_context(tempfile.TemporaryDirectory()))
        self._out, self._err = directory / "out", directory / "err"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = begin(self._argv, cwd=cwd, stdout=out.fileno(), stderr=err.fileno())
        self.callback(self.process.wait)
        self.callback(self.process.kill)

    def ended(self, seconds: float) -> subprocess.CompletedProcess[str]:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it takes longer, and is killed.
        """
        with self:
            code = self.process.wait(seconds)
            return subprocess.CompletedProcess(self._argv, code, self._out.read_text(), self._err.read_text())


# --- In the zygote


def _serve(connection: socket.socket) -> Callable[[], object] | None:
    """Carry out requests until the tests are over; in a child, return what it is to run."""
    children: set[int] = set()
    while True:
        data, fds, _, _ = socket.recv_fds(connection, _MAX_REQUEST, 2)
        if not data:
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            return None
        request = json.loads(data)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)
            children.remove(request["reap"])
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
            continue
        pid = os.fork()
        if pid == 0:
            os.setsid()
            # Only now: the parent may signal the group that this process leads.
            connection.send(str(os.getpid()).encode())
            return _become(request, *fds)
        children.add(pid)
        for fd in fds:
            os.close(fd)


def _become(request: Mapping[str, Any], stdout: int, stderr: int) -> Callable[[], object]:
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["argv"]
    program = Path(sys.argv[0])
    sys.path[0] = str(program.parent)
    if program.suffix == ".py":
        return lambda: runpy.run_path(str(program), run_name="__main__") and None
    entry: Callable[[], object] = importlib.import_module(ENTRIES[program.name]).main
    return entry


def main(fd: int, modules: Sequence[str]) -> Callable[[], object] | None:
    """Import everything, then serve."""
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    # The children never look at these objects again, so that their pages stay shared.
    gc.freeze()
    return _serve(socket.socket(fileno=fd))


if __name__ == "__main__":
    # The command runs at the top, so that the interpreter ends as it does for a fresh one.
    if (entry := main(int(sys.argv[1]), sys.argv[2:])) is not None:
        sys.exit(entry())  # type: ignore[arg-type]
