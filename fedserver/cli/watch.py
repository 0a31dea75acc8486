"""The live table of a run, made from its events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedlink.errors import FedlinkError
from fedlink.v1 import admin_service_pb2 as pb
from fedserver.cli.output import console, iso
from fedserver.rounds.wording import listed, size

_ASK_SECONDS = 2.0
_QUIET_SECONDS = 10.0
_SILENT = ("run_created", "run_calibration_started", "round_started", "round_closed", "task_accepted", "run_finishing")


@dataclass
class RunTable:
    """What is known of a run's rounds; `feed` takes the events one by one.

    Args:
        metric: the metric to show for all sites and for each; empty for a run that does not evaluate.
    """

    metric: str
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ended: dict[str, Any] | None = None
    waiting: str = ""
    """What the run waits for."""
    fed: int = 0
    """Events taken so far."""

    def feed(self, event: pb.WatchRunResponse) -> int | None:
        """Take an event.

        Returns:
            The version whose row is complete now, if one is.
        """
        data = json.loads(event.data_json)
        self.fed += 1
        match event.kind:
            case "round_committed":
                self._row(data["version"]).update(data)
                return None if self.metric else int(data["version"])
            case "version_evaluated":
                self._row(data["version"])["evaluation"] = data
                return int(data["version"])
            case "run_ended":
                self.ended = data
            case "run_calibrated":
                self.notes += _measured(data)
            case kind if kind not in _SILENT:
                details = ", ".join(f"{k} {v}" for k, v in data.items())
                self.notes.append(f"{kind.replace('_', ' ')}: {details}" if details else kind.replace("_", " "))
        return None

    def sites(self) -> list[str]:
        """Every site that has taken part or measured."""
        names: set[str] = set()
        for row in self.rows.values():
            names |= set(row.get("clients", {})) | set(row.get("evaluation", {}).get("clients", {}))
        return sorted(names)

    def titles(self) -> list[str]:
        """Column titles."""
        measured = [self.metric, *self.sites()] if self.metric else []
        return ["round", "sites", *measured, "down", "up", "seconds"]

    def cells(self, version: int) -> list[str]:
        """The texts of a row."""
        row = self.rows[version]
        evaluation = row.get("evaluation", {})
        values = []
        if self.metric:
            sites = [evaluation.get("clients", {}).get(s, {}) for s in self.sites()]
            values = [found.get("metrics", {}).get(self.metric) for found in (evaluation, *sites)]
        return [
            str(version) + ("*" if evaluation.get("best") else ""),
            str(len(row["clients"])) if "clients" in row else "",
            *("" if v is None else f"{v:.4f}" for v in values),
            size(row["bytes_down"]) if "bytes_down" in row else "",
            size(row["bytes_up"]) if "bytes_up" in row else "",
            f"{row['seconds']:.2f}" if "seconds" in row else "",
        ]

    def render(self, title: str) -> Group:
        """The table for a terminal."""
        table = Table(title=title, title_justify="left", box=None, header_style="bold")
        for name in self.titles():
            table.add_column(name, justify="right")
        for version in sorted(self.rows):
            table.add_row(*self.cells(version))
        waiting = [Text(self.waiting, style="dim")] if self.waiting else []
        return Group(table, *(Text(note, style="yellow") for note in self.notes[-5:]), *waiting)

    def _row(self, version: int) -> dict[str, Any]:
        return self.rows.setdefault(version, {})


def measured(value: float | None, sites: Mapping[str, float]) -> str:
    """What sites have measured for a setting, and what came of it.

    Args:
        value: what all train with; None if each does with its own.
        sites: what each found.
    """
    found = listed([f"{site} {each:g}" for site, each in sorted(sites.items())])
    return f"each site its own: {found}" if value is None else f"{value:g}, the median of {found}"


def _measured(data: Mapping[str, Any]) -> Iterator[str]:
    """The notes of what a run's sites have measured."""
    for name in sorted({*data["settings"], *data["own"]}):
        sites = {site: values[name] for site, values in data["sites"].items() if name in values}
        yield f"measured {name}: {measured(data['settings'].get(name), sites)}"
    for site, why in sorted(data["missing"].items()):
        yield f"{site} measured nothing: {why}"


async def show(
    events: AsyncIterator[pb.WatchRunResponse], run: str, metric: str, waiting: Callable[[], Awaitable[str]]
) -> dict[str, Any]:
    """Show a run until it ends: a live table on a terminal, a line for each version otherwise.

    Args:
        events: from the first one on.
        run: its name.
        metric: as for `RunTable`.
        waiting: says what the run waits for.

    Returns:
        The data of the run's last event: "state" and "reason".
    """
    table = RunTable(metric)
    out = console()
    view = _live(events, table, run, out) if out.is_terminal else _lines(events, table)
    asking = asyncio.create_task(_ask(table, waiting))
    try:
        await view
    finally:
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
    return table.ended or {}


async def _ask(table: RunTable, waiting: Callable[[], Awaitable[str]]) -> None:
    """Keep the table's sentence fresh; a server that cannot be asked is what the run waits for then."""
    while True:
        try:
            table.waiting = await waiting()
        except FedlinkError as e:
            table.waiting = str(e)
        await asyncio.sleep(_ASK_SECONDS)


async def _live(events: AsyncIterator[pb.WatchRunResponse], table: RunTable, run: str, out: Console) -> None:
    title = f"{run}   (* best so far)"
    with Live(get_renderable=lambda: table.render(title), console=out, vertical_overflow="visible"):
        async for event in events:
            table.feed(event)
        table.waiting = ""


async def _lines(events: AsyncIterator[pb.WatchRunResponse], table: RunTable) -> None:
    titles: list[str] = []
    quiet = asyncio.create_task(_say_waiting(table))
    try:
        async for event in events:
            said = len(table.notes)
            version = table.feed(event)
            for note in table.notes[said:]:
                typer.echo(note)
            if version is not None:
                if table.titles() != titles:
                    titles = table.titles()
                    typer.echo("  ".join(f"{t:>10}" for t in titles))
                typer.echo("  ".join(f"{c:>10}" for c in table.cells(version)))
    finally:
        quiet.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await quiet


async def _say_waiting(table: RunTable) -> None:
    """Print what the run waits for when nothing has happened for a while."""
    while True:
        before = table.fed
        await asyncio.sleep(_QUIET_SECONDS)
        if table.fed == before and table.waiting:
            typer.echo(table.waiting)


async def show_json(events: AsyncIterator[pb.WatchRunResponse]) -> dict[str, Any]:
    """Print a run's events as JSON lines until it ends.

    Returns:
        The data of the run's last event.
    """
    ended: dict[str, Any] = {}
    async for event in events:
        data = json.loads(event.data_json)
        line = {"sequence": event.sequence, "time": iso(event.time), "kind": event.kind, "data": data}
        typer.echo(json.dumps(line))
        if event.kind == "run_ended":
            ended = data
    return ended
