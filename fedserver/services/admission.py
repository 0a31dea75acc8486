"""How much bulk traffic is let in at once, over all the calls that move megabytes."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

from fedlink.batches import BATCH_CHUNKS
from fedlink.errors import FedlinkError, Reason
from fedserver.runtime.access import Caller
from fedserver.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class BulkLimits:
    """How much bulk traffic is let in at once; what is over gets BUSY."""

    streams: int = 16
    """Streams that go in full batches. One takes about 12 MiB of memory."""
    crowd: int = 3
    """So many times as many streams share that memory if they come, one chunk at a time each: links are slow then."""
    streams_per_caller: int = 4
    """Streams of one client, so that none can keep the others out."""
    retry_after: float = 0.5
    """Seconds after which a client turned away may ask again; longer, the more there are before it."""
    stall: float = 60.0
    """Seconds without a message after which a stream loses its place."""

    @classmethod
    def of(cls, settings: ServerSettings) -> Self:
        """What a server's settings say."""
        per_caller = max(1, settings.bulk_streams // 2)
        return cls(settings.bulk_streams, streams_per_caller=per_caller, stall=settings.transfer_stall_after)


class Admission:
    """The places for bulk streams on one listener.

    Who is turned away keeps its turn for a while: without that, a client whose stream has just ended is always sooner
    back than one that waits, and keeps its place as long as it has something to move.

    Attributes:
        limits: how many there are.
    """

    def __init__(self, limits: BulkLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self._places = limits.streams * limits.crowd
        self._streams: Counter[str] = Counter()
        self._turns: dict[str, float] = {}
        """Callers turned away, in the order in which they came, and until when each is waited for."""

    @contextlib.contextmanager
    def place(self, caller: Caller) -> Iterator[None]:
        """Hold a place for the length of a stream.

        Raises:
            FedlinkError: BUSY: all are taken, or all that this caller may have.
        """
        if self._streams[caller.name] >= self.limits.streams_per_caller:
            raise _busy(self.limits.retry_after)
        ahead = self._ahead(caller.name)
        if self._places - self._streams.total() <= ahead:
            pause = self.limits.retry_after * (1 + ahead / max(1, self._places))
            # As long as a client may wait, and a little for its line.
            self._turns[caller.name] = self._clock() + 2 * pause + 1.0
            raise _busy(pause)
        self._turns.pop(caller.name, None)
        self._streams[caller.name] += 1
        try:
            yield
        finally:
            self._streams[caller.name] -= 1
            if not self._streams[caller.name]:
                del self._streams[caller.name]

    def batch(self) -> int:
        """How many chunks a stream may have on the way to or from the disk at once, now."""
        return BATCH_CHUNKS if self._streams.total() <= self.limits.streams else 1

    def _ahead(self, name: str) -> int:
        now = self._clock()
        for late in [other for other, until in self._turns.items() if until < now]:
            del self._turns[late]
        return list(self._turns).index(name) if name in self._turns else len(self._turns)


def _busy(retry_after: float) -> FedlinkError:
    text = "The server moves as many blobs as it can at once; come back in a moment."
    return FedlinkError(Reason.BUSY, text, retry_after=retry_after)
