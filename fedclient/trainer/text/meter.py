"""How a training goes: its loss so far, its speed, its memory, and how long it waits for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fedclient.trainer.api import Context
from fedclient.trainer.memory import peak_device_memory
from fedlink.memory import peak_memory


class Meter:
    """Logs the metrics of a training.

    Attributes:
        totals: what checkpoints hold of it; speeds are those of this process alone.
    """

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        dtype = torch.float32 if ctx.device == "mps" else torch.float64
        self.totals: dict[str, Any] = {"loss": torch.zeros((), dtype=dtype, device=ctx.device), "weight": 0}
        self._steps = self._tokens = 0
        self._seconds = self._waited = self._began = 0.0

    @property
    def loss(self) -> torch.Tensor:
        """The mean loss so far."""
        mean: torch.Tensor = self.totals["loss"] / max(1, self.totals["weight"])
        return mean

    def begin_step(self) -> None:
        """A step begins."""
        self._began = time.monotonic()

    def add(self, loss: torch.Tensor, weight: int) -> None:
        """Count the summed loss of this rank's part of a batch, and what the whole batch weighs.

        It is not read here, so that an accelerator need not be waited for.
        """
        self.totals["loss"] += self._ctx.team.summed(loss.detach().to(self.totals["loss"].dtype))
        self.totals["weight"] += weight

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the making of a batch."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def end_step(self, rate: float, tokens: int) -> None:
        """A step is over: log how it goes."""
        self._steps += 1
        self._tokens += tokens
        self._seconds += time.monotonic() - self._began
        spent = max(self._seconds, 1e-9)
        self._ctx.log(
            loss=self.loss,
            learning_rate=rate,
            tokens_per_second=self._tokens / spent,
            steps_per_second=self._steps / spent,
            data_wait=self._waited / spent,
            peak_memory=peak_memory(),
            **({"peak_device_memory": used} if (used := peak_device_memory()) else {}),
        )
