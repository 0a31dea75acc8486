"""Where each of several ranks is in its work, as its launcher hears, and which of them the others wait for in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class _Place:
    """What a rank said last.

    Attributes:
        at: its job and the meeting there that it has come to; None: it works on nothing that others wait for.
        step: steps that were over then.
        since: when it came there.
        heard: when it last gave a sign of life.
    """

    at: tuple[int, int] | None
    step: int
    since: float
    heard: float


class Places:
    """The places of a machine's ranks.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._places: dict[int, _Place] = {}

    def at(self, rank: int, job: int, meeting: int, step: int) -> None:
        """A rank has come to a meeting of a job, where it waits for the others; 0: it has begun the job."""
        now = self._clock()
        with self._lock:
            self._places[rank] = _Place((job, meeting), step, now, now)

    def idle(self, rank: int) -> None:
        """A rank waits for its next job, or goes on alone."""
        now = self._clock()
        with self._lock:
            self._places[rank] = _Place(None, 0, now, now)

    def alive(self, rank: int) -> None:
        """A rank is at work, wherever it is."""
        with self._lock:
            self._places[rank] = replace(self._places[rank], heard=self._clock())

    def step(self, rank: int) -> int:
        """The step that a rank was at when it last said so."""
        with self._lock:
            return self._places[rank].step if rank in self._places else 0

    def stalled(self, seconds: float) -> tuple[list[int], int]:
        """The ranks that others have waited for so long, without a sign of life from them; and the step of those."""
        with self._lock:
            busy = {rank: (p.at, p) for rank, p in self._places.items() if p.at is not None}
        if not busy:
            return [], 0
        furthest = max(at for at, _ in busy.values())
        waiting = [p for at, p in busy.values() if at == furthest]
        since, now = min(p.since for p in waiting), self._clock()
        late = [rank for rank, (at, p) in busy.items() if at < furthest and now - max(since, p.heard) > seconds]
        return sorted(late), waiting[0].step
