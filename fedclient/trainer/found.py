"""What a site has measured, kept for the next run of the same kind.

    DIRECTORY/found.json      the newest findings, at most `KEPT`
    DIRECTORY/attempts.json   a search for the largest batch that is under way: what a process that is killed leaves

A finding holds for one kind of training (workload, device, code, everything the run sets, the site's limits) from one
starting model on the same files, whatever the run is called. In a run it also holds for later versions of the model,
and whatever becomes of the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fedclient.trainer.state import State
from fedclient.trainer.wire import Write
from fedlink.tensors import Role

KEPT = 64
"""Findings that are kept of a workload."""
DEATHS = 2
"""How often a process has to end while a size is tried until that counts as too large: once may be a reboot."""
_ENTRY = {"run", "given", "kind", "passing", "model", "found"}
_FILE, _ATTEMPTS = "found.json", "attempts.json"


class CannotMeasureError(ValueError):
    """A setting cannot be measured at this site; the text says why and what to do, and quotes no data."""


@dataclass(frozen=True)
class Finding:
    """What a finding is for."""

    run: str
    names: tuple[str, ...]
    """The settings that are looked for."""
    given: str
    """What the run says of these and of every other setting that may be measured."""
    kind: str
    """Whatever else it depends on, besides the model, as text."""
    model: str
    """`fingerprint` of the weights that it was measured with."""
    passing: str = ""
    """What else it depends on that may change while a run is under way, as text: files, rounds, what the run asks."""

    @property
    def key(self) -> dict[str, str]:
        """As it is kept."""
        kind, passing = (hashlib.sha256(text.encode()).hexdigest() for text in (self.kind, self.passing))
        return {"run": self.run, "given": self.given, "kind": kind, "passing": passing, "model": self.model}


class Found:
    """The findings of one workload.

    Args:
        directory: the workload's own in the site's state; made when needed.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / _FILE

    def look(self, finding: Finding, *, by_run: bool) -> dict[str, float] | None:
        """What was found for it before, newest first.

        Args:
            finding: what for.
            by_run: whether what this run began with will do, whatever has become of its weights since, of settings
                that were measured with it, and of what is passing.
        """
        wanted = finding.key
        for entry in self._entries():
            same = {name for name, value in wanted.items() if entry[name] == value}
            fits = same >= {"kind", "given", "passing", "model"} or (by_run and same >= {"kind", "run"})
            if fits and set(finding.names) <= set(entry["found"]):
                found: dict[str, float] = {name: entry["found"][name] for name in finding.names}
                if same < set(wanted) and not by_run:
                    self.put(finding, found)
                return found
        return None

    def put(self, finding: Finding, found: Mapping[str, float]) -> None:
        """Keep what was found; a disk that refuses does no harm but another search."""
        key = finding.key
        others = [e for e in self._entries() if {name: e[name] for name in key} != key]
        with contextlib.suppress(OSError):
            write_table(self._path, [key | {"found": dict(found)}, *others][:KEPT])

    def lower(self, finding: Finding, name: str, most: float) -> bool:
        """Let a setting be no higher than `most` in all that was found for trainings of a kind; whether one was."""
        entries, kind = self._entries(), finding.key["kind"]
        high = [e["found"] for e in entries if e["kind"] == kind and e["found"].get(name, most) > most]
        for found in high:
            found[name] = most
        with contextlib.suppress(OSError):
            if high:
                write_table(self._path, entries)
                return True
        return False

    def _entries(self) -> list[dict[str, Any]]:
        entries = read_table(self._path)
        # What another release has written, or somebody by hand, may lack something: it is searched for again.
        return [e for e in entries if isinstance(e, dict) and e.keys() >= _ENTRY] if isinstance(entries, list) else []


class Attempts:
    """Sizes that were tried in a search that may be cut off by the process's end.

    Args:
        directory: as of `Found`; None: nothing outlasts the process.
        kind: what is searched for; what is there of another search is forgotten.
    """

    def __init__(self, directory: Path | None, kind: str) -> None:
        self._path = directory / _ATTEMPTS if directory else None
        self._kind = hashlib.sha256(kind.encode()).hexdigest()
        found = read_table(self._path) if self._path else None
        table = found if isinstance(found, dict) and found.get("kind") == self._kind else {}
        self.fits: int = table.get("fits", 0)
        """The largest size that is known to fit; 0 if none is."""
        self.fails: int = table.get("fails", 0)
        """The least that is known not to, or that `DEATHS` processes have ended with; 0 if none is."""
        self._begun: int = table.get("begun", 0)
        self._size: int = table.get("size", 0)
        if self._begun >= DEATHS:
            self.fails, self._begun = self._size, 0

    def trying(self, size: int) -> None:
        """Note a size before it is tried: if the process is killed for it, that is known the next time."""
        self._begun = self._begun + 1 if size == self._size else 1
        self._size = size
        self._write()

    def tried(self, size: int, *, fits: bool) -> None:
        """Note how it went."""
        self.fits, self.fails = (max(size, self.fits), self.fails) if fits else (self.fits, size)
        self._begun = 0
        self._write()

    def broken_off(self) -> None:
        """What was tried has ended by something else than its size: the process lives."""
        self._begun = 0
        self._write()

    def over(self) -> None:
        """The search has ended."""
        if self._path:
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        if self._path:
            table = {"fits": self.fits, "fails": self.fails, "size": self._size, "begun": self._begun}
            with contextlib.suppress(OSError):
                write_table(self._path, {"kind": self._kind} | table)


def fingerprint(state: State, alive: Callable[[], None]) -> str:
    """A digest of a model's tensors as they are now: names, dtypes, shapes, roles, and values of what is not frozen."""
    digest = hashlib.blake2b(digest_size=16)
    with state.at_rest():
        for spec in state.specs()[0]:
            alive()
            digest.update(f"{spec.name}/{spec.dtype}/{spec.shape}/{spec.role.value}\n".encode())
            if spec.role is not Role.FROZEN:
                for window in state.encoded(spec, Write.WEIGHTS, spec.dtype, _no_start, None):
                    digest.update(window)
    return digest.hexdigest()


def read_table(path: Path) -> Any:
    """What a file of JSON holds; None if there is none, or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def write_table(path: Path, table: Any) -> None:
    """Write a file of JSON whole or not at all.

    Raises:
        OSError: as the system says.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(table), encoding="utf-8")
    fresh.replace(path)


def _no_start(_first: int, _count: int) -> NoReturn:
    raise AssertionError("weights are written without a look at what they were")
