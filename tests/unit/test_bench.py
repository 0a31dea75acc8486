"""The benchmark's table: what counts as met, and what becomes of rows that fail or cannot be measured here."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench import report
from tests.bench.__main__ import measure
from tests.bench.place import BenchError
from tests.bench.table import Found, Ground, Row, SkippedRow, Target
from tests.bench.targets import ROWS


def row(name: str, run: Any, **target: Any) -> Row:
    return Row(name, name, run, (Target("k", "k", 2.0, **target),), repeat=1)


def gives(*values: float) -> Any:
    return lambda _: Found({"k": list(values)})


def raises(error: Exception) -> Any:
    def run(_: Ground) -> Found:
        raise error

    return run


def run(rows: list[Row], directory: Path) -> dict[str, Any]:
    results: dict[str, Any] = {"rows": {}, "machine": {"cores": 2, "memory_gb": 1.0, "system": "s", "python": "p"}}
    given = argparse.Namespace(dir=directory, repeat=0, idle_clients=1)
    measure(rows, given, results, directory / "results.json")
    assert json.loads((directory / "results.json").read_text()) == results
    return results


@pytest.mark.parametrize(
    ("values", "target", "verdict"),
    [
        ((2.0,), {}, "met"),
        ((1.0, 1.9, 9.0), {}, "met"),
        ((1.0, 2.1, 2.2), {}, "NOT MET"),
        ((0.9,), {"stretch": 1.0}, "stretch"),
        ((1.9,), {"at_least": True}, "NOT MET"),
        ((2.1,), {"at_least": True, "stretch": 3.0}, "met"),
        ((3.0,), {"at_least": True, "stretch": 3.0}, "stretch"),
    ],
)
def test_the_median_counts(values: tuple[float, ...], target: dict[str, Any], verdict: str, tmp_path: Path) -> None:
    rows = [row("r", gives(*values), **target)]
    results = run(rows, tmp_path)
    assert [line.verdict for line in report.lines(rows, results)] == [verdict]
    assert len(report.not_met(rows, results)) == (verdict == "NOT MET")


def test_a_row_that_fails_stops_no_other_and_one_that_is_skipped_is_no_miss(tmp_path: Path) -> None:
    rows = [
        row("broken", raises(BenchError("the server ended\nwith this log"))),
        row("wrong", raises(ZeroDivisionError("0"))),
        row("rootless", raises(SkippedRow("it needs root"))),
        row("slow", gives(4.0)),
        row("fine", gives(1.0, 2.0)),
    ]
    results = run(rows, tmp_path)
    assert [line.verdict for line in report.lines(rows, results)] == ["failed", "failed", "skipped", "NOT MET", "met"]
    misses = report.not_met(rows, results)
    assert misses == ["broken: k: the server ended", "wrong: k: 0", "slow: k: 4, ≤ 2 is the target"]
    text = report.markdown(rows, results)
    assert "| fine: k | ≤ 2 |  | 1.5 | 1 to 2 | met |" in text
    assert "Rootless was skipped: it needs root" in text
    report.draw(rows, results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_rows_that_were_not_measured_are_not_shown(tmp_path: Path) -> None:
    rows = [row("a", gives(1.0)), row("b", gives(1.0))]
    results = run(rows[:1], tmp_path)
    assert [line.row.name for line in report.lines(rows, results)] == ["a"]


def test_every_row_is_on_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert [name for name in names if f"| `{name}` |" not in page] == []
