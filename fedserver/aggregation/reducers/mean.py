"""The mean, weighted by examples."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fedserver.aggregation.pipeline import Window


class WeightedMean:
    """Σ n_k v_k / Σ n_k in float64: integer weights, one division at the end."""

    def reduce(self, updates: Iterable[tuple[int, Window]], out: Window) -> None:
        """Reduce one window; see `Reducer.reduce`."""
        total = 0
        out.fill(0.0)
        for examples, values in updates:
            np.multiply(values, float(examples), out=values)
            np.add(out, values, out=out)
            total += examples
        np.divide(out, float(total), out=out)
