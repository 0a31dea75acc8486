"""`fedserver health` and `fedclient health`, which the containers' health checks ask."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedclient.pulse import LATE_SECONDS, Pulse, read_pulse
from fedclient.spool import Spool
from fedlink.errors import FedlinkError
from fedserver.app import running
from fedserver.settings import ServerSettings
from tests.support.federation import PATIENCE, program
from tests.support.zygote import Command


async def fedserver_health(data_dir: Path, *options: str) -> tuple[int, str]:
    command = Command(program("fedserver"), "health", "--data-dir", str(data_dir), *options)
    done = await asyncio.to_thread(command.ended, PATIENCE)
    return done.returncode, done.stdout + done.stderr


async def test_a_server_is_healthy_while_it_serves(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    code, said = await fedserver_health(data_dir)
    assert code == 3
    assert "no server answers" in said
    async with running(ServerSettings(data_dir=data_dir, listen="127.0.0.1:0")) as app:
        assert await fedserver_health(data_dir) == (0, f"serving sites at {app.address}\n")
        assert await fedserver_health(data_dir, "--json") == (0, f'{{"address": "{app.address}"}}\n')
    code, _ = await fedserver_health(data_dir)
    assert code == 3


async def test_a_server_nobody_can_connect_to_is_not_healthy(tmp_path: Path) -> None:
    async with running(ServerSettings(data_dir=tmp_path, listen="127.0.0.1:0")):
        (tmp_path / "address").write_text("127.0.0.1:1\n", encoding="ascii")
        code, said = await fedserver_health(tmp_path)
        assert code == 3
        assert "takes no connections of sites" in said


@contextlib.contextmanager
def locked(state_dir: Path) -> Iterator[None]:
    """What a daemon does with its state directory."""
    spool = Spool(state_dir)
    try:
        yield
    finally:
        spool.close()


async def fedclient_health(config: Path, *options: str) -> tuple[int, str]:
    command = Command(program("fedclient"), "health", "--config", str(config), *options)
    done = await asyncio.to_thread(command.ended, PATIENCE)
    return done.returncode, done.stdout + done.stderr


async def test_a_daemon_is_healthy_while_it_beats(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text('name = "s"\nserver = "127.0.0.1:1"\nstate_dir = "."\n[workload.w]\ntrainer = "m:W"\n')
    with pytest.raises(FedlinkError, match="no fedclient runs"):
        read_pulse(tmp_path)
    pulse = Pulse(tmp_path)
    with locked(tmp_path):
        async with pulse.beating():
            await asyncio.sleep(0.5)
            assert read_pulse(tmp_path) == "starting"
            said = [await fedclient_health(site, *options) for options in ((), ("--json",))]
            assert said == [(0, "starting\n"), (0, '{"phase": "starting"}\n')]
    with pytest.raises(FedlinkError, match="no fedclient runs"):
        read_pulse(tmp_path)


async def test_a_daemon_that_hangs_or_was_killed_is_not_healthy(tmp_path: Path) -> None:
    async with Pulse(tmp_path).beating():
        await asyncio.sleep(0.5)
        with pytest.raises(FedlinkError, match="was killed"):
            read_pulse(tmp_path)
        late = time.time() - LATE_SECONDS - 5
        os.utime(tmp_path / "pulse", (late, late))
        with locked(tmp_path), pytest.raises(FedlinkError, match=r"no sign of life for 6[0-9] s: it hangs"):
            read_pulse(tmp_path)
