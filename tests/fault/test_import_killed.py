"""A server that is killed in the middle of an import keeps the bytes that it acknowledged."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedlink import failpoints
from tests.support.federation import Federation, arrays_equal

pytestmark = pytest.mark.slow

SIZE = 4_000_000


def written(pid: int) -> int:
    """Bytes that a process has written to files so far."""
    found = re.search(r"^wchar: (\d+)$", Path(f"/proc/{pid}/io").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def test_an_import_goes_on_after_a_kill_without_sending_a_byte_again(tmp_path: Path) -> None:
    start = {"w": np.random.default_rng(1).normal(size=SIZE).astype(np.float32)}
    log = tmp_path / "failpoints.log"
    with Federation(tmp_path) as federation:
        # The shard and the manifest are in the blob store, the model is not in the database.
        plan = {failpoints.VARIABLE: "blob.placed@2", failpoints.LOG_VARIABLE: str(log)}
        server = federation.start_server(env={**os.environ, **plan}).server
        assert server is not None
        save_file(start, tmp_path / "start.safetensors")
        federation.call("model", "import", "start.safetensors", code=3)
        assert server.wait() == -signal.SIGKILL
        assert log.read_text() == "blob.placed@2\n"
        server = federation.start_server().server
        assert server is not None
        assert not list((federation.data_dir / "blobs").glob("*/*"))
        before = written(server.pid)
        federation.import_model("start", start)
        assert written(server.pid) - before < SIZE
        arrays_equal(federation.export("start"), start)
        assert not list((federation.data_dir / "spool").iterdir())
        assert not list((federation.data_dir / "tmp").iterdir())
