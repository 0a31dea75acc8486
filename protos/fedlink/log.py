"""Structured logs on stderr: for people on a terminal, JSON lines otherwise."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any

import structlog


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
