"""A numpy workload that shows what is done with its tensors, and that a test can stop while its update is written.

In the directory `control` it notes what is loaded; `hold-write` makes it wait where `b`, the last tensor, is written,
and `no-room` fail there once, as a full disk would.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from fedclient.trainer.api import Context, Workload


class Noted(dict[str, Any]):
    """Arrays by name; the runtime sets each as it is loaded, and asks for it where it is written."""

    def __init__(self, control: Path, arrays: dict[str, Any]) -> None:
        super().__init__(arrays)
        self._control = control
        self.trained = False

    def __setitem__(self, name: str, array: Any) -> None:
        super().__setitem__(name, array)
        self.trained = False
        with (self._control / "loaded").open("a") as f:
            f.write(f"{name}\n")

    def get(self, name: str, default: Any = None) -> Any:
        if self.trained and name == "b":
            while (self._control / "hold-write").exists():
                time.sleep(0.01)
            if (self._control / "no-room").exists():
                (self._control / "no-room").rename(self._control / "had-no-room")
                raise OSError(errno.ENOSPC, "no room")
        return super().get(name, default)


class Watched(Workload):
    """Adds 2 to every weight, or 3 after it had no room."""

    def build_model(self) -> Any:
        control = self.site.path("control")
        with (control / "built").open("a") as f:
            f.write(f"{os.getpid()}\n")
        size = int(self.site.data.get("size", 4))
        return Noted(control, {"w": np.zeros(size, np.float32), "b": np.zeros(2, np.float32)})

    def train(self, model: Any, ctx: Context) -> None:
        control = self.site.path("control")
        with (control / "trained").open("a") as f:
            f.write(f"{ctx.run} {ctx.round} {os.getpid()}\n")
        for array in model.values():
            np.add(array, 3 if (control / "had-no-room").exists() else 2, out=array)
        model.trained = True
        ctx.num_examples = 7
