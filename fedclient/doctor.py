"""The command `fedclient doctor`: is this site fit to take part, and if not, what is to be done."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlink.errors import EXIT_FAILED


def doctor(
    config: Annotated[Path, typer.Option(help="The site's site.toml.")] = Path("site.toml"),
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of findings and nothing else.")] = False,
    skip_training_step: Annotated[
        bool, typer.Option("--skip-training-step", help="Build no model and train no step; for large models.")
    ] = False,
) -> None:
    """Check everything this site needs to take part, and say what to do where something is wrong.

    It may run beside the daemon: it opens no session and changes nothing. The exit code is 1 if a check failed.
    """
    # Imported only here, so that the other commands start quickly.
    from fedclient.checks.report import report  # noqa: PLC0415

    if not report(config, as_json=as_json, train=not skip_training_step):
        raise typer.Exit(EXIT_FAILED)
