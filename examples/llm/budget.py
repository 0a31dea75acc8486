"""How many steps there is time for: every cost is counted in steps, and a step was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from examples.llm.plays import TEST_PASSAGES

SITES = 3
ALONE = SITES + 1
"""Trainings without a server: each site alone, and the pooled passages."""
BATCH = 4
FORWARD = 0.45
"""A forward pass, in steps."""
SAMPLE = 1.5
"""A sample of 32 tokens, in steps."""
OVERHEAD = 15.0
"""Seconds for everything else: the server, four rounds, the plot."""
PRUDENCE = 1.2
"""Times vary by as much from one minute to the next."""
LEAST = 3
"""Fewer steps in a round teach nothing."""


@dataclass(frozen=True)
class Machine:
    """What this machine can do."""

    step: float
    """Seconds of an optimizer step, when every lane is busy."""
    start: float
    """Seconds until a trainer has loaded everything."""
    lanes: int
    """Trainers at a time."""


def steps_in_round(machine: Machine, rounds: int, seconds: float) -> int:
    """Steps of each site in each round, so that the whole demo takes about so many seconds."""
    measuring = SITES * TEST_PASSAGES / BATCH * FORWARD
    fixed = (rounds + 1) * (measuring + SAMPLE) + ALONE * 2 * measuring
    left = seconds / PRUDENCE - OVERHEAD - machine.start * (1 + (SITES + ALONE) / machine.lanes)
    affordable = left * machine.lanes / machine.step - fixed
    return max(LEAST, math.floor(affordable / (rounds * (SITES + ALONE))))
