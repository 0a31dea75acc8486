"""How many steps there is time for: every cost is counted in steps, and a step was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from examples.llm.plays import PLAYS, TEST_PASSAGES

SITES = len(PLAYS)
ALONE = SITES + 1
"""Trainings without a server: each site alone, and the pooled passages."""
BATCH = 4
FORWARD = 0.5
"""What a forward pass costs, in steps."""
SAMPLE = 1.0
"""What a sample of 32 tokens costs, in steps."""
OVERHEAD = 15.0
"""Seconds for everything else: the server, the rounds' ends, the plot."""
PRUDENCE = 1.2
"""Times vary by as much from one minute to the next."""
ROUNDS = (4, 3, 2)
"""So many, if there is time for them."""
LEAST = 4
"""Fewer steps in a round teach nothing."""


@dataclass(frozen=True)
class Machine:
    """What this machine can do."""

    step: float
    """Seconds of an optimizer step, when every lane is busy."""
    start: float
    """Seconds until a trainer has loaded everything, likewise."""
    lanes: int
    """Trainers at a time."""


@dataclass(frozen=True)
class Plan:
    """How much is trained."""

    rounds: int
    steps: int
    """Of each site in each round."""


def plan(machine: Machine, seconds: float) -> Plan:
    """As much training as fits: about so many seconds for the whole demo, or a little more on a slow machine."""
    plans = [Plan(rounds, steps_in_round(machine, rounds, seconds)) for rounds in ROUNDS]
    return next((p for p in plans if p.steps >= LEAST), Plan(ROUNDS[-1], LEAST))


def steps_in_round(machine: Machine, rounds: int, seconds: float) -> int:
    """Steps of each site in each round for which there is time; may be below 1."""
    measuring = SITES * TEST_PASSAGES / BATCH * FORWARD
    # Each training alone measures what it begins with, too.
    fixed = (rounds + 1) * (measuring + SAMPLE) + 2 * ALONE * measuring
    trainers = machine.lanes + 1 + SITES + ALONE
    left = seconds / PRUDENCE - OVERHEAD - machine.start * trainers / machine.lanes
    affordable = left * machine.lanes / machine.step - fixed
    return math.floor(affordable / (rounds * (SITES + ALONE)))
