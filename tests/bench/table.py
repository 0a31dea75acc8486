"""What a row of the table of targets is, and what comes of measuring one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class SkippedRow(Exception):  # noqa: N818 - nothing is wrong
    """A row cannot be measured on this machine; the message says why."""


@dataclass(frozen=True)
class Target:
    """One number that is to be reached.

    Attributes:
        key: its name in the JSON object.
        what: for people.
        target: the median must not be above it, or with `at_least` not below.
        stretch: what would be better still; None where there is nothing.
        unit: written behind the numbers.
        at_least: more is better.
    """

    key: str
    what: str
    target: float
    stretch: float | None = None
    unit: str = ""
    at_least: bool = False

    def met(self, value: float, bound: float | None = None) -> bool:
        """Whether a value reaches the target, or another bound."""
        bound = self.target if bound is None else bound
        return value >= bound if self.at_least else value <= bound

    def says(self, bound: float) -> str:
        """A bound for people."""
        return f"{'≥' if self.at_least else '≤'} {number(bound)}{self.unit}"


@dataclass
class Found:
    """What was measured for a row.

    Attributes:
        values: for each target's key, every value; the median counts.
        details: whatever else is worth keeping, e.g. the baselines; for the JSON object.
    """

    values: dict[str, list[float]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, **values: float | Sequence[float]) -> None:
        """More values."""
        for key, value in values.items():
            self.values.setdefault(key, []).extend([value] if isinstance(value, int | float) else value)

    def note(self, **details: Any) -> None:
        """One more entry in the list of each detail."""
        for key, value in details.items():
            self.details.setdefault(key, []).append(value)


@dataclass(frozen=True)
class Ground:
    """Where and how a row is measured.

    Attributes:
        directory: on a disk, for everything that is written.
        repeat: how often.
        idle_clients: of the row of that name.
        say: told how far it is.
    """

    directory: Path
    repeat: int
    idle_clients: int
    say: Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One measurement with its targets.

    Attributes:
        name: on the command line.
        what: for people.
        run: measures; raises SkippedRow or BenchError.
        targets: what it gives numbers for.
        repeat: how often, unless the command line says otherwise.
    """

    name: str
    what: str
    run: Callable[[Ground], Found]
    targets: tuple[Target, ...]
    repeat: int = 3


def summary(values: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Median, minimum and maximum of each list, and the list."""
    return {
        key: {
            "median": round(statistics.median(found), 4),
            "min": round(min(found), 4),
            "max": round(max(found), 4),
            "all": [round(value, 4) for value in found],
        }
        for key, found in values.items()
    }


def number(value: float) -> str:
    """Three digits that count, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
