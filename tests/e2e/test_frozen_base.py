"""LoRA over real processes: each site has the base of its own, and only the adapter travels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.support.federation import Federation, Site, call

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

ROUNDS = 2


def save_base(directory: Path, change: float = 0.0) -> int:
    """A tiny language model as transformers saves one, other in one number; its bytes."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 32, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[7, 7] += change
    model.save_pretrained(directory)
    return (directory / "model.safetensors").stat().st_size


@pytest.fixture
def sites(federation: Federation) -> Iterator[dict[str, Site]]:
    """Two sites with copies of one base, and a third, not started, with another."""
    found = {}
    for name, change in {"a": 0.0, "b": 0.0, "c": 1e-3}.items():
        found[name] = federation.site(name, "tinylora:TinyLora", data={"base": "base"}, start=False)
        save_base(found[name].directory / "base", change)
    return found


@pytest.mark.timeout(900)
def test_only_the_adapter_travels_and_another_base_is_refused(federation: Federation, sites: dict[str, Site]) -> None:
    size = save_base(federation.root / "base")
    start = federation.root / "start"
    call("fedclient", "init-model", "work", "--config", str(sites["a"].config), "--seed", "5", "-o", str(start))
    assert {p.name for p in start.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    again = federation.root / "again"
    call("fedclient", "init-model", "work", "--config", str(sites["b"].config), "--seed", "5", "-o", str(again))
    name = "adapter_model.safetensors"
    assert (start / name).read_bytes() == (again / name).read_bytes()

    federation.call("model", "import", str(start))
    for site in ("a", "b"):
        sites[site].start()
    # Another seed than the starting model's: it moves what the base does not hold, and nothing else.
    federation.create_run("r", workload="work", model="start", rounds=ROUNDS, seed=9)
    federation.finish("r")
    rounds = federation.json("round", "list", "r")
    assert [r["number"] for r in rounds] == [1, 2]
    adapter = (start / name).stat().st_size
    for r in rounds:
        assert 0 < r["bytes_up"] < 2 * adapter
        assert r["bytes_down"] < 3 * adapter < size / 5
    tasks = federation.json("round", "show", "r", "1")[0]["tasks"]
    assert {t["metrics"]["loss"] > 0 for t in tasks} == {True}

    out = federation.root / "out"
    federation.call("model", "export", "r", str(out))
    got, began = load_file(out / name), load_file(start / name)
    assert got.keys() == began.keys()
    assert all(not torch.equal(got[n], began[n]) for n in got if "lora_B" in n or "lm_head" in n)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(federation.root / "base"), out)
    federation.call(
        "model", "export", "r", str(federation.root / "merged"), "--merge", "--base", str(federation.root / "base")
    )
    merged = AutoModelForCausalLM.from_pretrained(federation.root / "merged")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, tuned(tokens).logits, rtol=1e-4, atol=1e-4)
    federation.call("model", "export", "r", str(federation.root / "no"), "--merge", code=2)
    done = federation.call(
        "model",
        "export",
        "r",
        str(federation.root / "no"),
        "--merge",
        "--base",
        str(sites["c"].directory / "base"),
        code=2,
    )
    assert "'model.layers.1.mlp.down_proj.weight' has other values" in done.stderr

    sites["c"].start()
    federation.create_run("s", workload="work", model="start", cohort={"min_clients": 3, "quorum": 2})
    federation.finish("s")
    refused = [t for t in federation.json("round", "show", "s", "1")[0]["tasks"] if t["client"] == "c"]
    assert {(t["state"], t["reason"]) for t in refused} == {("failed", "BASE_MISMATCH")}
    assert all(
        "base differs from the run's: tensor 'model.layers.1.mlp.down_proj.weight'" in t["message"] for t in refused
    )
    assert sites["c"].trained == []
    assert len(sites["a"].trained) == ROUNDS + 1


def test_training_without_a_server(federation: Federation, sites: dict[str, Site]) -> None:
    """From the class's own adapter to one that is trained, all as directories."""
    run = federation.root / "run.toml"
    run.write_text('workload = "work"\nrounds = 2\n')
    out, config = federation.root / "out", str(sites["a"].config)
    done = call("fedclient", "train-local", "--config", config, "--settings", str(run), "-o", str(out))
    assert {p.name for p in out.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    assert "train rounds 2 " in done.stdout
    c = str(sites["c"].config)
    failed = call("fedclient", "train-local", "--config", c, "--settings", str(run), "--model", str(out), code=1)
    assert "this site's base differs from the run's: tensor 'model.layers.1" in failed.stderr
