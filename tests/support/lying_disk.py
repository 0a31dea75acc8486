"""A disk that lies, for real processes: it forgets what was not synced, is full, or cannot be written.

`lying_disk.c` comes between a process and its C library, by LD_PRELOAD, and concerns itself
with the files below one directory. What is durable is meant in POSIX's strict sense: a
file's content as of its last fsync, a directory's entries (what was made, renamed, linked
or removed in it) as of the last fsync of that directory. So a file that was synced, in a
directory that was not, is gone after a power loss.
"""

from __future__ import annotations

import os
import platform
import random
import shutil
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.federation import Daemon, Federation

_PAGE = 4096
_FAULTS = ("full", "readonly")
_COUNTS = ("synced_files", "synced_dirs", "answered", "asked")
_FIELDS = ("full", "room", "readonly", *(f"{name}_fired" for name in _FAULTS), *_COUNTS)
_SOURCE = Path(__file__).with_suffix(".c")


def library(directory: Path) -> Path:
    """The library, built once a directory; skips the test where that cannot be."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or platform.libc_ver()[0] != "glibc":
        pytest.skip("a disk that lies needs a C compiler and glibc")
    built = directory / "lying_disk.so"
    if not built.exists():
        fresh = directory / f"lying_disk-{os.getpid()}.so"
        command = [compiler, "-std=gnu11", "-O2", "-shared", "-fPIC", "-o", str(fresh), str(_SOURCE), "-ldl"]
        subprocess.run(command, check=True, timeout=120)
        fresh.rename(built)
    return built


@dataclass(frozen=True)
class Lost:
    """What a power loss took."""

    files: int
    """Files that are not as they were."""
    entries: int
    """Entries of directories that are gone, or back."""


class LyingDisk:
    """The files below a directory, as processes see them that were started with `environment`.

    Args:
        root: the directory; made. What is in it now is durable.
        library: from `library`.
    """

    def __init__(self, root: Path, library: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root.resolve()
        self._state = self.root.with_name(self.root.name + ".lies")
        for name in ("files", "dirs", "graveyard", "answers"):
            (self._state / name).mkdir(parents=True)
        self._control = self._state / "control"
        self._control.write_bytes(bytes(8 * len(_FIELDS)))
        self._boots = 0
        self._boot()
        self._note(self.root)
        self.environment = {
            "LD_PRELOAD": str(library),
            "LYING_DISK_ROOT": str(self.root),
            "LYING_DISK_STATE": str(self._state),
        }

    # --- Faults

    def fill(self, room: int = 0) -> None:
        """From now on there is room for so many more bytes."""
        self._set("room", room)
        self._set("full", 1)

    def freeze(self) -> None:
        """From now on nothing can be written."""
        self._set("readonly", 1)

    def heal(self) -> None:
        """There is room, and everything can be written."""
        self._set("full", 0)
        self._set("readonly", 0)

    def fired(self, name: str) -> int:
        """How often something was refused ("full", "readonly"), noted, "answered", or room was "asked" for."""
        at = _FIELDS.index(name + "_fired" if name in _FAULTS else name)
        return int(struct.unpack_from("<q", self._control.read_bytes(), 8 * at)[0])

    def answer(self, name: str, text: str) -> None:
        """What processes read in place of /proc/sys/kernel/random/boot_id or /proc/self/mountinfo."""
        (self._state / "answers" / name).write_text(text)

    def lose_power(self, seed: int, survives: float = 0.0) -> Lost:
        """The directory becomes what is left after a power loss now; another boot follows. No process may use it.

        Args:
            seed: of what chance decides.
            survives: the share of what was not synced that had reached the disk by itself, whole or in part.
        """
        loss = _Loss(self.root, self._state, random.Random(seed), survives)
        after = self.root.with_name(self.root.name + ".after")
        loss.build(self.root.stat().st_ino, after)
        # Kept, not deleted: an inode number must not come again.
        self.root.rename(self._state / f"before-{self._boots}")
        after.rename(self.root)
        for name in ("files", "dirs"):
            shutil.rmtree(self._state / name)
            (self._state / name).mkdir()
        self._note(self.root)
        self._boot()
        return Lost(loss.files, loss.entries)

    # --- Parts

    def _set(self, name: str, value: int) -> None:
        with self._control.open("r+b") as f:
            f.seek(8 * _FIELDS.index(name))
            f.write(struct.pack("<q", value))

    def _boot(self) -> None:
        self._boots += 1
        self.answer("boot_id", f"boot {self._boots} of {self.root}\n")

    def _note(self, directory: Path) -> None:
        """Take everything below a directory for durable."""
        lines = []
        for entry in os.scandir(directory):
            kind = "d" if entry.is_dir(follow_symlinks=False) else "f" if entry.is_file(follow_symlinks=False) else "?"
            lines.append(f"{entry.inode()} {kind} {entry.name}\n")
            if kind == "d":
                self._note(Path(entry.path))
            elif kind == "f":
                shutil.copyfile(entry.path, self._state / "files" / str(entry.inode()))
        (self._state / "dirs" / str(directory.stat().st_ino)).write_text("".join(lines))


class OnDisks(Federation):
    """A federation some of whose processes have disks that lie.

    Attributes:
        disks: by "server" or the site's name; put in before that process is started.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.disks: dict[str, LyingDisk] = {}

    def _daemon(self, command: list[str], name: str, *rest: Any) -> Daemon:
        if name not in self.disks:
            return super()._daemon(command, name, *rest)
        daemon = _Preloaded(command, self.root / f"{name}.log", self.root, self.disks[name].environment)
        self.callback(daemon.clean)
        return daemon


