"""What must hold after any case, looked up in the server's own files without any of its code.

The database is read with sqlite3, manifests with the generated messages, safetensors files by
their published layout; the average is computed anew in float64.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedlink.v1 import types_pb2
from tests.fault.start import Arrays

BLOCK = 8
"""Rows averaged at a time."""
DTYPES = {"F32": np.float32, "I64": np.int64}
"""Those of the model under test."""
SHORT = 8
"""Hexadecimal digits by which a daemon's log names a task."""


@dataclass
class Findings:
    """What a case has lost, counted; all zeros and True is how it must be."""

    updates_lost: int = 0
    updates_double_counted: int = 0
    versions_lost: int = 0
    bit_identical: bool = True
    remarks: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Nothing was lost, nothing counted twice, every bit as it must be."""
        return not (self.updates_lost or self.updates_double_counted or self.versions_lost) and self.bit_identical


@dataclass(frozen=True)
class Update:
    """An accepted update as the record has it."""

    token: str
    client: str
    round: int
    examples: int
    directory: Mapping[str, Path]
    """Digest in hexadecimal digits to the spooled file."""
    manifest: str


class Record:
    """A server's data directory, when no server runs on it."""

    def __init__(self, data_dir: Path, run: str) -> None:
        self._blobs, self._spool = data_dir / "blobs", data_dir / "spool"
        self._db = sqlite3.connect(f"file:{data_dir / 'fedserver.db'}?mode=ro", uri=True)
        self._run, spec = self._one("SELECT id, spec FROM runs WHERE name = ?", run)
        self.keeps_updates = bool(json.loads(spec)["retention"]["keep_updates"])

    def close(self) -> None:
        self._db.close()

    def versions(self) -> dict[int, str]:
        """The manifest of every version that is kept."""
        return {n: d.hex() for n, d in self._all("SELECT number, digest FROM versions WHERE run_id = ? AND kept")}

    def committed(self) -> dict[int, dict[str, int]]:
        """By version, the sites and examples that the event of its commit names; a version has one such event."""
        rows = self._all("SELECT data FROM events WHERE run_id = ? AND kind = 'round_committed' ORDER BY sequence")
        events = [json.loads(data) for (data,) in rows]
        found = {e["version"]: e["clients"] for e in events}
        assert len(found) == len(events), "a version was committed twice"
        return found

    def accepted_tokens(self) -> list[str]:
        """The token of every accepted training task."""
        rows = self._all("SELECT token FROM tasks WHERE run_id = ? AND kind = 'train' AND state = 'accepted'")
        return [token.hex() for (token,) in rows]

    def updates(self, version: int) -> list[Update]:
        """The accepted updates of the attempt that became a version."""
        (attempt,) = self._one(
            "SELECT attempt FROM rounds WHERE run_id = ? AND number = ? AND phase = 'committed'", self._run, version
        )
        rows = self._db.execute(
            "SELECT id, token, client, round, num_examples, update_digest FROM tasks WHERE run_id = ? AND round = ? "
            "AND round_attempt = ? AND kind = 'train' AND state = 'accepted'",
            (self._run, version, attempt),
        ).fetchall()
        return [Update(r[1].hex(), r[2], r[3], r[4], self._files(r[0]), r[5].hex()) for r in rows]

    def defects(self) -> list[str]:
        """Why rounds failed by the server's own fault; nothing that a case does is one."""
        rows = self._all("SELECT reason FROM rounds WHERE run_id = ? AND phase = 'failed'")
        return [reason for (reason,) in rows if "an error in the server" in reason]

    def open_tasks(self) -> int:
        """Tasks that nobody will ever end, if the run has ended."""
        return len(self._all("SELECT id FROM tasks WHERE run_id = ? AND ended IS NULL"))

    def blob(self, digest: str) -> Path:
        return self._blobs / digest[:2] / digest

    def _files(self, task: int) -> dict[str, Path]:
        rows = self._db.execute("SELECT digest, id FROM uploads WHERE task_id = ?", (task,)).fetchall()
        return {digest.hex(): self._spool / upload.hex() / "data" for digest, upload in rows}

    def _all(self, query: str) -> list[tuple]:
        return self._db.execute(query, (self._run,)).fetchall()

    def _one(self, query: str, *values: object) -> tuple:
        return self._db.execute(query, values).fetchone()


def examine(
    data_dir: Path,
    run: str,
    *,
    acknowledged: Sequence[str],
    seen: int,
    whole: Sequence[Arrays],
    sites: Iterable[str],
) -> Findings:
    """Compare a data directory with what was said to the outside.

    Args:
        data_dir: no server runs on it.
        run: its name.
        acknowledged: the short names of training tasks whose update a daemon was told is accepted.
        seen: the newest version that an operator was shown.
        whole: the versions of a run in which every site takes part in every round.
        sites: all of them.
    """
    found = Findings()
    record = Record(data_dir, run)
    try:
        _examine_tasks(record, acknowledged, found)
        committed, kept = record.committed(), record.versions()
        newest = max(committed, default=0)
        if newest < seen or sorted(committed) != list(range(1, newest + 1)) or newest not in kept:
            found.versions_lost += 1
            found.remarks.append(f"version {seen} was shown; committed {sorted(committed)}, kept {sorted(kept)}")
        everybody = set(sites)
        as_undisturbed = True
        for version in sorted(kept):
            as_undisturbed = as_undisturbed and (version == 0 or set(committed[version]) == everybody)
            _examine_version(record, version, kept, committed, whole[version] if as_undisturbed else None, found)
    finally:
        record.close()
    return found


