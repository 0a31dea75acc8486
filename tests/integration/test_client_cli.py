"""`fedclient start` as a process: signals, kills, exit codes, words."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fedlink.errors import FedlinkError, Reason
from tests.support.fake_server import FakeServer
from tests.support.federation import program
from tests.support.site import Site, add_model, train_task
from tests.support.zygote import Command


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer() as running:
        yield running


@pytest.fixture
def site(tmp_path: Path, server: FakeServer) -> Site:
    return Site(tmp_path / "site", server.address)


def fedclient(*arguments: str) -> Command:
    return Command(program("fedclient"), *arguments)


async def ended(command: Command) -> tuple[int, str, str]:
    done = await asyncio.to_thread(command.ended, 30)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def daemon(site: Site) -> Command:
    return fedclient("start", "--config", str(site.config))


async def test_killed_at_once_and_started_again(server: FakeServer, site: Site, tmp_path: Path) -> None:
    model = add_model(server, tmp_path / "model")
    site.set("hold")
    with daemon(site) as started:
        await server.give(train_task(model))
        await server.until(lambda _: site.trained)
        started.process.kill()
    trainer = int(site.trained[0].split()[2])
    async with asyncio.timeout(10):
        while True:
            try:
                os.kill(trainer, 0)
            except ProcessLookupError:
                break
            await asyncio.sleep(0.02)
    site.clear("hold")
    with daemon(site) as started:
        await server.until(lambda s: s.completed)
        started.process.terminate()
        code, _, _ = await ended(started)
    assert code == 0
    assert server.state.deregistered == 1
    assert len(site.trained) == 2


async def test_sigterm_hands_back_and_a_second_one_ends_at_once(server: FakeServer, tmp_path: Path) -> None:
    size = 1 << 22
    site = Site(tmp_path / "site", server.address, size=size)
    model = add_model(server, tmp_path / "model", size=size)
    server.state.write_delay = 1.0
    with daemon(site) as started:
        await server.give(train_task(model))
        await server.until(lambda s: s.received)
        started.process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            await asyncio.to_thread(started.process.wait, 1.5)  # it finishes its upload
        started.process.terminate()
        code, _, _ = await ended(started)
    assert code == 1
    server.state.write_delay = 0.0
    with daemon(site):
        await server.until(lambda s: s.completed)
    assert len(site.trained) == 1


async def test_a_refusal_is_said_and_ends_with_4(server: FakeServer, site: Site) -> None:
    server.state.faults["RegisterClient"].append(FedlinkError(Reason.BAD_CREDENTIALS, "client 'site' needs a token"))
    with daemon(site) as started:
        code, _, err = await ended(started)
    assert code == 4
    assert err.splitlines()[-1] == "fedclient: client 'site' needs a token"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = ", "not valid TOML"),
        ('name = "site"', "workload: missing"),
        ('name = "site"\n[workload.x]\ntrainer = "m:C"\nlimit = 3', "unknown key"),
        ('name = "site"\n[workload.x]\ntrainer = "nowhere:C"', "nowhere"),
        ('name = "site"\npassword = "x"\n[workload.x]\ntrainer = "m:C"', "password: unknown key"),
        ('name = "site"\ntoken_file = "absent"\n[workload.x]\ntrainer = "adder:Adder"', "absent"),
    ],
)
async def test_a_wrong_configuration_is_said_and_ends_with_2(site: Site, text: str, words: str) -> None:
    site.config.write_text(text)
    with daemon(site) as started:
        code, _, err = await ended(started)
    assert code == 2
    assert err.splitlines()[-1].startswith("fedclient: ")
    assert words in err.splitlines()[-1]


async def test_other_commands_and_words() -> None:
    assert (await ended(fedclient("--version")))[:2] == (0, "fedclient 0.1.0\n")
    code, out, _ = await ended(fedclient("--help"))
    assert code == 0
    assert all(command in out for command in ("start", "train-local", "init-model"))
    code, _, err = await ended(fedclient("start", "--config", "/nowhere/site.toml"))
    assert (code, err) == (2, "fedclient: /nowhere/site.toml does not exist\n")
    assert (await ended(fedclient("start", "--nonsense")))[0] == 2


async def test_the_token_is_sent_and_guarded(server: FakeServer, tmp_path: Path) -> None:
    site = Site(tmp_path / "site", server.address, extra='token_file = "token"')
    token = site.directory / "token"
    token.write_text("fedlink_secret\n")
    token.chmod(0o644)
    with daemon(site) as started:
        code, _, err = await ended(started)
    assert code == 2
    assert "chmod 600" in err
    token.chmod(0o600)
    with daemon(site) as started:
        await server.until(lambda s: s.polls)
        started.process.terminate()
        code, out, err = await ended(started)
    assert code == 0
    assert server.state.metadata[0]["authorization"] == "Bearer fedlink_secret"
    assert "secret" not in out + err


async def test_the_daemon_never_imports_torch() -> None:
    code = (
        "import sys, fedclient.cli, fedclient.agent; sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == 0
