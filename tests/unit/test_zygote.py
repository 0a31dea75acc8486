"""A forked command is what a fresh one would be."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.federation import alive, program, until
from tests.support.zygote import Zygote
from tests.support.zygote import zygote as this_zygote

PROBE = """
import atexit, json, os, signal, sys, threading
atexit.register(lambda: print("the end"))
threading.Thread(target=lambda: (threading.Event().wait(0.05), print("a thread"))).start()
handlers = {s.name: str(signal.getsignal(s)) for s in signal.Signals}
print(json.dumps({
    "session": [os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid()],
    "cwd": os.getcwd(), "argv": sys.argv, "path": sys.path[0], "env": dict(os.environ),
    "fds": [fd for fd in range(100) if os.path.exists(f"/proc/self/fd/{fd}")],
    "stdin": sys.stdin.read(), "umask": os.umask(0), "name": __name__,
    "handlers": handlers, "mask": list(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "streams": [[s.encoding, s.errors, s.line_buffering, s.isatty()] for s in (sys.stdin, sys.stdout, sys.stderr)],
    "flags": str(sys.flags), "main": threading.current_thread() is threading.main_thread(),
}))
print("an error", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""

GRPC = """
import asyncio, grpc, grpc.aio
async def main():
    server = grpc.aio.server()
    async def echo(request, context): return request
    handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("s", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for _ in range(20):
            assert await channel.unary_unary("/s/Echo")(b"x" * 100_000) == b"x" * 100_000
    await server.stop(None)
asyncio.run(main())
"""


@pytest.fixture
def zygote() -> Zygote:
    return this_zygote()


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    path = tmp_path / "probe.py"
    path.write_text(PROBE)
    return path


def test_a_forked_command_finds_what_a_fresh_one_finds(zygote: Zygote, probe: Path, tmp_path: Path) -> None:
    env = {"PATH": "/bin", "A": "b"} | {k: v for k, v in os.environ.items() if k.startswith(("PYTHON", "LC_", "LANG"))}
    arguments = [str(probe), "7", "ünï"]
    fresh = subprocess.run(
        [sys.executable, *arguments],
        cwd="/",
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        forked = zygote.start(arguments, cwd=Path("/"), env=env, stdout=out.fileno(), stderr=err.fileno())
    assert forked.wait(30) == fresh.returncode == 7
    assert (tmp_path / "err").read_text() == fresh.stderr == "an error\n"
    said, expected = (tmp_path / "out").read_text().splitlines(), fresh.stdout.splitlines()
    assert said[1:] == expected[1:] == ["a thread", "the end"]
    assert json.loads(said[0]) == json.loads(expected[0])


def test_both_programs_say_what_fresh_ones_say(zygote: Zygote, tmp_path: Path) -> None:
    for n, command in enumerate((["fedserver", "run", "list", "--data-dir", "none"], ["fedclient", "start"])):
        argv = [program(command[0]), *command[1:]]
        fresh = subprocess.run(argv, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        log = tmp_path / f"log{n}"
        assert zygote.spawn(argv, cwd=tmp_path, log=log).wait(30) == fresh.returncode
        assert log.read_bytes() == fresh.stdout + fresh.stderr


def test_a_signal_reaches_it_and_its_end_is_told_once(zygote: Zygote, tmp_path: Path) -> None:
    script = tmp_path / "sleeps.py"
    script.write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: exit(3))\nprint(flush=True)\ntime.sleep(600)"
    )
    for stop, code in (("terminate", 3), ("kill", -signal.SIGKILL)):
        log = tmp_path / stop
        process = zygote.spawn([str(script)], log=log)
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        until(lambda log=log: log.read_text(), "the script")
        getattr(process, stop)()
        assert process.wait(30) == process.poll() == process.wait() == code
        process.kill()
        assert not alive(process.pid)


def test_what_runs_ends_with_the_tests(tmp_path: Path) -> None:
    script = tmp_path / "sleeps.py"
    script.write_text("import time\ntime.sleep(600)")
    with contextlib.closing(Zygote([])) as zygote:
        process = zygote.spawn([str(script)], log=tmp_path / "log")
    until(lambda: not alive(process.pid), "its end")


def test_grpc_works_in_every_child(zygote: Zygote, tmp_path: Path) -> None:
    script = tmp_path / "calls.py"
    script.write_text(GRPC)
    processes = [zygote.spawn([str(script)], log=tmp_path / "log") for _ in range(10)]
    assert [p.wait(60) for p in processes] == [0] * 10, (tmp_path / "log").read_text()


def test_what_only_a_fresh_python_reads_is_refused(zygote: Zygote, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PYTHONPATH"):
        zygote.spawn(["fedserver"], env=os.environ | {"PYTHONPATH": "elsewhere"}, log=tmp_path / "log")
