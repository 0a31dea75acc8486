"""When the evaluation of a version is over, and what it comes to. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fedserver.rounds.model import TaskState


def over(open_tasks: Iterable[TaskState], now: float, deadline: float) -> bool:
    """Whether nobody is waited for any more."""
    return now >= deadline or not any(state.waited_for for state in open_tasks)


def weighted_means(results: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """The mean of each metric over the sites that report it, weighted by their test examples.

    Args:
        results: number of test examples and metrics of each site.
    """
    names = sorted({name for _, metrics in results for name in metrics})
    means = {}
    for name in names:
        having = [(n, metrics[name]) for n, metrics in results if name in metrics and n > 0]
        total = sum(n for n, _ in having)
        if total:
            means[name] = math.fsum(n * value for n, value in having) / total
    return means


def is_better(value: float, best: float | None, goal: str) -> bool:
    """Whether a value beats the best so far; the first one does."""
    return best is None or (value > best if goal == "max" else value < best)
