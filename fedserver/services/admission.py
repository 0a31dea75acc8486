"""How much bulk traffic is let in at once, over all the calls that move megabytes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from fedlink.errors import FedlinkError, Reason
from fedserver.runtime.access import Caller


@dataclass(frozen=True, slots=True)
class BulkLimits:
    """How much bulk traffic is let in at once; what is over gets BUSY."""

    streams: int = 16
    """Streams in all. One takes about 12 MiB of memory."""
    streams_per_caller: int = 4
    """Streams of one client, so that none can keep the others out."""
    retry_after: float = 0.5
    """Seconds after which a client turned away may ask again."""
    stall: float = 60.0
    """Seconds without a message after which a stream loses its place."""


class Admission:
    """The places for bulk streams on one listener.

    Attributes:
        limits: how many there are.
    """

    def __init__(self, limits: BulkLimits) -> None:
        self.limits = limits
        self._streams: Counter[str] = Counter()

    @contextlib.contextmanager
    def place(self, caller: Caller) -> Iterator[None]:
        """Hold a place for the length of a stream.

        Raises:
            FedlinkError: BUSY: all are taken, or all that this caller may have.
        """
        limits = self.limits
        if self._streams.total() >= limits.streams or self._streams[caller.name] >= limits.streams_per_caller:
            text = "The server moves as many blobs as it can at once; come back in a moment."
            raise FedlinkError(Reason.BUSY, text, retry_after=limits.retry_after)
        self._streams[caller.name] += 1
        try:
            yield
        finally:
            self._streams[caller.name] -= 1
            if not self._streams[caller.name]:
                del self._streams[caller.name]
