"""How the steps of a round are shared among sites of different speed, so that they finish together."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

MOST = 10
"""How many times the mean one site is given at most: a speed that was measured wrong does not move the whole round."""


SLOWEST, FASTEST = 1e-9, 1e9
"""What a second holds at least and at most, of steps or examples: sites say what they like."""


@dataclass(frozen=True)
class Training:
    """How fast one training went."""

    run: int
    """The run's id."""
    steps_per_second: float
    examples_per_second: float
    """0 if that is not known."""

    @classmethod
    def of(cls, run: int, steps: int, examples: int, seconds: float) -> Training | None:
        """What a site's word makes of a training; None if there is no speed in it: no steps, or no time."""
        if not steps or not seconds:
            return None
        return cls(run, _clamped(steps / seconds), _clamped(examples / seconds) if examples else 0.0)


def _clamped(rate: float) -> float:
    return min(max(rate, SLOWEST), FASTEST)


def usual(trainings: Sequence[Training], run: int | None = None) -> Training | None:
    """The speed to expect of a site: medians, of its trainings in this run if there are any; None: never measured."""
    ours = [t for t in trainings if t.run == run] or list(trainings)
    if not ours:
        return None
    # Where examples were not shown, there is nothing to take the median of.
    shown = [t.examples_per_second for t in ours if t.examples_per_second]
    return Training(ours[-1].run, median(t.steps_per_second for t in ours), median(shown) if shown else 0.0)


def shares(speeds: Mapping[str, float | None], mean: int) -> dict[str, int]:
    """How many steps each site is given.

    They are `mean` times as many as there are sites, at least 1 and at most `MOST` times the mean for each. A faster
    site is never given fewer. A site that was never measured is given the mean, and the others share theirs.

    Args:
        speeds: steps a second of each site, from SLOWEST to FASTEST; None: never measured.
        mean: steps a site on average, at least 1.
    """
    known = {name: speed for name, speed in sorted(speeds.items()) if speed is not None}
    given = {name: mean for name in speeds if name not in known}
    if known:
        total, most = mean * len(known), mean * MOST
        seconds = _duration(sorted(known.values()), total, most)
        parts = {name: min(max(int(speed * seconds), 1), most) for name, speed in known.items()}
        given |= _completed(parts, known, total, most)
    return given


def _duration(speeds: Sequence[float], total: int, most: int) -> float:
    """How long the round takes if steps could be cut: the interval is halved until nothing is left of it."""
    low, high = 0.0, total / min(speeds)
    while low < (middle := (low + high) / 2) < high:
        if sum(min(max(speed * middle, 1.0), most) for speed in speeds) > total:
            high = middle
        else:
            low = middle
    return low


def _completed(parts: dict[str, int], speeds: Mapping[str, float], total: int, most: int) -> dict[str, int]:
    """Give the steps that rounding down has left to whoever is through with one more the soonest."""
    left = total - sum(parts.values())
    soonest = [((parts[name] + 1) / speed, -speed, name) for name, speed in speeds.items() if parts[name] < most]
    heapq.heapify(soonest)
    for _ in range(left):
        _, negative, name = heapq.heappop(soonest)
        parts[name] += 1
        if parts[name] < most:
            heapq.heappush(soonest, ((parts[name] + 1) / -negative, negative, name))
    return parts
