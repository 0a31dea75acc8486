"""`make reproduce-heart` as a user runs it gives FLamby's accuracies, through a real server and four real daemons."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import heart

FEDAVG = {"42": 0.7520, "43": 0.7638, "44": 0.7638, "45": 0.7008, "46": 0.7598}
TRAIN, TEST = 0, 1


@pytest.mark.timeout(900)
@pytest.mark.xdist_group("heavy")
def test_the_published_accuracies(tmp_path: Path, heart_data: Path) -> None:
    (tmp_path / "data").symlink_to(heart_data)
    command = [sys.executable, heart.EXAMPLE / "reproduce.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.rstrip().splitlines()
    assert lines[-1].startswith("result ")
    result = json.loads(lines[-1].removeprefix("result "))
    assert result["fedavg"] == FEDAVG
    assert (result["fedavg_mean"], result["fedavg_std"]) == (0.7480, 0.0268)
    assert abs(result["pooled_mean"] - 0.7953) <= 0.003
    rows = [line.split() for line in lines]
    assert ["42", "0.7520", "0.7520", f"{result['pooled']['42']:.4f}", "0.7913"] in rows
    assert ["mean", "0.7480", "0.7480", f"{result['pooled_mean']:.4f}", "0.7953"] in rows
    assert ["std", "0.0268", "0.0268", f"{result['pooled_std']:.4f}", "0.0028"] in rows

    said = [json.loads(line) for line in (tmp_path / "logs" / "server.log").read_text().splitlines()]
    accepted = [s for s in said if s["event"] == "accepted"]
    counted = {(s["kind"], s["client"], s["num_examples"]) for s in accepted}
    assert counted == {("train", n, r[TRAIN]) for n, r in heart.ROWS.items()} | {
        ("evaluate", n, r[TEST]) for n, r in heart.ROWS.items()
    }
    assert sum(s["kind"] == "train" for s in accepted) == 5 * 15 * len(heart.ROWS)
