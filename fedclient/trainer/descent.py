"""Everything that a process started, found by its descent: also what leads groups and sessions of its own."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection
from pathlib import Path

_PROC = Path("/proc")


def kill_descendants(pid: int, also: Collection[int] = ()) -> None:
    """Kill the groups of all that descends from a process, and its own one, but not this process' group.

    Where there is no /proc, descendants are not found: the groups of `also` are killed alone.

    Args:
        pid: of a process that has not been waited for yet.
        also: further groups, of which the leaders may be gone.
    """
    found: set[int] = set()
    # What is stopped starts nothing that would be missed.
    while fresh := _groups(pid) - found:
        for group in fresh:
            _send(group, signal.SIGSTOP)
        found |= fresh
    for group in found.union(also) - {os.getpgrp()}:
        _send(group, signal.SIGKILL)


def _groups(pid: int) -> set[int]:
    children: dict[int, list[int]] = {}
    groups: dict[int, int] = {}
    for entry in _PROC.iterdir() if _PROC.is_dir() else ():
        if entry.name.isdecimal():
            # Many end while one looks.
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry.name))
                groups[int(entry.name)] = int(fields[2])
    found, left = set[int](), [pid]
    while left:
        here = left.pop()
        left += children.get(here, ())
        if here in groups:
            found.add(groups[here])
    return found - {os.getpgrp(), 0}


def _send(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
