"""The mean, weighted by examples."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fedserver.aggregation.pipeline import Window


class WeightedMean:
    """Σ n_k v_k / Σ n_k in float64: integer weights, one division at the end. A `SummingReducer`."""

    def reduce(self, updates: Iterable[tuple[int, Window]], out: Window) -> None:
        """Reduce one window; see `Reducer.reduce`."""
        out.fill(0.0)
        self.finish(out, self.add(updates, out))

    def add(self, updates: Iterable[tuple[int, Window]], sums: Window) -> int:
        """Add n_k v_k; see `SummingReducer.add`."""
        total = 0
        for examples, values in updates:
            np.multiply(values, float(examples), out=values)
            np.add(sums, values, out=sums)
            total += examples
        return total

    def finish(self, sums: Window, examples: int) -> None:
        """Divide; see `SummingReducer.finish`."""
        np.divide(sums, float(examples), out=sums)
