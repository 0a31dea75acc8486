"""A plain step along the reduced update."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedserver.aggregation.pipeline import Window


@dataclass(frozen=True, slots=True)
class Sgd:
    """x + rate * direction, without momentum; a rate of 1 adds the direction exactly."""

    learning_rate: float = 1.0

    def step(self, values: Window, direction: Window) -> None:
        """Step one window; see `ServerOptimizer.step`."""
        np.multiply(direction, self.learning_rate, out=direction)
        np.add(values, direction, out=values)