def _examine_tasks(record: Record, acknowledged: Sequence[str], found: Findings) -> None:
    accepted = Counter(token[:SHORT] for token in record.accepted_tokens())
    for name in set(acknowledged):
        if not accepted[name]:
            found.updates_lost += 1
            found.remarks.append(f"task {name} was acknowledged and is not in the record")
    found.remarks += record.defects()
    if left := record.open_tasks():
        found.remarks.append(f"{left} tasks are open although the run has ended")


def _examine_version(
    record: Record,
    version: int,
    kept: Mapping[int, str],
    committed: Mapping[int, Mapping[str, int]],
    whole: Arrays | None,
    found: Findings,
) -> None:
    try:
        arrays = _load(record.blob(kept[version]), record.blob)
    except FileNotFoundError as e:
        found.versions_lost += 1
        found.remarks.append(f"version {version}: {e}")
        return
    if whole is not None:
        _same(arrays, whole, f"version {version} is not that of the undisturbed run", found)
    if version == 0:
        return
    updates = record.updates(version)
    counted = Counter(u.client for u in updates)
    if any(n > 1 for n in counted.values()):
        found.updates_double_counted += sum(n - 1 for n in counted.values())
        found.remarks.append(f"round {version} has several updates of one site: {dict(counted)}")
    if {u.client: u.examples for u in updates} != dict(committed[version]):
        found.updates_lost += 1
        found.remarks.append(f"version {version} was made of {dict(committed[version])}, the record lists {counted}")
    if record.keeps_updates:
        if not updates or version - 1 not in kept:
            found.updates_lost += 1
            found.remarks.append(f"version {version} cannot be made anew: {len(updates)} updates, kept {sorted(kept)}")
            return
        if gone := [u.client for u in updates if not all(path.exists() for path in u.directory.values())]:
            found.updates_lost += len(gone)
            found.remarks.append(f"the updates of {', '.join(gone)} in round {version} are gone")
            return
        base = _load(record.blob(kept[version - 1]), record.blob)
        _same(arrays, _refold(base, updates), f"version {version} is not the average of its updates", found)


def _refold(base: Arrays, updates: Sequence[Update]) -> Arrays:
    """x + the weighted mean of the deltas, in float64, rounded once; buffers from the site with most examples."""
    ordered = sorted(updates, key=lambda u: u.client)
    loaded = [_load(u.directory[u.manifest], u.directory.__getitem__) for u in ordered]
    donor = max(range(len(ordered)), key=lambda i: (ordered[i].examples, -i))
    result = {}
    for name, x in base.items():
        deltas = [arrays[name] for arrays in loaded]
        result[name] = _mean_added(x, deltas, [u.examples for u in ordered]) if x.ndim == 2 else deltas[donor]
    return result


def _mean_added(x: np.ndarray, deltas: Sequence[np.ndarray], examples: Sequence[int]) -> np.ndarray:
    """A few rows at a time, which stay in the processor's cache."""
    result = np.empty_like(x)
    for at in range(0, len(x), BLOCK):
        rows = slice(at, at + BLOCK)
        total = np.zeros(x[rows].shape)
        for delta, n in zip(deltas, examples, strict=True):
            total += n * delta[rows].astype(np.float64)
        result[rows] = x[rows] + total / sum(examples)
    return result


def _load(manifest: Path, path_of) -> Arrays:
    message = types_pb2.Manifest.FromString(manifest.read_bytes())
    arrays: Arrays = {}
    for file in message.files:
        arrays |= _mapped(path_of(file.blob.digest.hex()))
    assert set(arrays) == {t.name for t in message.tensors}
    return arrays


def _mapped(path: Path) -> Arrays:
    """A safetensors file without a copy: the size of a JSON header, the header, the bytes it points into."""
    data = np.memmap(path, np.uint8, "r").view(np.ndarray)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    return {
        name: data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        .view(DTYPES[entry["dtype"]])
        .reshape(entry["shape"])
        for name, entry in header.items()
    }


def _same(arrays: Arrays, expected: Arrays, remark: str, found: Findings) -> None:
    wrong = [n for n in expected if n not in arrays or not _same_bits(arrays[n], expected[n])]
    if wrong or set(arrays) != set(expected):
        found.bit_identical = False
        found.remarks.append(f"{remark}: {', '.join(wrong) or 'other tensors'}")


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.view(np.uint8), b.view(np.uint8))
