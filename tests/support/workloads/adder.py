"""A numpy workload that a test steers through files: `hold`, `crash`, `raise` in the directory `control`.

They are looked at from step `stop_at` on.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from fedclient.trainer.api import Bounds, Context, Workload


class Adder(Workload):
    """Adds `amount` to every weight in every step; its accuracy is the mean weight."""

    @dataclass(frozen=True)
    class Settings:
        amount: Annotated[float, Bounds(0, 10)] = 1.0
        steps: int = 2
        stop_at: int = 0

    def build_model(self) -> Any:
        size = int(self.site.data.get("size", 4))
        return {"w": np.zeros(size, np.float32), "b": np.zeros(2, np.float32)}

    def train(self, model: Any, ctx: Context) -> None:
        control = self.site.path("control")
        with (control / "trained").open("a") as f:
            f.write(f"{ctx.run} {ctx.round} {os.getpid()} {ctx.rounds}\n")
        for i in ctx.steps(ctx.settings.steps):
            with (control / "steps").open("a") as f:
                f.write(f"{i}\n")
            for array in model.values():
                np.add(array, ctx.settings.amount, out=array)
            ctx.log(loss=0.5, secret=1.0)
            if i < ctx.settings.stop_at:
                continue
            while (control / "hold").exists():
                time.sleep(0.01)
                ctx.alive()
            if (control / "crash").exists():
                os._exit(3)
            if (control / "raise").exists():
                raise LookupError("patient 17 has no blood pressure")
        ctx.num_examples = 7

    def evaluate(self, model: Any, ctx: Context) -> dict[str, float]:
        ctx.num_examples = 5
        return {"accuracy": float(model["w"].mean()), "secret": 2.0}
