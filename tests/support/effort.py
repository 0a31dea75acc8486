"""How hard hypothesis tries: a few seconds a machine, or EFFORT times as long."""

from __future__ import annotations

import os

from hypothesis import settings


def effort(examples: int, steps: int = 50) -> settings:
    """Settings for a state machine: EFFORT=100 pytest tests/property looks a hundred times as long."""
    return settings(max_examples=examples * int(os.environ.get("EFFORT", "1")), stateful_step_count=steps)
