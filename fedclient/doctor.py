"""The command `fedclient doctor`: is this site fit to take part, and if not, what is to be done."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.status import Status
from rich.text import Text

from fedclient.checks import Examination, Finding, Outcome, examine
from fedclient.settings import load_site
from fedlink import rpc
from fedlink.errors import EXIT_FAILED

_MARKS = {Outcome.OK: "✓", Outcome.WARNING: "!", Outcome.FAILED: "✗", Outcome.SKIPPED: "-"}
_PLAIN_MARKS = _MARKS | {Outcome.OK: "+", Outcome.FAILED: "x"}
_STYLES = {Outcome.OK: "green", Outcome.WARNING: "yellow", Outcome.FAILED: "bold red", Outcome.SKIPPED: "dim"}
_WIDTH = 14


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
    visit = Examination(load_site(config), config, train=not skip_training_step)
    rpc.tune_malloc()
    report = _Json() if as_json else _Lines()
    outcomes = asyncio.run(_run(visit, report))
    report.end(outcomes)
    if outcomes[Outcome.FAILED]:
        raise typer.Exit(EXIT_FAILED)


class _Json:
    """A list, when all is done."""

    def __init__(self) -> None:
        self._findings: list[dict[str, str]] = []

    def begin(self, check: str) -> None:
        """A check begins."""

    def add(self, check: str, finding: Finding) -> None:
        """A check is done."""
        entry = {"check": check, "outcome": finding.outcome.value, "found": finding.found, "advice": finding.advice}
        self._findings.append(entry)

    def end(self, _: Counter[Outcome]) -> None:
        """All are done."""
        typer.echo(json.dumps(self._findings, indent=2))

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Around everything."""
        yield


class _Lines(_Json):
    """A line for each check as it is done."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._status = Status("", console=self._console)
        utf8 = self._console.encoding.lower().startswith("utf")
        self._marks = _MARKS if utf8 else _PLAIN_MARKS

    def begin(self, check: str) -> None:
        self._status.update(f"  {check} ...")

    def add(self, check: str, finding: Finding) -> None:
        line = Text.assemble(
            (f"{self._marks[finding.outcome]} {check:<{_WIDTH}}", _STYLES[finding.outcome]), finding.found
        )
        self._console.print(line)
        if finding.advice and finding.outcome is not Outcome.OK:
            self._console.print(Text(f"    {finding.advice}"))

    def end(self, outcomes: Counter[Outcome]) -> None:
        count = ", ".join(f"{outcomes[o]} {_words(o, outcomes[o])}" for o in Outcome if outcomes[o])
        self._console.print(f"{sum(outcomes.values())} checks: {count}")

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        if not self._console.is_terminal:
            yield
            return
        with self._status:
            yield


async def _run(visit: Examination, report: _Json) -> Counter[Outcome]:
    outcomes: Counter[Outcome] = Counter()
    with report.live():
        async with visit:
            async for check, finding in examine(visit, begin=report.begin):
                outcomes[finding.outcome] += 1
                report.add(check, finding)
    return outcomes


def _words(outcome: Outcome, count: int) -> str:
    return "warnings" if outcome is Outcome.WARNING and count > 1 else outcome.value
