"""The demo as a user runs it: its comparison, its files, its last line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HOSPITALS = {"cleveland", "hungary", "switzerland", "long-beach"}


@pytest.mark.timeout(300)
@pytest.mark.xdist_group("heavy")
def test_demo_ends_with_a_federation_that_beats_each_hospital_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.heart.demo", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.rstrip().splitlines()
    assert lines[-1].startswith("result ")
    result = json.loads(lines[-1].removeprefix("result "))
    assert result["run"] == "heart"
    assert result["rounds"] == 15
    assert result["accuracy_federated"] >= 0.79
    assert set(result["accuracy_local"]) == HOSPITALS
    assert result["accuracy_federated"] > max(result["accuracy_local"].values())
    assert result["accuracy_pooled"] >= 0.79
    # Hospitals' test rows, put together, are the pooled test set.
    rows = {"cleveland": 104, "hungary": 89, "switzerland": 16, "long-beach": 45}
    together = sum(rows[h] * a for h, a in result["accuracy_per_hospital"].items()) / 254
    assert together == pytest.approx(result["accuracy_federated"], abs=2e-4)
    model = load_file(result["model_path"])
    assert {name: value.shape for name, value in model.items()} == {"weight": (1, 13), "bias": (1,)}
    assert Path(result["plot_path"]).read_bytes().startswith(b"\x89PNG")
    shown = [line for line in lines if line.strip().split(" ")[0].rstrip("*").isdigit()]
    assert len(shown) == 16
