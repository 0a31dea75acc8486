"""COMMITTED and FAILED: the end of an attempt; nothing changes it."""

from __future__ import annotations

from fedserver.rounds.model import Action, Event, Round


def step(current: Round, event: Event) -> tuple[Round, list[Action]]:  # noqa: ARG001 - the shape every phase has
    """Change nothing."""
    return current, []
