"""How far a task is."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field


@dataclass
class Status:
    """How far a task is, for heartbeats and for draining."""

    activity: str = "queued"
    done: int = 0
    total: int = 0
    moved: float = 0.0
    """Loop time of the last progress."""
    points: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Metrics not reported yet: value and step."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the activity changes."""

    def enter(self, activity: str) -> None:
        """Begin an activity of `ExtendLeaseRequest.Activity`."""
        self.activity = activity
        self.advance(0, 0)
        self.changed.set()

    def advance(self, done: int, total: int) -> None:
        """Note progress in steps or bytes."""
        self.done, self.total = done, total
        self.moved = asyncio.get_running_loop().time()

    def advance_in(self, activity: str, done: int, total: int) -> None:
        """Note progress of something that goes on beside other activities; only its own one shows it."""
        if self.activity == activity:
            self.advance(done, total)
