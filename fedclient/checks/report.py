"""The findings of `fedclient doctor` as they are printed: lines for people, or JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.status import Status
from rich.text import Text

from fedclient.checks import Examination, Finding, Outcome, examine
from fedclient.settings import load_site
from fedlink import rpc

_MARKS = {Outcome.OK: "✓", Outcome.WARNING: "!", Outcome.FAILED: "✗", Outcome.SKIPPED: "-"}
_PLAIN_MARKS = _MARKS | {Outcome.OK: "+", Outcome.FAILED: "x"}
_STYLES = {Outcome.OK: "green", Outcome.WARNING: "yellow", Outcome.FAILED: "bold red", Outcome.SKIPPED: "dim"}
_WIDTH = 14


def report(config: Path, *, as_json: bool, train: bool) -> bool:
    """Do every check and print what it finds.

    Args:
        config: the site.toml.
        as_json: print a JSON list instead of lines.
        train: build a model and train a step, too.

    Returns:
        Whether none failed.

    Raises:
        FedlinkError: BAD_CONFIG: the site.toml cannot be read.
    """
    visit = Examination(load_site(config), config, train=train)
    rpc.tune_malloc()
    printer = _Json() if as_json else _Lines()
    outcomes = asyncio.run(_run(visit, printer))
    printer.end(outcomes)
    return not outcomes[Outcome.FAILED]


class _Json:
    """A list, when all is done."""

    def __init__(self) -> None:
        self._findings: list[dict[str, Any]] = []

    def begin(self, check: str) -> None:
        """A check begins."""

    def add(self, check: str, finding: Finding) -> None:
        """A check is done."""
        entry = {"check": check, "outcome": finding.outcome.value, "found": finding.found, "advice": finding.advice}
        self._findings.append(entry | ({"details": dict(finding.details)} if finding.details else {}))

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


async def _run(visit: Examination, printer: _Json) -> Counter[Outcome]:
    outcomes: Counter[Outcome] = Counter()
    with printer.live():
        async with visit:
            async for check, finding in examine(visit, begin=printer.begin):
                outcomes[finding.outcome] += 1
                printer.add(check, finding)
    return outcomes


def _words(outcome: Outcome, count: int) -> str:
    return "warnings" if outcome is Outcome.WARNING and count > 1 else outcome.value
