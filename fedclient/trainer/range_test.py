"""A learning rate by measuring: a range test on the site's data, then short trainings at a few rates.

The rule. From the run's starting weights the rate grows geometrically, one step a rate, over `SWEEP_STEPS` steps from
`LOWEST` to `HIGHEST`, or between the limits of the setting. The loss of each step's batch is smoothed; the sweep ends
early where the smoothed loss is not finite or `DIVERGED` times the least so far. (Of a loss below zero, so many times
more is meant to be as far above it as of the positive one of that size.) The highest rate at which it was still
within `NEAR` of the least is the edge: above it training does not gain any more. This is the range test of L. N. Smith,
"Cyclical Learning Rates for Training Neural Networks" (2015, arXiv:1506.01186), and of "Super-Convergence" (with
N. Topin, 2017, arXiv:1708.07120).

What is best lies about the edge or below, how far depends on how long one trains. So the edge is only where the trials
begin: each trains from the starting weights, on the same batches, at one of the rates edge / sqrt(10)^k, k = 0, 1, 2,
and is measured on examples that it has not seen. They go on upward and downward as long as that is better; then the two
neighbours of the best are tried, a factor 10^(1/4) apart. Of the rates whose held-out loss is within `EQUAL` of the
least the lowest is the answer: it is the safer one where a run trains for longer than a trial.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from fedclient.trainer.api import Bounds, Context
from fedclient.trainer.found import CannotMeasureError
from fedclient.trainer.undone import starting_over

SWEEP_STEPS = 60
"""Steps of the range test."""
LOWEST, HIGHEST = 1e-6, 10.0
"""Where the range test begins and ends, unless the setting has limits."""
TRIAL_STEPS = 100
"""Steps of a trial at most; a run with fewer at the site is tried as it is."""
DIVERGED = 4.0
"""The range test ends where the smoothed loss is so many times the least."""
NEAR = 1.05
"""The edge is the highest rate whose smoothed loss is at most so many times the least."""
EQUAL = 1.01
"""Of rates whose held-out losses are at most so many times the least, the lowest is taken: it is the safer one."""

_SMOOTHING = 0.95
_SETTLED = 10
_FURTHER = 6

Descend = Callable[[Sequence[float], int], Iterator[Any]]
"""Takes a step with each rate in turn, with an optimizer of its own, and yields after each step the loss that it saw
before it moved the weights. The second argument is the number of the fold, from 0: the same one
means the same batches."""
HeldOut = Callable[[int], float]
"""The loss of the present weights on the examples of a fold, which `Descend` does not train on in that fold."""


def find_learning_rate(
    model: Any,
    ctx: Context,
    *,
    descend: Descend,
    held_out: HeldOut,
    schedule: Sequence[float] = (),
    folds: int = 1,
) -> float:
    """The rate at which a short training leaves the least held-out loss; this module says how it is looked for.

    The weights are the starting ones again afterwards, bit for bit. The same model, data, seed and site give the same
    rate on the same machine.

    Args:
        model: what is trained, with the run's starting weights.
        ctx: of `Workload.calibrate`.
        descend: one step for each rate. It draws what is random from `ctx.generator` or `ctx.rng`.
        held_out: what a trial is judged by.
        schedule: share of the rate for each step of a trial, for a run that changes it; as long as a trial shall be.
            By default `TRIAL_STEPS` times 1.
        folds: how often each rate is tried, each time on other examples and judged by others; the mean counts. More
            than one is for few examples, where chance would choose.

    Raises:
        CannotMeasureError: no trial ended with a finite loss.
    """
    bounds = ctx.limits.get("learning_rate", Bounds())
    low, high = max(bounds.minimum or 0.0, LOWEST), HIGHEST if bounds.maximum is None else bounds.maximum
    low = min(low, high)
    begin = starting_over(model, ctx)
    shares = list(schedule)[:TRIAL_STEPS] or [1.0] * TRIAL_STEPS

    def rate_at(quarters: int) -> float:
        return edge * 10 ** (quarters / 4)

    def trial(rate: float, fold: int) -> float:
        with begin():
            return _trained(ctx, descend([rate * share for share in shares], fold), len(shares), lambda: held_out(fold))

    losses: dict[int, float] = {}

    def best_of(*candidates: int) -> int:
        for quarters in candidates:
            rate = rate_at(quarters)
            if quarters not in losses and low <= rate <= high:
                losses[quarters] = sum(trial(rate, fold) for fold in range(folds)) / folds
        least = min(losses.values())
        return min(quarters for quarters, loss in losses.items() if loss <= _above(least, EQUAL))

    with ctx.team.training(model, ctx):
        with begin():
            edge = _edge(ctx, descend, low, high)
        best = best_of(0, -2, -4)
        for _ in range(_FURTHER):
            found = best_of(best - 2, best + 2)
            if found == best:
                break
            best = found
        best = best_of(best - 1, best + 1)
        if not math.isfinite(losses[best]):
            tried = f"{rate_at(min(losses)):.3g} to {rate_at(max(losses)):.3g}"
            raise CannotMeasureError(
                f"no learning rate could be measured: at each one tried, {tried}, the training or held-out loss was no "
                "finite number in the end; look for such numbers in the model and the data, or set a rate"
            )
        return _rounded(rate_at(best), low, high)


def _edge(ctx: Context, descend: Descend, low: float, high: float) -> float:
    """The range test: the highest rate at which the smoothed loss was still about the least."""
    growth = (high / low) ** (1 / (SWEEP_STEPS - 1))
    rates = [min(low * growth**step, high) for step in range(SWEEP_STEPS)]
    smoothed, weight, means = 0.0, 0.0, list[float]()
    for loss in _losses(ctx, descend(rates, 0), len(rates)):
        smoothed = _SMOOTHING * smoothed + (1 - _SMOOTHING) * loss
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        if not smoothed / weight <= _above(min(means, default=math.inf), DIVERGED):
            break
        means.append(smoothed / weight)
    # The first means are those of a few batches, and chance.
    settled = means[_SETTLED:] or means
    near = _above(min(settled, default=math.inf), NEAR)
    return max((rate for rate, mean in zip(rates, means, strict=False) if mean <= near), default=low)


def _above(loss: float, times: float) -> float:
    """So many times a loss; as far above one below zero."""
    return loss * times if loss >= 0 else loss + (times - 1) * abs(loss)


def _trained(ctx: Context, steps: Iterator[Any], count: int, held_out: Callable[[], float]) -> float:
    """What a training leaves as held-out loss; infinite if it diverges."""
    if not all(math.isfinite(loss) for loss in _losses(ctx, steps, count)):
        return math.inf
    loss = ctx.team.first(held_out())
    return loss if math.isfinite(loss) else math.inf


def _losses(ctx: Context, steps: Iterator[Any], count: int) -> Iterator[float]:
    """Of each step, as far as training comes: arithmetic that overflows ends it."""
    for _ in ctx.steps(count):
        loss = math.nan
        with suppress(OverflowError, FloatingPointError, StopIteration):
            loss = float(next(steps))
        # Where several processes search, each step is one of all.
        loss = ctx.team.first(loss)
        yield loss
        if not math.isfinite(loss):
            return


def _rounded(rate: float, low: float, high: float) -> float:
    """Three digits: more of them mean nothing, and are hard to read."""
    return min(max(float(f"{rate:.3g}"), low), high)
