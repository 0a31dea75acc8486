"""FLamby's accuracies through a real server and four real daemons; all five seeds are `make reproduce-heart`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import heart

pytestmark = pytest.mark.slow

# The first of the five.
SEED, FEDAVG, POOLED = "42", 0.7520, 0.7913
ONE_ROW = 1 / 254 + 1e-4
TRAIN, TEST = 0, 1


@pytest.mark.timeout(900)
@pytest.mark.xdist_group("heavy")
def test_the_published_accuracies(tmp_path: Path, heart_data: Path) -> None:
    (tmp_path / "data").symlink_to(heart_data)
    command = [sys.executable, "-m", "examples.heart.reproduce", "--seeds", SEED, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=heart.EXAMPLE.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.rstrip().splitlines()
    assert lines[-1].startswith("result ")
    result = json.loads(lines[-1].removeprefix("result "))
    assert (result["fedavg"], result["fedavg_mean"]) == ({SEED: FEDAVG}, FEDAVG)
    # The order of the batches moves a pooled accuracy by a row.
    pooled = result["pooled"][SEED]
    assert abs(pooled - POOLED) <= ONE_ROW
    rows = [line.split() for line in lines]
    assert [SEED, "0.7520", "0.7520", f"{pooled:.4f}", "0.7913"] in rows
    assert [row[:3] for row in rows if row[:1] == ["mean"]] == [["mean", "0.7520", "0.7520"]]

    said = [json.loads(line) for line in (tmp_path / "logs" / "server.log").read_text().splitlines()]
    accepted = [s for s in said if s["event"] == "accepted"]
    counted = {(s["kind"], s["client"], s["num_examples"]) for s in accepted}
    assert counted == {("train", n, r[TRAIN]) for n, r in heart.ROWS.items()} | {
        ("evaluate", n, r[TEST]) for n, r in heart.ROWS.items()
    }
    assert sum(s["kind"] == "train" for s in accepted) == 15 * len(heart.ROWS)
