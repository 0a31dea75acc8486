"""One server a data directory, and on a disk of its own machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.federation import PATIENCE, Federation, program
from tests.support.lying_disk import LyingDisk, library

pytestmark = pytest.mark.slow


def serve(data_dir: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A server that is to refuse."""
    command = [program("fedserver"), "serve", "--data-dir", str(data_dir), "--listen", "127.0.0.1:0"]
    env = {**os.environ, **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=PATIENCE, check=False)


def test_two_servers_on_one_directory(tmp_path: Path) -> None:
    with Federation(tmp_path) as federation:
        first = federation.start_server().server
        assert first is not None
        second = serve(federation.data_dir)
        assert second.returncode == 2
        (line,) = second.stderr.splitlines()
        assert f"is in use by the fedserver with process id {first.pid}" in line
        # The second has taken nothing from the first, not even its socket.
        assert federation.json("model", "list") == []
        federation.kill_server()
        federation.start_server()
        assert federation.server is not None
        assert federation.server.pid != first.pid
        assert federation.json("model", "list") == []


def test_a_network_file_system_is_refused(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    disk = LyingDisk(tmp_path / "disk", library(tmp_path_factory.getbasetemp()))
    disk.answer("mountinfo", f"1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 0:9 / {disk.root} rw - nfs4 there:/data rw\n")
    refused = serve(disk.root / "server", disk.environment)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert f"is on a network file system (nfs4 at {disk.root})" in line
    assert disk.fired("answered")
