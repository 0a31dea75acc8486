"""A workload of many megabytes whose updates a test can foretell bit for bit, in numpy and in torch.

Every number is a multiple of 1/256 and small, so that float32 adds exactly, in whatever order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedclient.trainer import Workload

ROW = 4096
STEPS = 4


def tide(number, round_, step, tensor, rows):
    """What one step adds to a tensor: a row and a column, to be spread over it."""
    rng = np.random.default_rng([number, round_, step, tensor])
    row, column = (rng.integers(-64, 65, n) / 256 for n in (ROW, rows))
    return row.astype(np.float32)[None, :], column.astype(np.float32)[:, None]


class Tide(Workload):
    """`tensors` arrays of `rows` rows; `number` and `examples` are the site's."""

    @dataclass(frozen=True)
    class Settings:
        steps: int = STEPS
        strength: float | Literal["auto"] = 1.0

    def build_model(self):
        data = self.site.data
        model = {f"t{i:02}": np.zeros((data["rows"], ROW), np.float32) for i in range(data["tensors"])}
        return model | {"steps": np.zeros(1, np.int64)}

    def calibrate(self, model, ctx):
        return {"strength": 1.0}

    def train(self, model, ctx):
        assert ctx.settings.strength == 1.0
        arrays = [model[name] for name in sorted(model) if name != "steps"]
        for step in ctx.steps(ctx.settings.steps):
            for i, array in enumerate(arrays):
                for part in tide(self.site.data["number"], ctx.round, step, i, len(array)):
                    np.add(array, part, out=array)
            model["steps"] += self.site.data["number"]
        ctx.num_examples = self.site.data["examples"]

    def evaluate(self, model, ctx):
        ctx.num_examples = self.site.data["examples"]
        return {"accuracy": float(model["t00"][0].mean())}
