"""The table of results: for a terminal, in Markdown, and as a plot; all from the JSON object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.table import Row, Target, number

Results = Mapping[str, Any]
"""The JSON object: `rows` by name."""


@dataclass(frozen=True)
class Line:
    """One target with what was measured for it; `median` is None where nothing was."""

    row: Row
    target: Target
    measured: Mapping[str, Any]
    found: Mapping[str, Any] | None

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.found is None:
            return "skipped" if "skipped" in self.measured else "failed"
        if self.target.stretch is not None and self.target.met(self.found["median"], self.target.stretch):
            return "stretch"
        return "met" if self.target.met(self.found["median"]) else "NOT MET"

    @property
    def cells(self) -> tuple[str, ...]:
        """What, target, stretch, median, minimum to maximum, verdict, load."""
        t, found = self.target, self.found
        stretch = "" if t.stretch is None else t.says(t.stretch)
        median = number(found["median"]) + t.unit if found else "–"  # noqa: RUF001 - an en dash
        between = f"{number(found['min'])} to {number(found['max'])}" if found else ""
        return (
            f"{self.row.what}: {t.what}",
            t.says(t.target),
            stretch,
            median,
            between,
            self.verdict,
            f"{self.measured['load_average']:.1f}",
        )


HEADINGS = ("what", "target", "stretch", "median", "min to max", "", "load")


def lines(rows: Sequence[Row], results: Results) -> Iterator[Line]:
    """A line for every target of the rows that have results."""
    for row in rows:
        if measured := results["rows"].get(row.name):
            for target in row.targets:
                yield Line(row, target, measured, measured["values"].get(target.key))


def not_met(rows: Sequence[Row], results: Results) -> list[str]:
    """Every target that was measured and is not met, or could not be measured for an error."""
    found = []
    for line in lines(rows, results):
        if line.verdict == "NOT MET":
            found.append(f"{line.cells[0]}: {line.cells[3]}, {line.cells[1]} is the target")
        elif line.verdict == "failed":
            found.append(f"{line.cells[0]}: {line.measured['error']}")
    return found


def remarks(rows: Sequence[Row], results: Results) -> list[str]:
    """Why a row was skipped."""
    measured = {row.name: results["rows"].get(row.name, {}) for row in rows}
    return [f"{name} was skipped: {found['skipped']}" for name, found in measured.items() if "skipped" in found]


def show(rows: Sequence[Row], results: Results, console: Console) -> None:
    """Print the table for people."""
    table = Table(*HEADINGS, box=None, pad_edge=False)
    styles = {"stretch": "green", "met": "green", "NOT MET": "bold red", "failed": "bold red"}
    for line in lines(rows, results):
        *cells, verdict, load = line.cells
        table.add_row(*cells, f"[{styles.get(verdict, 'dim')}]{verdict}[/]", load)
    console.print(table)
    for remark in remarks(rows, results):
        console.print(remark, highlight=False)


def markdown(rows: Sequence[Row], results: Results) -> str:
    """The table for docs/performance.md, and how it came about."""
    out = ["| " + " | ".join(HEADINGS) + " |", "| --- " * len(HEADINGS) + "|"]
    out += ["| " + " | ".join(line.cells) + " |" for line in lines(rows, results)]
    machine = results["machine"]
    out += ["", f"{machine['cores']} cores, {machine['memory_gb']:.0f} GB, {machine['system']}, {machine['python']}."]
    when = sorted({(found["when"], found["commit"]) for found in results["rows"].values()})
    (first, _), (last, _) = when[0], when[-1]
    between = first if first == last else f"{first} to {last}"
    out[-1] += f" Measured {between} at commit {', '.join(dict.fromkeys(commit for _, commit in when))}."
    out[-1] += " `load` is the machine's load average over one minute when the row began."
    return "\n".join([*out, *(f"\n{remark[0].upper()}{remark[1:]}" for remark in remarks(rows, results))])


def draw(rows: Sequence[Row], results: Results, path: Path) -> None:
    """Plot every measured target: how much of what is allowed was used, with minimum and maximum."""
    # Only now: what is only measured needs no matplotlib.
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    shown = [line for line in lines(rows, results) if line.found]
    if not shown:
        return
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.32 * len(shown)), layout="constrained")
    for y, line in enumerate(reversed(shown)):
        assert line.found is not None
        used = {key: _used(line.target, line.found[key]) for key in ("median", "min", "max")}
        colour = "tab:red" if line.verdict == "NOT MET" else "tab:green"
        axes.plot([used["min"], used["max"]], [y, y], color=colour, linewidth=2, alpha=0.5)
        axes.plot(used["median"], y, "o", color=colour)
        axes.annotate(line.cells[3], (used["median"], y), (0, 5), textcoords="offset points", ha="center", fontsize=7)
        if line.target.stretch is not None:
            axes.plot(_used(line.target, line.target.stretch), y, "|", color="black", markersize=12)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(shown)), [line.cells[0] for line in reversed(shown)], fontsize=8)
    axes.set(xscale="log", xlabel="measured / target (left of the line: met; |: stretch)")
    axes.xaxis.set_major_locator(ticker.LogLocator(base=2))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _used(target: Target, value: float) -> float:
    """Which part of what is allowed a value is; below 1 is good."""
    # A measurement of nothing at all has no place on a logarithmic axis.
    value = max(value, target.target / 1000)
    return target.target / value if target.at_least else value / target.target
