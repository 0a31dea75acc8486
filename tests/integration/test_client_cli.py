"""`fedclient start` as a process: signals, kills, exit codes, words."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fedlink.errors import FedlinkError, Reason
from tests.support.fake_server import FakeServer
from tests.support.site import Site, add_model, train_task


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer() as running:
        yield running


@pytest.fixture
def site(tmp_path: Path, server: FakeServer) -> Site:
    return Site(tmp_path / "site", server.address)


async def fedclient(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fedclient.cli",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def ended(process: asyncio.subprocess.Process) -> tuple[int, str, str]:
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode is not None
    assert b"Traceback" not in err
    return process.returncode, out.decode(), err.decode()


@contextlib.asynccontextmanager
async def daemon(site: Site) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await fedclient("start", "--config", str(site.config))
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def test_killed_at_once_and_started_again(server: FakeServer, site: Site, tmp_path: Path) -> None:
    model = add_model(server, tmp_path / "model")
    site.set("hold")
    async with daemon(site) as process:
        await server.give(train_task(model))
        await server.until(lambda _: site.trained)
        process.kill()
        await process.communicate()
    trainer = int(site.trained[0].split()[2])
    async with asyncio.timeout(10):
        while True:
            try:
                os.kill(trainer, 0)
            except ProcessLookupError:
                break
            await asyncio.sleep(0.02)
    site.clear("hold")
    async with daemon(site) as process:
        await server.until(lambda s: s.completed)
        process.send_signal(signal.SIGTERM)
        code, _, _ = await ended(process)
    assert code == 0
    assert server.state.deregistered == 1
    assert len(site.trained) == 2


async def test_sigterm_hands_back_and_a_second_one_ends_at_once(server: FakeServer, tmp_path: Path) -> None:
    size = 1 << 22
    site = Site(tmp_path / "site", server.address, size=size)
    model = add_model(server, tmp_path / "model", size=size)
    server.state.write_delay = 1.0
    async with daemon(site) as process:
        await server.give(train_task(model))
        await server.until(lambda s: s.received)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(process.wait(), 1.5)  # it finishes its upload
        process.send_signal(signal.SIGTERM)
        code, _, _ = await ended(process)
    assert code == 1
    server.state.write_delay = 0.0
    async with daemon(site):
        await server.until(lambda s: s.completed)
    assert len(site.trained) == 1


async def test_a_refusal_is_said_and_ends_with_4(server: FakeServer, site: Site) -> None:
    server.state.faults["RegisterClient"].append(FedlinkError(Reason.BAD_CREDENTIALS, "client 'site' needs a token"))
    async with daemon(site) as process:
        code, _, err = await ended(process)
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
    async with daemon(site) as process:
        code, _, err = await ended(process)
    assert code == 2
    assert err.splitlines()[-1].startswith("fedclient: ")
    assert words in err.splitlines()[-1]


async def test_other_commands_and_words() -> None:
    assert (await ended(await fedclient("--version")))[:2] == (0, "fedclient 0.1.0\n")
    code, out, _ = await ended(await fedclient("--help"))
    assert code == 0
    assert all(command in out for command in ("start", "train-local", "init-model"))
    code, _, err = await ended(await fedclient("start", "--config", "/nowhere/site.toml"))
    assert (code, err) == (2, "fedclient: /nowhere/site.toml does not exist\n")
    assert (await ended(await fedclient("start", "--nonsense")))[0] == 2


async def test_the_token_is_sent_and_guarded(server: FakeServer, tmp_path: Path) -> None:
    site = Site(tmp_path / "site", server.address, extra='token_file = "token"')
    token = site.directory / "token"
    token.write_text("fedlink_secret\n")
    token.chmod(0o644)
    async with daemon(site) as process:
        code, _, err = await ended(process)
    assert code == 2
    assert "chmod 600" in err
    token.chmod(0o600)
    async with daemon(site) as process:
        await server.until(lambda s: s.polls)
        process.send_signal(signal.SIGTERM)
        code, out, err = await ended(process)
    assert code == 0
    assert server.state.metadata[0]["authorization"] == "Bearer fedlink_secret"
    assert "secret" not in out + err


async def test_the_daemon_never_imports_torch() -> None:
    code = (
        "import sys, fedclient.cli, fedclient.agent; sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    assert await process.wait() == 0
