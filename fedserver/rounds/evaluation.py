"""When the evaluation of a version is over, and what it comes to. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fedlink.run_file import RunSpec
from fedserver.rounds.model import TaskState

PERPLEXITY = "perplexity"
"""The metric whose mean is taken of its logarithms."""


def over(open_tasks: Iterable[TaskState], now: float, deadline: float) -> bool:
    """Whether nobody is waited for any more."""
    return now >= deadline or not any(state.waited_for for state in open_tasks)


def weighted_means(results: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """The mean of each metric over the sites that report it, weighted by their test examples.

    That of perplexities is the exponential of the mean loss, which is the perplexity over all sites' tokens. A mean
    that is no finite number is left out.

    Args:
        results: number of test examples and metrics of each site.
    """
    names = sorted({name for _, metrics in results for name in metrics})
    means = {}
    for name in names:
        having = [(n, metrics[name]) for n, metrics in results if name in metrics and n > 0]
        total = sum(n for n, _ in having)
        mean = _mean(name, having, total) if total else math.nan
        if math.isfinite(mean):
            means[name] = mean
    return means


def _mean(name: str, having: Sequence[tuple[int, float]], total: int) -> float:
    """A weighted mean; NaN if a sum is too large for a float, for no value that a site sends may end a run."""
    try:
        if name == PERPLEXITY and all(value > 0 for _, value in having):
            return math.exp(math.fsum(n * math.log(value) for n, value in having) / total)
        return math.fsum(n * value for n, value in having) / total
    except (OverflowError, ValueError):
        return math.nan


def is_better(value: float, best: float | None, goal: str) -> bool:
    """Whether a value beats the best so far; the first one does."""
    return best is None or (value > best if goal == "max" else value < best)


def reached(spec: RunSpec, means: Mapping[str, float]) -> bool:
    """Whether a version with these means over the sites is as good as `[stop]` asks for."""
    value = means.get(spec.evaluation.metric)
    if value is None or spec.stop is None:
        return False
    return value >= spec.stop.target if spec.evaluation.goal == "max" else value <= spec.stop.target
