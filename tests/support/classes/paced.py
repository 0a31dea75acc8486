"""A workload whose steps take a time that the site chooses, in numpy and in torch; it counts its steps in the model."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from fedclient.trainer import Workload


class Paced(Workload):
    """`[data] pace`: seconds a step; `examples`: the site's, in batches of 4; `loop`: "steps" or "batches"."""

    @dataclass(frozen=True)
    class Settings:
        steps: int = 1000
        epochs: int = 0

    def build_model(self):
        return {"w": np.zeros(1, np.float32)}

    def train(self, model, ctx):
        data, settings = self.site.data, ctx.settings
        if settings.epochs:
            batches = [np.zeros((4, 2), np.float32)] * (data["examples"] // 4)
            loop = ctx.batches(batches, epochs=settings.epochs)
        else:
            loop = ctx.steps(settings.steps)
        for _ in loop:
            model["w"] += 1
            time.sleep(data["pace"])
        ctx.num_examples = data["examples"]
