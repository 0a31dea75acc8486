"""AGGREGATE: the accepted updates are being added up; nothing a site does matters any more."""

from __future__ import annotations

from dataclasses import replace

from fedserver.rounds.model import (
    Action,
    Aggregated,
    AggregationFailed,
    Event,
    Fail,
    Phase,
    Round,
    UpdateLost,
)


def step(current: Round, event: Event) -> tuple[Round, list[Action]]:
    """End in COMMITTED or FAILED, or go back to COLLECT for an update that is not there any more."""
    match event:
        case Aggregated():
            return replace(current, phase=Phase.COMMITTED), []
        case AggregationFailed(reason=reason):
            return replace(current, phase=Phase.FAILED, reason=reason), [Fail(reason)]
        case UpdateLost() if event.client in current.accepted:
            return current.reopened(event), []
        case _:
            return current, []
