"""What processes and a directory use, seen from outside through /proc while a benchmark runs."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

EVERY = 0.05
"""Seconds between two looks at the memory of trees whose sum is wanted; the kernel keeps the peak of one process."""
_SCAN_EVERY = 0.5
_DISK_EVERY = 0.2
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Tree:
    """A process, its descendants, and the most memory they were seen with."""

    root: int
    part: str
    summed: bool
    pids: set[int] = field(default_factory=set)
    peak_together: int = 0
    """Most resident bytes of all processes at one moment."""
    peak_root: int = 0
    """Most resident bytes of the root, as the kernel keeps it (VmHWM)."""
    peak_child: int = 0
    """Most resident bytes of one descendant, likewise."""


class Sampler(threading.Thread):
    """Looks at process trees and at a directory's size until its context ends."""

    def __init__(self, directory: Path) -> None:
        super().__init__(name="sampler", daemon=True)
        self.trees: list[Tree] = []
        self.disk: list[tuple[float, int]] = []
        """Times (since the epoch) and allocated bytes of the directory."""
        self._directory = directory
        self._cpu: dict[int, float] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()

    def watch(self, pid: int, part: str, *, summed: bool = False) -> Tree:
        """Look at one more process, counted to a part, and whatever it starts; `summed` keeps `peak_together`."""
        tree = Tree(pid, part, summed, {pid})
        with self._lock:
            self.trees.append(tree)
        return tree

    def cpu_seconds(self) -> dict[str, float]:
        """User and system seconds of each part until now, those of ended processes up to the last look.

        What a part's processes have started is counted as "trainers".
        """
        with self._lock:
            self._look()
            used = dict.fromkeys([*(t.part for t in self.trees), "trainers"], 0.0)
            roots = {t.root: t.part for t in self.trees}
            for pid, seconds in self._cpu.items():
                used[roots.get(pid, "trainers")] += seconds
            return used

    def run(self) -> None:
        scanned = sized = 0.0
        while not self._over.wait(EVERY):
            now = time.monotonic()
            with self._lock:
                if now - scanned >= _SCAN_EVERY:
                    scanned = now
                    self._scan()
                    self._look()
                else:
                    self._sum_memory()
            if now - sized >= _DISK_EVERY:
                sized = now
                self.disk.append((time.time(), allocated(self._directory)))

    def _scan(self) -> None:
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (fields := _stat(int(entry.name))):
                children.setdefault(int(fields[1]), []).append(int(entry.name))
        for tree in self.trees:
            tree.pids, waiting = set(), [tree.root]
            while waiting:
                pid = waiting.pop()
                tree.pids.add(pid)
                waiting += children.get(pid, [])

    def _sum_memory(self) -> None:
        for tree in self.trees:
            if tree.summed:
                tree.peak_together = max(tree.peak_together, sum(_memory(pid)[0] for pid in tree.pids))

    def _look(self) -> None:
        self._sum_memory()
        for tree in self.trees:
            for pid in tree.pids:
                peak = _memory(pid)[1]
                if pid == tree.root:
                    tree.peak_root = max(tree.peak_root, peak)
                else:
                    tree.peak_child = max(tree.peak_child, peak)
                if fields := _stat(pid):
                    self._cpu[pid] = (int(fields[11]) + int(fields[12])) / _TICKS

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


def allocated(directory: Path) -> int:
    """Bytes the disk holds for a directory's files, each file once however many names it has."""
    blocks: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                found = os.lstat(os.path.join(folder, name))  # noqa: PTH118 - called often
            except FileNotFoundError:
                continue
            blocks[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(blocks.values())


def resident(pid: int) -> int:
    """Resident bytes of one process now."""
    return _memory(pid)[0]


def cpu_seconds(pid: int) -> float:
    """User and system seconds of one process until now.

    Raises:
        ProcessLookupError: it is gone.
    """
    if not (fields := _stat(pid)):
        raise ProcessLookupError(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name (the state first); empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _memory(pid: int) -> tuple[int, int]:
    """Resident bytes now and at the most; zeros if the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    sizes = {
        key: int(rest.split()[0]) << 10 for key, _, rest in (line.partition(":") for line in lines) if "kB" in rest
    }
    return sizes.get("VmRSS", 0), sizes.get("VmHWM", 0)
