"""A numpy workload that counts its steps in a file, and that draws and remembers all it can.

Steered by files in its `control` directory: `hold` makes it wait in the step that `hold_at` names, `other` gives it
other loops, `broken` an error before its loop.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass

import numpy as np

from fedclient.trainer import Workload


class Steady(Workload):
    @dataclass(frozen=True)
    class Settings:
        epochs: int = 2
        hold_at: int = 5

    def build_model(self):
        return {"w": np.zeros((3, 4), np.float32), "bias": np.zeros(3, np.float32)}

    def train(self, model, ctx):
        control = self.site.path("control")
        if (control / "broken").exists():
            (control / "broken").unlink()
            raise LookupError("secret patient 4711")
        memory = {"losses": [], "velocity": np.zeros((3, 4), np.float32)}
        ctx.keep(memory=memory)
        rng, velocity = ctx.rng(), memory["velocity"]
        # The code holds an array that is not the one that was loaded.
        model["w"] = model["w"].copy()
        w = model["w"]
        for _ in ctx.steps(3 if (control / "other").exists() else 2):
            self.count(ctx)
            w += np.float32(np.random.normal())  # noqa: NPY002
        for batch in ctx.batches(Rows(rng), epochs=ctx.settings.epochs):
            self.count(ctx)
            while ctx.step == ctx.settings.hold_at and (control / "hold").exists():
                time.sleep(0.01)
                ctx.alive()
            velocity *= np.float32(0.9)
            velocity += (batch + random.random() + rng.random()).astype(np.float32)
            w -= velocity
            model["bias"] = model["bias"] + w[:, 0]
            memory["losses"].append(float(w.sum()))
            ctx.log(loss=memory["losses"][-1] + len(memory["losses"]))
        del batch  # there must have been one
        ctx.num_examples = 8

    def count(self, ctx):
        with (self.site.path("control") / "steps").open("a") as f:
            f.write(f"{ctx.round} {ctx.step} {os.getpid()}\n")

    def gradient(self, model, ctx):
        for _ in ctx.steps(3):
            ctx.num_examples = 8
        return {}

    def evaluate(self, model, ctx):
        for _ in ctx.steps(3):
            ctx.num_examples = 8
        return {"accuracy": float(model["w"].mean())}


class Rows:
    """Four batches, in an order drawn anew each epoch."""

    def __init__(self, rng):
        self.rng = rng

    def __iter__(self):
        for i in self.rng.permutation(4):
            yield np.full((3, 4), i + np.random.random(), np.float32)  # noqa: NPY002
