"""A numpy workload whose updates a test can foretell bit for bit, steered by files in its `control` directory."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np

from fedclient.trainer import Workload


def drift(number, round_, size):
    """What one training adds to the weights: multiples of 1/256, so that sums are exact."""
    return (np.random.default_rng([number, round_]).integers(-256, 257, size) / 256).astype(np.float32)


class Drift(Workload):
    """Adds `drift` to its weights; `number`, `examples`, `size` and `bias` are the site's, and `hold` makes it wait."""

    @dataclass(frozen=True)
    class Settings:
        steps: int = 2

    def build_model(self):
        data = self.site.data
        return {"w": np.zeros(data["size"], np.float32), "b": np.zeros(data.get("bias", 3), np.float32)}

    def train(self, model, ctx):
        control = self.site.path("control")
        with (control / "trained").open("a") as f:
            f.write(f"{ctx.round} {os.getpid()}\n")
        for _ in ctx.steps(ctx.settings.steps):
            while (control / "hold").exists():
                time.sleep(0.01)
                ctx.alive()
        for array in model.values():
            np.add(array, drift(self.site.data["number"], ctx.round, array.size), out=array)
        ctx.log(loss=1 / ctx.round)
        ctx.num_examples = self.site.data["examples"]

    def evaluate(self, model, ctx):
        ctx.num_examples = 10
        return {"accuracy": float(np.abs(model["w"]).mean())}


def expected(start, sites, rounds):
    """The weights after so many rounds; `sites` are pairs of number and examples. Independent of any of our code."""
    weights, total = dict(start), sum(n for _, n in sites)
    for round_ in range(1, rounds + 1):
        for name, x in weights.items():
            deltas = [(n, (x + drift(number, round_, x.size)) - x) for number, n in sites]
            weights[name] = (x + sum(n * d.astype(np.float64) for n, d in deltas) / total).astype(np.float32)
    return weights
