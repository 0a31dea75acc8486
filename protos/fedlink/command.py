"""How both command lines end: an exit code, and for an error one sentence on stderr, never a traceback."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from fedlink import failpoints, log
from fedlink.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE, FedlinkError


def run(app: typer.Typer, name: str) -> NoReturn:
    """Run a command line and exit: 0 ok, 1 failed, 2 usage or configuration, 3 unreachable, 4 refused.

    Args:
        app: the commands.
        name: what the program is called, for messages.
    """
    log.setup("warning")
    try:
        failpoints.arm(os.environ)
    except ValueError as e:
        _fail(name, str(e), EXIT_USAGE)
    try:
        app(prog_name=name)
    except FedlinkError as e:
        _fail(name, e.message, e.reason.exit_code)
    except OSError as e:
        _fail(name, f"{e.filename}: {e.strerror}" if e.filename else str(e), EXIT_FAILED)
    except Exception as e:  # noqa: BLE001 - a defect is told in a sentence too
        log.get("command").debug("internal error", exc_info=True)
        _fail(name, f"internal error: {type(e).__name__}: {e}; please report it", EXIT_FAILED)
    sys.exit(EXIT_OK)


def _fail(name: str, message: str, code: int) -> NoReturn:
    typer.echo(f"{name}: {message}", err=True)
    sys.exit(code)
