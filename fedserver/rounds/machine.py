"""One step of a round: (round, event) → (round, actions)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedserver.rounds.model import Action, Event, Phase, Round
from fedserver.rounds.phases import aggregate, collect, ended, select

_STEPS: Mapping[Phase, Callable[[Round, Event], tuple[Round, list[Action]]]] = {
    Phase.SELECT: select.step,
    Phase.COLLECT: collect.step,
    Phase.AGGREGATE: aggregate.step,
    Phase.COMMITTED: ended.step,
    Phase.FAILED: ended.step,
}


def step(current: Round, event: Event) -> tuple[Round, list[Action]]:
    """Tell a round what happened.

    Events that mean nothing in the current phase change nothing, so a repeat is harmless.

    Returns:
        The round afterwards, and what has to be done, in order.
    """
    return _STEPS[current.phase](current, event)