class _Preloaded(Daemon):
    """A fresh process, whatever others are: only such a one loads a library before all others."""

    def __init__(self, command: list[str], log: Path, cwd: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        env = {**os.environ, **environment}
        with log.open("ab") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, cwd=cwd, env=env, start_new_session=True)


class _Loss:
    """Builds the tree that a power loss leaves."""

    def __init__(self, root: Path, state: Path, rng: random.Random, survives: float) -> None:
        self._state = state
        self._rng = rng
        self._survives = survives
        self._now = {p.lstat().st_ino: p for p in (*(state / "graveyard").iterdir(), root, *root.rglob("*"))}
        self._built: dict[int, Path] = {}
        self.files = 0
        self.entries = 0

    def build(self, inode: int, target: Path) -> None:
        self._built[inode] = target
        target.mkdir(mode=0o700)
        durable, now = self._entries_of(self._state / "dirs" / str(inode)), self._entries_now(inode)
        for name in sorted(durable.keys() | now.keys()):
            entry = durable.get(name)
            if entry != now.get(name):
                if self._rng.random() < self._survives:
                    entry = now.get(name)
                else:
                    self.entries += 1
            if entry is not None:
                self._place(*entry, target / name)

    def _place(self, inode: int, kind: str, target: Path) -> None:
        if kind == "d" and inode not in self._built:
            self.build(inode, target)
        elif kind == "f" and inode in self._built:
            target.hardlink_to(self._built[inode])
        elif kind == "f":
            self._built[inode] = target
            target.write_bytes(self._content(inode))
            target.chmod(0o600)

    def _content(self, inode: int) -> bytes:
        path, noted = self._now.get(inode), self._state / "files" / str(inode)
        now = path.read_bytes() if path is not None else b""
        durable = noted.read_bytes() if noted.exists() else bytes(self._rng.choice((0, len(now))))
        if durable == now or self._rng.random() < self._survives:
            return now
        self.files += 1
        if self._rng.random() < self._survives:
            size = self._rng.choice((len(now), len(durable)))
            pages = [(self._rng.choice((now, durable))[at : at + _PAGE]) for at in range(0, size, _PAGE)]
            return b"".join(p.ljust(_PAGE, b"\0") for p in pages)[:size]
        return durable

    def _entries_now(self, inode: int) -> dict[str, tuple[int, str]]:
        path = self._now.get(inode)
        if path is None or not path.is_dir():
            return {}
        return {e.name: (e.inode(), "d" if e.is_dir() else "f" if e.is_file() else "?") for e in os.scandir(path)}

    @staticmethod
    def _entries_of(record: Path) -> dict[str, tuple[int, str]]:
        if not record.exists():
            return {}
        parts = (line.split(" ", 2) for line in record.read_text().splitlines())
        return {name: (int(inode), kind) for inode, kind, name in parts}
