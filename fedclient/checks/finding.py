"""What a check says."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class Outcome(enum.StrEnum):
    """How a check went."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do about it.

    Nothing here quotes the site's data: people send these lines to each other.
    """

    outcome: Outcome
    found: str
    advice: str = ""
    """What to do; empty if there is nothing to do."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What a program may want to know besides, for --json; counts by label may be among it."""


def ok(found: str) -> Finding:
    """All is well."""
    return Finding(Outcome.OK, found)


def warning(found: str, advice: str) -> Finding:
    """It works, but somebody should know."""
    return Finding(Outcome.WARNING, found, advice)


def failed(found: str, advice: str) -> Finding:
    """The daemon cannot work like this."""
    return Finding(Outcome.FAILED, found, advice)


def skipped(found: str, advice: str = "") -> Finding:
    """It was not looked at; `found` says why."""
    return Finding(Outcome.SKIPPED, found, advice)


def together(findings: Sequence[Finding]) -> Finding:
    """Several findings as one: the worst outcome, and every sentence."""
    order = (Outcome.FAILED, Outcome.WARNING, Outcome.SKIPPED, Outcome.OK)
    worst = min((f.outcome for f in findings), key=order.index)
    advice = dict.fromkeys(f.advice for f in findings if f.advice)
    details = {key: value for f in findings for key, value in f.details.items()}
    return Finding(worst, "; ".join(f.found for f in findings), " ".join(advice), details)
