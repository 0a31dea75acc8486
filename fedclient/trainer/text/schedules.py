"""The learning rate over the whole run: a function of the step, so that no round begins it anew."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Name = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes from the first step of a run to its last, at one site.

    Attributes:
        name: what it does after the warm-up.
        peak: the highest rate.
        total: steps of the whole run at this site; 0 if that is not known: then the rate stays at its peak.
        warmup: share of the steps over which it rises from 0.
        floor: share of the peak that it falls to.
    """

    name: Name
    peak: float
    total: int
    warmup: float = 0.0
    floor: float = 0.0

    def rate(self, step: int) -> float:
        """The rate of a step, counted from 0 over the whole run; after the last one it stays as it was."""
        if not self.total:
            return self.peak
        rising = math.ceil(self.warmup * self.total)
        if step < rising:
            return self.peak * (step + 1) / rising
        # The last step is not at the floor but one before it: a step of rate 0 would be lost.
        left = max(0.0, 1 - (step - rising) / (self.total - rising)) if self.total > rising else 0.0
        shares = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
        return self.peak * (self.floor + (1 - self.floor) * shares[self.name])
