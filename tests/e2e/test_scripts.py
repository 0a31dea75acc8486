"""The scripts of examples/scripts in a federation of real processes: what the library alone gives on the same data.

A federation's version is x + (y - x), each difference computed in float32 and the sum rounded once, so it is compared
bit for bit with that, from the y of the script as it was before a federation came into it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedclient.trainer import derive_seed
from fedlink.config import load_toml
from tests.support.federation import PATIENCE, Federation, Site, call
from tests.support.tiny_models import reviews, save_llama, write_jsonl

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "scripts"
SEED = 5
Weights = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Threads would wait for each other longer than they compute; nothing is to be fetched, or kept elsewhere.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def offered(workload: str, **changes: Any) -> dict[str, Any]:
    """What the examples' site.toml says of a workload."""
    table: dict[str, Any] = load_toml(EXAMPLES / "site.toml")["workload"][workload]
    return table | changes


def site(federation: Federation, name: str, workload: str, **changes: Any) -> Site:
    table = offered(workload, **changes)
    trainer = table.pop("trainer")
    extra = {"workload": workload, "source": EXAMPLES / trainer, "options": table}
    return federation.site(name, trainer, start=False, **extra)


def by_hand(site: Site, table: dict[str, Any], starts: dict[int, str]) -> dict[str, Weights]:
    """Run a site's script by hand, in its directory: as it is, before it was changed, and that from given weights.

    Args:
        site: where it lies.
        table: what site.toml says of it.
        starts: by the seed of the round's job, the file with the weights to begin with, and arguments of its own.
    """
    results = site.directory / "by-hand"
    results.mkdir()
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.by_hand", site.directory / table["trainer"]]
    command += [results, *(f"{seed}={start}" for seed, start in starts.items()), "--", *table["args"]]
    done = subprocess.run(
        list(map(str, command)),
        cwd=site.directory,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"},
        capture_output=True,
        text=True,
        timeout=PATIENCE * 2,
        check=False,
    )
    assert not done.returncode, done.stderr
    return {path.stem: load_file(path) for path in results.glob("*.safetensors")}


def first_version(x: Weights, y: Weights) -> Weights:
    """The version that a round with one site makes of its y."""
    made = {}
    for name, before in x.items():
        after = y[name]
        buffer = "running" in name or not np.issubdtype(before.dtype, np.floating)
        change = (after - before).astype(np.float64) if not buffer else None
        made[name] = after if change is None else (before.astype(np.float64) + change).astype(before.dtype)
    return made


def same(got: Weights, expected: Weights) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def initial(federation: Federation, site: Site, workload: str) -> Path:
    """The script's own model, imported; the file with its weights."""
    start = federation.root / "start"
    call("fedclient", "init-model", workload, "--config", str(site.config), "-o", str(start))
    federation.call("model", "import", str(start))
    return next(start.glob("*.safetensors")) if start.is_dir() else start


def one_round(federation: Federation, workload: str, only: Site) -> None:
    """A round with one site gives what the library alone does; by hand the script does what it did before."""
    start = initial(federation, only, workload)
    only.start()
    federation.create_run("r", workload=workload, model="start", seed=SEED, cohort={"min_clients": 1, "quorum": 1})
    federation.finish("r")
    seed = derive_seed(SEED, only.name, 1)
    hand = by_hand(only, offered(workload), {seed: str(start)})
    same(hand["as_is"], hand["before"])
    x, y = load_file(start), hand[str(seed)]
    assert any(not np.array_equal(x[name], y[name]) for name in x)
    same(federation.export("r"), first_version(x, y))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_plain_pytorch_two_sites_and_rounds(federation: Federation) -> None:
    wards = {"a": ["--ward", "1"], "b": ["--ward", "2"]}
    sites = {name: site(federation, name, "plain", args=args) for name, args in wards.items()}
    start = initial(federation, sites["a"], "plain")
    for each in sites.values():
        each.start()
    federation.create_run("r", workload="plain", model="start", rounds=2, seed=SEED, settings={"learning_rate": 0.05})
    federation.finish("r")
    versions = [load_file(start), federation.export("r@1"), federation.export("r@2")]
    (first,) = (federation.root / "exports" / "r@1").glob("*.safetensors")
    seeds = {name: [derive_seed(SEED, name, number) for number in (1, 2)] for name in sites}
    begun = {
        seed: f"{weights}={','.join(args)}"
        for name, args in wards.items()
        for seed, weights in zip(seeds[name], (start, first), strict=True)
    }
    trained = by_hand(sites["a"], offered("plain"), begun)
    same(trained["as_is"], trained["before"])
    for number in (1, 2):
        x, got = versions[number - 1], versions[number]
        a, b = (first_version(x, trained[str(seeds[name][number - 1])]) for name in sites)
        assert got.keys() == x.keys()
        assert not np.array_equal(got["4.weight"], x["4.weight"])
        for name in x:
            if np.issubdtype(x[name].dtype, np.floating):
                # Each site's y is rounded here before the mean is, and not there.
                mean = (a[name].astype(np.float64) + b[name]) / 2
                np.testing.assert_allclose(got[name], mean, rtol=2e-7, atol=2e-7, err_msg=name)
            else:
                assert got[name] == a[name]
    tasks = federation.json("round", "show", "r", "2")[0]["tasks"]
    assert {task["num_examples"] for task in tasks} == {200, 100}, "it was trained, and measured"
    assert all(0 < task["metrics"]["loss"] < 1 for task in tasks)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_trainer_of_transformers(federation: Federation) -> None:
    one_round(federation, "hf_trainer", site(federation, "a", "hf_trainer"))
    config = json.loads((federation.root / "start" / "config.json").read_text())
    assert config["model_type"]
    assert "_name_or_path" not in config, "a site's path is nobody else's business"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trl_sft_with_an_adapter(federation: Federation) -> None:
    need("trl", "datasets")
    only = site(federation, "a", "sft")
    save_llama(only.directory / "base")
    write_jsonl(only.directory / "texts.jsonl", [{"text": row["text"]} for row in reviews(24)])
    one_round(federation, "sft", only)
    assert all("lora_" in name for name in federation.export("r"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_lightning(federation: Federation) -> None:
    need("lightning")
    one_round(federation, "lightning", site(federation, "a", "lightning"))


def need(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; `make install` does it")
