"""The training of the benchmark: client k adds k + 1 to every element of every tensor, and does nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
from workload import shapes

from fedclient.trainer import Context, Workload


class Adds(Workload):
    """`[workload.bench.data]` says which `model` it is and the client's `number`, from 0."""

    def build_model(self) -> dict[str, np.ndarray]:
        # Zeros that nobody touches take no memory; loading replaces them.
        return {name: np.zeros(shape, np.float32) for name, shape in shapes(self.site.data["model"]).items()}

    def train(self, model: dict[str, Any], ctx: Context) -> None:
        step = np.float32(self.site.data["number"] + 1)
        for _ in ctx.steps(1):
            for array in model.values():
                # In place, so that the process holds one copy; the same bits as `workload.trained`.
                np.add(array, step, out=array)
        ctx.num_examples = 100
