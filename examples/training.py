"""What the demos of text workloads take besides, for every training alike: several processes, a measured rate."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass

AUTO = "auto"


@dataclass(frozen=True)
class Training:
    """How a demo's trainings are done.

    Attributes:
        processes: of each trainer.
        learning_rate: in place of the demo's own rate: a number, or AUTO; None: the demo's own.
    """

    processes: int = 1
    learning_rate: float | str | None = None

    @property
    def tables(self) -> Mapping[str, Mapping[str, object]]:
        """What site.toml says of it: tables of the workload, by name."""
        return {"distributed": {"processes": self.processes}} if self.processes > 1 else {}

    @property
    def measures(self) -> bool:
        """Whether the sites measure the rate."""
        return self.learning_rate == AUTO

    def lanes(self, trainers: int, cores: int) -> int:
        """How many of so many trainers compute at a time."""
        return max(1, min(trainers, cores // self.processes))


PLAIN = Training()


def tables_toml(workload: str, tables: Mapping[str, Mapping[str, object]]) -> str:
    """Tables of a workload, as site.toml has them."""
    text = ""
    for table, entries in tables.items():
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in entries.items())
        text += f"\n[workload.{workload}.{table}]\n{lines}"
    return text


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--processes` and `--learning-rate`."""
    parser.add_argument("--processes", type=_count, default=1, help="of each trainer")
    parser.add_argument(
        "--learning-rate", type=_rate, help='instead of its own: a number, or "auto": the sites measure'
    )


def chosen(given: argparse.Namespace) -> Training:
    """What was given of these options."""
    return Training(given.processes, given.learning_rate)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)


def _rate(text: str) -> float | str:
    return text if text == AUTO else float(text)
