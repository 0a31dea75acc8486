"""Structured logs on stderr: for people on a terminal, JSON lines otherwise."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Hashable
from typing import Any

import structlog

SAY_AGAIN_AFTER = 60.0
"""Seconds between two lines about what goes on and on."""


class Seldom:
    """When to say what goes on and on: at once, and then once a minute."""

    def __init__(self) -> None:
        self._said: dict[Hashable, float] = {}

    def due(self, what: Hashable = None) -> bool:
        """Whether it is to be said now; each thing by itself, of which there must not be many."""
        now, said = time.monotonic(), self._said.get(what)
        if said is not None and now - said < SAY_AGAIN_AFTER:
            return False
        self._said[what] = now
        return True


class _Stderr:
    """`sys.stderr` as it is when something is said; what cannot be written is lost, and stops nobody."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


def setup(level: str = "info", *, json: bool | None = None) -> None:
    """Configure logging for a process; call once, from a command.

    Args:
        level: debug, info, warning or error.
        json: JSON lines; by default when stderr is not a terminal.
    """
    as_json = not sys.stderr.isatty() if json is None else json
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if as_json:
        shared += [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    else:
        shared.append(structlog.dev.ConsoleRenderer())
    structlog.configure(
        processors=shared,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(_Stderr()),  # type: ignore[arg-type]  # only these two are used
        cache_logger_on_first_use=True,
    )


def get(name: str) -> Any:
    """A logger that says which part speaks; bind run, round, client where they are known."""
    return structlog.get_logger(part=name)
