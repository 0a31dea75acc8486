"""When the evaluation of a version is over, and what it comes to. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fedserver.rounds.model import TaskState

PERPLEXITY = "perplexity"
"""The metric whose mean is taken of its logarithms."""


def over(open_tasks: Iterable[TaskState], now: float, deadline: float) -> bool:
    """Whether nobody is waited for any more."""
    return now >= deadline or not any(state.waited_for for state in open_tasks)


def weighted_means(results: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """The mean of each metric over the sites that report it, weighted by their test examples.

    That of perplexities is the exponential of the mean loss, which is the perplexity over all sites' tokens.

    Args:
        results: number of test examples and metrics of each site.
    """
    names = sorted({name for _, metrics in results for name in metrics})
    means = {}
    for name in names:
        having = [(n, metrics[name]) for n, metrics in results if name in metrics and n > 0]
        total = sum(n for n, _ in having)
        if total:
            means[name] = _mean(name, having, total)
    return means


def _mean(name: str, having: Sequence[tuple[int, float]], total: int) -> float:
    if name == PERPLEXITY and all(value > 0 for _, value in having):
        return math.exp(math.fsum(n * math.log(value) for n, value in having) / total)
    return math.fsum(n * value for n, value in having) / total


def is_better(value: float, best: float | None, goal: str) -> bool:
    """Whether a value beats the best so far; the first one does."""
    return best is None or (value > best if goal == "max" else value < best)
