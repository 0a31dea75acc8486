"""Tests marked `gpu`: left out where there is no GPU, and said so; what the others measured, as a table and as JSON."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

import pytest

MEASURED = "measured"
"""The property of a test under which it says what it measured."""
REASON = "no GPU"


def leave_out(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where torch finds none."""
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.accelerator.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason=REASON))


def record(record_property: Callable[[str, object], None], device: str, metrics: dict[str, Any]) -> None:
    """Have what a training logged reported at the end of the run.

    Args:
        record_property: pytest's fixture.
        device: where it ran.
        metrics: of the training.
    """
    import torch

    kind, _, number = device.partition(":")
    name = kind if kind in ("cpu", "mps") else torch.get_device_module(kind).get_device_name(int(number or 0))
    names = ("tokens_per_second", "peak_device_memory", "peak_memory", "compile_seconds")
    record_property(MEASURED, {"device": name} | {n: metrics[n] for n in names if n in metrics})


def report(reporter: pytest.TerminalReporter) -> None:
    """What was measured, and how many tests were not run."""
    passed: list[pytest.TestReport] = reporter.stats.get("passed", [])
    rows = [
        {"test": r.nodeid.rpartition("[")[2].rstrip("]"), **dict(r.user_properties)[MEASURED]}
        for r in passed
        if _has(r)
    ]
    if rows:
        reporter.section("measured on a GPU")
        for row in rows:
            speed, memory = row.get("tokens_per_second", 0), row.get("peak_device_memory", 0) / 1e9
            reporter.write_line(f"{row['test']:<24} {row['device']:<28} {speed:>10,.0f} tokens/s {memory:>7.2f} GB")
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
        reporter.write_line(json.dumps({"versions": versions, "measured": rows}))
    skipped: list[Any] = reporter.stats.get("skipped", [])
    missing = [r for r in skipped if isinstance(r.longrepr, tuple) and r.longrepr[2] == f"Skipped: {REASON}"]
    if missing:
        reporter.write_line(f"{len(missing)} tests not run: {REASON}", yellow=True)


def _has(report: pytest.TestReport) -> bool:
    return report.when == "call" and MEASURED in dict(report.user_properties)
