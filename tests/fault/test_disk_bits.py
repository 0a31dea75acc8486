"""A bit turns in a stored blob: its readers are told, the operator learns what it is part of, a repair is enough."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedlink.blobs import CHUNK_SIZE
from tests.support.classes.drift import expected
from tests.support.federation import Federation, arrays_equal, until

pytestmark = pytest.mark.slow

SIZE = 800_000


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 4]))


def test_a_damaged_model_is_named_and_can_be_repaired(tmp_path: Path) -> None:
    start = {"w": np.linspace(-1, 1, SIZE, dtype=np.float32), "b": np.ones(3, np.float32)}
    with Federation(tmp_path) as federation:
        federation.start_server()
        federation.import_model("start", start)
        federation.import_model("other", {"x": np.ones(9, np.float32)})
        cohort = {"min_clients": 1, "task_retries": 9}
        federation.create_run(
            "r", workload="work", model="start", rounds=1, cohort=cohort, evaluation={"enabled": False}
        )
        whole = federation.json("model", "verify")
        assert {(f["model"], f["file"]) for f in whole if f["file"] == "manifest"} == {
            ("start", "manifest"),
            ("other", "manifest"),
            ("r@0", "manifest"),
        }
        assert not any(f["damage"] for f in whole)
        digest = max(whole, key=lambda f: f["blob"]["size"])["blob"]["digest"]
        path = federation.data_dir / "blobs" / digest[:2] / digest
        flip(path, 2 * CHUNK_SIZE + 77)

        where = f"the chunk at byte {2 * CHUNK_SIZE} has changed"
        site = federation.site("a", "drift:Drift", data={"size": SIZE, "number": 1, "examples": 3})
        assert site.daemon is not None
        daemon = site.daemon
        until(lambda: where in daemon.text(), "the site to be told")
        until(lambda: daemon.text().count("gave the task up") >= 2, "the site to be told again")
        assert federation.server is not None
        (line,) = [r for r in map(json.loads, federation.server.text().splitlines()) if "part_of" in r]
        assert (line["level"], line["blob"], line["part_of"]) == ("error", digest, ["r@0", "start"])
        assert where in line["error"]
        # The site is not told whose else the blob is.
        assert "part of" not in daemon.text()
        assert "part of r@0, start" in federation.call("model", "export", "start", "out", code=1).stderr

        said = federation.call("model", "verify", code=1)
        assert "2 of 6 files are damaged" in said.stderr
        assert [row.split()[0] for row in said.stdout.splitlines() if where in row] == ["start", "r@0"]
        damaged = json.loads(federation.call("model", "verify", "start", "--json", code=1).stdout)
        assert [where in f["damage"] for f in damaged] == [f["blob"]["digest"] == digest for f in damaged]
        assert "2 files of 1 models" in federation.call("model", "verify", "other").stdout
        federation.call("model", "verify", "none", code=4)

        flip(path, 2 * CHUNK_SIZE + 77)
        federation.finish("r")
        arrays_equal(federation.export("r@1"), expected(start, [(1, 3)], 1))
        assert "are as they were stored" in federation.call("model", "verify").stdout
