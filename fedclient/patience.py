"""How long a daemon waits for a server that says nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from fedlink.rpc import PATIENT, QUICK, Liveness, patient
from fedlink.transfer import STALL


@dataclass(frozen=True, slots=True)
class Patience:
    """Times after which silence means that something is broken.

    Attributes:
        control: when the connection for control calls counts as dead.
        bulk: the same for the one that carries blobs.
        call: seconds a unary call may take beyond what the server is asked to wait; then it counts as lost.
        stall: seconds in which a transfer must move at least one chunk.
    """

    control: Liveness = QUICK
    bulk: Liveness = PATIENT
    call: float = 60.0
    stall: float = STALL

    @classmethod
    def of(cls, stall: float) -> Self:
        """That of a site which gives a chunk `stall` seconds; a sign travels behind the chunks, and gets no less."""
        return cls(bulk=patient(stall), stall=stall)
