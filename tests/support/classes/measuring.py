"""A workload without torch that measures two of its settings, as a test's file next to site.toml says.

`measure.json` beside site.toml: {"learning_rate": ..., "batch_size": ..., "die": times to kill the process first,
"after": a file to wait for}. With "steps" the rate is 1 by the steps that a training has. With "fits" it searches for
the batch, and a larger one kills the process. With "room" a training with a larger one runs out of memory.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from fedclient.trainer import Bounds, Context, Workload, find_batch_size, measured


class Measuring(Workload):
    """Adds the learning rate to its only weight, each step; says which batch it saw."""

    @dataclass(frozen=True)
    class Settings:
        """What a run may set."""

        learning_rate: Annotated[float, Bounds(0, 1)] | Literal["auto"] = 0.5
        batch_size: Annotated[int, Bounds(1)] | Literal["auto"] = 1

    def build_model(self) -> dict[str, Any]:
        return {"w": np.zeros(3, np.float32)}

    def train(self, model: dict[str, Any], ctx: Context) -> None:
        table = json.loads((self.site.directory / "measure.json").read_text())
        for _ in ctx.steps(1):
            if measured(ctx.settings.batch_size) > table.get("room", math.inf):
                raise MemoryError
            model["w"] += np.float32(measured(ctx.settings.learning_rate))
        ctx.log(loss=measured(ctx.settings.batch_size))
        ctx.num_examples = 1

    def calibrate(self, model: dict[str, Any], ctx: Context) -> Mapping[str, float]:
        table = json.loads((self.site.directory / "measure.json").read_text())
        calls = self.site.directory / "calls"
        done = int(calls.read_text()) if calls.exists() else 0
        calls.write_text(str(done + 1))
        if done < table.get("die", 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if "fail" in table:
            raise ValueError(table["fail"])
        while "after" in table and not (self.site.directory / table["after"]).exists():
            ctx.alive()
            time.sleep(0.05)
        model["w"] += 1
        if "steps" in table:
            table["learning_rate"] = 1 / ctx.expected_steps(table["steps"])
            for _ in ctx.steps(table["steps"]):
                pass
            assert ctx.step == table["steps"], "limits are of trainings"
        if "fits" in table:
            table["batch_size"] = find_batch_size(ctx, lambda size: self.attempt(size, table["fits"]), most=64)
        return {name: table[name] for name in ("learning_rate", "batch_size") if getattr(ctx.settings, name) == "auto"}

    def attempt(self, size: int, fits: int) -> None:
        with (self.site.directory / "tried").open("a") as file:
            print(size, file=file)
        if size > fits:
            os.kill(os.getpid(), signal.SIGKILL)
