"""The demo of text classification as a user runs it, in few steps: its comparison, its model, its last line."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.demos

ROOT = Path(__file__).parents[2]
NAMES = ["site-1", "site-2", "site-3"]
WEIGHTS = 90.8e6
"""Bytes of MiniLM's parameters."""


def demo(root: Path, *options: str) -> dict[str, Any]:
    """Run it at its smallest; returns what its last line says."""
    command = [sys.executable, "-m", "examples.classify.demo", "--seconds", "1", *options, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if "pip could not download" in done.stderr:
        pytest.skip(f"the packages cannot be fetched here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.rstrip().splitlines()[-1]
    assert last.startswith("result ")
    result: dict[str, Any] = json.loads(last.removeprefix("result "))
    return result


@pytest.mark.timeout(1800)
@pytest.mark.xdist_group("heavy")
def test_a_classifier_trained_by_site_toml_alone_beats_each_site_alone(tmp_path: Path) -> None:
    result = demo(tmp_path)
    assert list(result["accuracy_by_site_alone"]) == NAMES
    mean = sum(result["accuracy_by_site_alone"].values()) / len(NAMES)
    assert result["accuracy_local"] == pytest.approx(mean, abs=1e-3)
    assert result["accuracy_federated"] > result["accuracy_local"]
    assert result["macro_f1_federated"] > result["macro_f1_local"]
    # Sites' tests, put together, are the texts that the exported model is tested on; rounding may move one of them.
    assert result["accuracy_by_version"][-1] == pytest.approx(result["accuracy_federated"], abs=0.003)
    assert len(result["accuracy_by_version"]) == result["rounds"] + 1

    # Every parameter goes to each site and comes back, in each round; manifests and headers are little.
    assert 2 * len(NAMES) * WEIGHTS < result["bytes_per_round"] < 2.1 * len(NAMES) * WEIGHTS
    model = Path(result["model_path"])
    assert sum(path.stat().st_size for path in model.glob("*.safetensors")) == pytest.approx(WEIGHTS, rel=0.01)
    assert len(json.loads((model / "config.json").read_text())["id2label"]) == 8
    assert Path(result["plot_path"]).read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.glob("sites/*/*.py")) == [], "no site has code"


@pytest.mark.timeout(5400)
@pytest.mark.xdist_group("heavy")
@pytest.mark.parametrize("options", [("--processes", "2"), ("--learning-rate", "auto")], ids=["processes", "auto"])
def test_it_learns_with_several_processes_and_with_a_measured_rate(tmp_path: Path, options: tuple[str, str]) -> None:
    fetched = ROOT / ".demo" / "classify" / "data"
    if fetched.is_dir():
        (tmp_path / "data").symlink_to(fetched)
    result = demo(tmp_path, *options)
    assert result["accuracy_by_version"][-1] > result["accuracy_by_version"][0]
    assert result["accuracy_by_version"][-1] == pytest.approx(result["accuracy_federated"], abs=0.003)
    asked, alone = (tomllib.loads((tmp_path / f"{name}.toml").read_text())["settings"] for name in ("topics", "alone"))
    if "auto" in options:
        assert asked["learning_rate"] == "auto"
        assert result["measured"] == {"learning_rate": alone["learning_rate"]}
    else:
        assert result["accuracy_federated"] > result["accuracy_local"]
        assert len(list(tmp_path.glob("sites/site-*/fedclient-state/trainers/ranks-*.0"))) == len(NAMES), (
            "each site started several"
        )
