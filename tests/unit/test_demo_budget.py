"""How much the language model's demo trains in the time that it has."""

from __future__ import annotations

import pytest

from examples.llm.budget import LEAST, ROUNDS, Machine, Plan, plan


def seconds_taken(machine: Machine, chosen: Plan) -> float:
    """What a plan takes, added up from the demo's stages: 12 passages at each of 3 sites, in batches of 4."""
    federated = 3 * chosen.rounds * chosen.steps + (chosen.rounds + 1) * (9 * 0.5 + 1)
    alone = 4 * (chosen.rounds * chosen.steps + 2 * 9 * 0.5)
    return 15 + 10 * machine.start / machine.lanes + (federated + alone) * machine.step / machine.lanes


@pytest.mark.parametrize("step", [0.4, 1.0, 2.0, 4.0])
def test_the_demo_stays_below_six_minutes_on_two_cores(step: float) -> None:
    machine = Machine(step=step, start=12, lanes=2)
    chosen = plan(machine, 300)
    assert chosen.steps >= LEAST
    assert 200 < seconds_taken(machine, chosen) < 315


def test_a_faster_machine_trains_more() -> None:
    chosen = [plan(Machine(step, 12, 2), 300) for step in (4.0, 2.0, 1.0, 0.5)]
    steps = [p.rounds * p.steps for p in chosen]
    assert steps == sorted(set(steps))
    assert chosen[-1].rounds == max(ROUNDS)


def test_a_machine_that_is_too_slow_trains_the_least_that_shows_something() -> None:
    assert plan(Machine(60, 100, 2), 300) == Plan(min(ROUNDS), LEAST)
