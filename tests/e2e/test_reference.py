"""The stack against a loop in one process with the same draws: the demonstration's configuration, every version."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedserver.remote import Admin
from tests.support import heart
from tests.support.federation import Federation

pytestmark = pytest.mark.slow

ROUNDS, SEED, STEPS, BATCH, RATE = 15, 42, 100, 4, 1e-2
SERVER_RATE = 0.5
Weights = dict[str, torch.Tensor]


def rows(directory: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A hospital's training rows, normalised by the statistics of all."""
    table = np.loadtxt(directory / f"{name}-train.csv", delimiter=",", skiprows=1)
    statistics = json.loads((directory / "statistics.json").read_text())
    features = (table[:, :-1] - np.array(statistics["mean"])) / np.array(statistics["std"])
    return torch.from_numpy(features.astype(np.float32)), torch.from_numpy(table[:, -1].astype(np.float32))


def drawn(name: str, round_: int) -> torch.Generator:
    """The generator of one training, from the documented rule."""
    digest = hashlib.sha256(f"{SEED}/{name}/{round_}/train".encode()).digest()
    seed = int.from_bytes(digest[:8], "big") >> 1
    return torch.Generator().manual_seed(int(np.random.default_rng([seed, 0]).integers(1 << 63)))


def loss_of(weights: Weights, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    scores = torch.nn.functional.linear(x, weights["weight"], weights["bias"]).squeeze(1)
    return torch.nn.functional.binary_cross_entropy_with_logits(scores, y)


def trained(start: Weights, x: torch.Tensor, y: torch.Tensor, generator: torch.Generator) -> Weights:
    """100 steps of SGD on batches without replacement, begun anew when the rows are used up."""
    weights = {k: v.clone().requires_grad_() for k, v in start.items()}
    order: list[int] = []
    for _ in range(STEPS):
        if not order:
            order = torch.randperm(len(y), generator=generator).tolist()
        batch, order = order[:BATCH], order[BATCH:]
        gradients = torch.autograd.grad(loss_of(weights, x[batch], y[batch]), list(weights.values()))
        weights = {
            k: (w - RATE * g).detach().requires_grad_() for (k, w), g in zip(weights.items(), gradients, strict=True)
        }
    return {k: w.detach() for k, w in weights.items()}


def gradient(start: Weights, x: torch.Tensor, y: torch.Tensor) -> Weights:
    """Of the mean loss over all rows, in float64."""
    weights = {k: v.double().requires_grad_() for k, v in start.items()}
    loss = loss_of(weights, x.double(), y.double())
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def reference(directory: Path, initial: Weights, strategy: str) -> list[Weights]:
    """Every version, the starting model first; averages are taken in float64."""
    sites = {name: rows(directory, name) for name in heart.ROWS}
    total = sum(len(y) for _, y in sites.values())
    versions = [initial]
    for round_ in range(1, ROUNDS + 1):
        x = versions[-1]
        step = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in x.items()}
        for name, (features, labels) in sites.items():
            if strategy == "fedavg":
                y = trained(x, features, labels, drawn(name, round_))
                update = {k: y[k].double() - x[k].double() for k in x}
            else:
                update = {k: -SERVER_RATE * g for k, g in gradient(x, features, labels).items()}
            for k in x:
                step[k] += len(labels) * update[k]
        versions.append({k: (x[k].double() + step[k] / total).float() for k in x})
    return versions


async def exported(federation: Federation, run: str) -> list[dict[str, np.ndarray]]:
    """Every version of a run."""
    found = []
    async with Admin(federation.data_dir) as admin:
        for version in range(ROUNDS + 1):
            target = federation.root / "exports" / run / str(version)
            await admin.export_model(f"{run}@{version}", target, progress=lambda *_: None)
            found.append(load_file(target / "model.safetensors"))
    return found


@pytest.mark.timeout(400)
def test_every_version_is_that_of_a_loop_in_one_process(federation: Federation, heart_data: Path) -> None:
    sites = heart.hospitals(federation, heart_data, normalise="shared")
    model = heart.import_initial(federation, sites[0], SEED)
    initial = {k: torch.from_numpy(v) for k, v in load_file(federation.root / f"{model}.safetensors").items()}
    common = {"model": model, "retention": {"keep_versions": 100}}
    heart.create_run(federation, name="fedavg", **common)
    federation.finish("fedavg")
    optimizer = {"learning_rate": SERVER_RATE}
    heart.create_run(federation, name="fedsgd", strategy="fedsgd", server_optimizer=optimizer, **common)
    federation.finish("fedsgd")

    for strategy in ("fedavg", "fedsgd"):
        expected = reference(heart_data, initial, strategy)
        got = asyncio.run(exported(federation, strategy))
        moved = max(float((expected[-1][k] - initial[k]).abs().max()) for k in initial)
        assert moved > 0.05, "the loop itself has learnt nothing"
        for version, (mine, theirs) in enumerate(zip(expected, got, strict=True)):
            assert set(mine) == set(theirs) == {"weight", "bias"}
            for name, tensor in mine.items():
                error = np.abs(tensor.numpy().astype(np.float64) - theirs[name]).max()
                assert error <= 1e-6, f"{strategy} version {version}: {name} is off by {error:.3g}"
    assert all(site.daemon and site.daemon.running for site in sites)
