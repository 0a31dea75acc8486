"""Where a benchmark may run, and what its medians and log ends are; shared by every part of it."""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Iterable
from pathlib import Path

from tests.bench import weights

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
IN_MEMORY = ("tmpfs", "ramfs")
"""File systems that are no disk."""
CHECKED_FIRST = 3
"""So many rounds from the first, and the last one, are compared with the exact average."""
_LONGEST_PATH = 65


class BenchError(Exception):
    """The benchmark cannot go on; the message says why."""


def check_place(model: str, clients: int, rounds: int, directory: Path) -> None:
    """Refuse a place where the numbers would mean nothing, or where there is no room.

    Raises:
        BenchError: with what to do instead.
    """
    if rounds < 2:
        raise BenchError("the first round only warms up: ROUNDS must be at least 2")
    if (kind := file_system(directory)) in IN_MEMORY:
        raise BenchError(f"{directory} is in memory ({kind}), not on a disk; name another directory with DIR=")
    if len(os.fsencode(directory.resolve())) > _LONGEST_PATH:
        raise BenchError(f"{directory} is too long a path for the server's socket; name a shorter one with DIR=")
    # At the most: the imported model, the versions that are kept, made and compared, every update, and at each site its
    # model and its update.
    needed = weights.size(model) * (min(rounds + 1, 4 + CHECKED_FIRST) + 3 * clients)
    if (free := shutil.disk_usage(directory).free) < needed * 1.1:
        raise BenchError(f"{directory} has {free / 1e9:.1f} GB free, and {needed * 1.1 / 1e9:.1f} GB are needed")


def file_system(directory: Path) -> str:
    """The kind of file system a directory is on; empty where that cannot be known."""
    device = os.stat(directory).st_dev  # noqa: PTH116 - only the number is of interest
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    kinds = [line.partition(" - ")[2].split()[0] for line in lines if line.split()[2] == number]
    return kinds[0] if kinds else ""


def median(values: Iterable[float]) -> float:
    """The median, to a thousandth."""
    return round(statistics.median(values), 3)


def tail(log: Path, lines: int = 20) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
