"""Rows of the tables as frozen values, so that nothing above the store handles SQL objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self

from sqlalchemy import Row

from fedlink.blobs import BlobRef
from fedlink.run_file import RunSpec


@dataclass(frozen=True)
class _Record:
    @classmethod
    def of(cls, row: Row[Any]) -> Self:
        """The value of a row that has at least this record's columns."""
        found = row._mapping  # noqa: SLF001 - SQLAlchemy's public name for it
        return cls(**{f.name: found[f.name] for f in fields(cls)})


@dataclass(frozen=True)
class ClientRow(_Record):
    """A site."""

    name: str
    token_hash: bytes | None
    revoked: bool
    session: bytes | None
    replaced_session: bytes | None
    instance_id: bytes | None
    registration: bytes | None
    last_seen: float | None
    present: bool
    created: float


@dataclass(frozen=True)
class ModelRow(_Record):
    """An imported model."""

    id: int
    name: str
    digest: bytes
    manifest_size: int
    size: int
    tensors: int
    created: float

    @property
    def manifest(self) -> BlobRef:
        """Its manifest."""
        return BlobRef(self.digest, self.manifest_size)


@dataclass(frozen=True)
class RunRow(_Record):
    """A run."""

    id: int
    name: str
    spec: str
    state: str
    rounds: int
    version: int
    best_version: int | None
    best_value: float | None
    reason: str
    prediction: str | None
    created: float
    ended: float | None
    calibration: str | None

    @cached_property
    def parsed(self) -> RunSpec:
        """Its run file, with the numbers that were measured for all sites in place of "auto"."""
        spec = RunSpec.model_validate_json(self.spec)
        measured = json.loads(self.calibration)["settings"] if self.calibration else {}
        return spec.model_copy(update={"settings": {**spec.settings, **measured}}) if measured else spec


@dataclass(frozen=True)
class VersionRow(_Record):
    """A version of a run's model."""

    run_id: int
    number: int
    digest: bytes
    manifest_size: int
    size: int
    tensors: int
    master_digest: bytes | None
    metrics: str
    evaluated: bool
    kept: bool
    pinned: bool
    created: float

    @property
    def manifest(self) -> BlobRef:
        """Its manifest."""
        return BlobRef(self.digest, self.manifest_size)

    @property
    def means(self) -> dict[str, float]:
        """Its metrics."""
        values: dict[str, float] = json.loads(self.metrics)
        return values


@dataclass(frozen=True)
class RoundRow(_Record):
    """One attempt at a round."""

    run_id: int
    number: int
    attempt: int
    phase: str
    deadline_at: float | None
    reason: str
    used: str | None
    opened: float
    closed: float | None


@dataclass(frozen=True)
class TaskRow(_Record):
    """A task and its fate."""

    id: int
    token: bytes
    run_id: int
    kind: str
    round: int
    round_attempt: int
    version: int
    client: str
    attempt: int
    state: str
    reason: str
    message: str
    tensor: str
    update_digest: bytes | None
    num_examples: int
    steps: int
    compute_seconds: float
    given_steps: int | None
    examples_seen: int
    cut: str
    metrics: str
    bytes_down: int
    bytes_up: int
    issued: float
    ended: float | None

    @property
    def values(self) -> Mapping[str, float]:
        """The metrics that the site let out."""
        out: dict[str, float] = json.loads(self.metrics)
        return out


@dataclass(frozen=True)
class SpeedRow(_Record):
    """How fast a site trains a workload."""

    client: str
    workload: str
    samples: str

    @property
    def values(self) -> list[tuple[int, float, float]]:
        """The run's id, steps a second and examples a second of its last trainings, newest last."""
        return [(int(run), float(steps), float(examples)) for run, steps, examples in json.loads(self.samples)]


@dataclass(frozen=True)
class UploadRow(_Record):
    """Bytes that somebody sends or sent."""

    id: bytes
    task_id: int | None
    import_id: bytes | None
    client: str
    digest: bytes
    size: int
    created: float


@dataclass(frozen=True)
class EventRow(_Record):
    """Something that happened in a run."""

    sequence: int
    run_id: int
    time: float
    kind: str
    data: str
