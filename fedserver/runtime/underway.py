"""What a draining server still finishes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UnderWay:
    """Work that would be half-done if the server ended now."""

    uploads: tuple[str, ...] = ()
    """Who sends an update, or has sent one that is being checked; "operator" for an import."""
    aggregations: tuple[str, ...] = ()
    """Runs whose next version is being made."""

    def __bool__(self) -> bool:
        return bool(self.uploads or self.aggregations)

    def __str__(self) -> str:
        parts = []
        if self.uploads:
            parts.append(f"{len(self.uploads)} upload{'s' * (len(self.uploads) > 1)} ({', '.join(self.uploads)})")
        if self.aggregations:
            parts.append(f"the aggregation{'s' * (len(self.aggregations) > 1)} of {_runs(self.aggregations)}")
        return f"waits for {' and '.join(parts)}" if parts else "nothing is under way; the server ends now"


def _runs(names: Sequence[str]) -> str:
    return f"run{'s' * (len(names) > 1)} {', '.join(names)}"
