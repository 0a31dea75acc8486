"""What passes between the daemon and the trainer process; both ends import this file.

Newline-delimited JSON over a socket pair, one object a line. The daemon sends, in order:

    {"type": "start", "protocol": 2, ...Start}      once; answered by "ready" or "failed"
    {"type": "run", ...Job}                         answered by any number of "progress", then "done" or "failed"
    {"type": "shard", "name": NAME}                 a file of an `awaited` model is whole; each is told once
    {"type": "cancel"}                              at any time; ends the job under way: "failed", reason "cancelled"

and the trainer answers

    {"type": "ready", ...Description}
    {"type": "progress", ...Progress}
    {"type": "wrote", "name": NAME}                 a file of the update is whole, and not changed any more
    {"type": "done", ...Result}
    {"type": "failed", ...Failure}

At end-of-file the trainer exits at once.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

PROTOCOL = 2
"""Version of these messages; the trainer refuses to start under another."""
MAX_LINE = 4 << 20
"""Bytes in the longest line either end reads."""
MODEL_FILE = "model.json"
"""In a model directory, what is in it; see `fedclient.trainer.layout`."""

UPDATE_STEM = "update"
"""What the files of an update are called: `fedlink.tensors.shard_name` of this stem, one for each file that changes."""


class FailReason(enum.StrEnum):
    """Why a trainer gave no result; all but the last are `FailTaskRequest.Reason` in lower case."""

    EXCEPTION = "exception"
    CRASHED = "crashed"
    OUT_OF_MEMORY = "out_of_memory"
    STALLED = "stalled"
    BASE_MISMATCH = "base_mismatch"
    """The frozen base is not the run's. `Failure.text` is then of our making and may leave the site."""
    CANCELLED = "cancelled"


class JobKind(enum.StrEnum):
    """What a job does."""

    TRAIN = "train"
    """Train and write what `Job.write` says."""
    EVALUATE = "evaluate"
    """Measure."""
    INIT = "init"
    """Build the model from the seed, give it the values in `Job.model_dir` if that is set, and write it and what
    belongs beside it: the weights are the first file."""
    CALIBRATE = "calibrate"
    """Measure the settings that are "auto"."""
    DESCRIBE = "describe"
    """Say what there is to know of the data, for the site's own eyes."""


class Write(enum.StrEnum):
    """What a training job writes for each parameter; buffers are written as values."""

    DELTA = "delta"
    """y - x, in `Job.update_dtype`."""
    GRADIENT = "gradient"
    """The gradient of the mean loss over all local examples, in `Job.update_dtype`."""
    WEIGHTS = "weights"
    """y, in the model's own dtype."""


class _Message:
    """A dataclass that goes over the pipe."""

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {k: _plain(v) for k, v in asdict(self).items()}  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Self:
        """From a JSON object of the other end; keys this end doesn't know are ignored."""
        return cls(**{k: v for k, v in table.items() if k in cls.__dataclass_fields__})  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Start(_Message):
    """What a trainer process is for; nothing here changes during its life."""

    trainer: str
    """`module:Class`."""
    workload: str
    site: str
    directory: str
    """Where site.toml lies: searched first for the module, and the base of relative data paths."""
    data: Mapping[str, Any]
    """`[workload.NAME.data]`."""
    device: str
    """One of "cpu", "cuda:0", "mps", or "auto"."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What site.toml says for built-in workloads: `fedclient.settings.WorkloadSettings.options`."""
    kept: str = ""
    """A directory for what the class keeps between processes; not made yet."""


@dataclass(frozen=True)
class Device:
    """One accelerator, or the CPU."""

    name: str
    model: str = ""
    memory_bytes: int = 0


@dataclass(frozen=True)
class Description(_Message):
    """What a workload class offers."""

    settings_schema: Mapping[str, Any]
    """JSON schema in the closed subset of docs/protocol.md, before the site's limits."""
    abilities: tuple[str, ...]
    """Of "train", "gradient", "evaluate", "calibrate"."""
    devices: tuple[Device, ...]
    """The device `[devices]` resolves to for this trainer, first; then the others its Python sees."""

    def __post_init__(self) -> None:
        """Rebuild the typed values that JSON has no room for."""
        object.__setattr__(self, "abilities", tuple(self.abilities))
        devices = tuple(d if isinstance(d, Device) else Device(**d) for d in self.devices)
        object.__setattr__(self, "devices", devices)


@dataclass(frozen=True)
class Job(_Message):
    """One piece of work for a trainer."""

    kind: JobKind
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the run sets; the rest are the class's defaults."""
    seed: int = 0
    """The run's seed; what the trainer draws from is derived from it, `client`, `round` and `kind`."""
    client: str = ""
    run: str = ""
    round: int = 0
    version: int = 0
    model_dir: Path | None = None
    """Holds the model's shards and `MODEL_FILE`; not changed."""
    awaited: bool = False
    """Whether the shards come while the job is under way, each told by "shard"; else they are there."""
    model_key: str = ""
    """Names the model's content: evaluating it twice in a row loads it once. Empty: always load."""
    out_dir: Path | None = None
    """Where files are written; exists. A file of a name that is to be written is written over, whatever it holds."""
    write: Write = Write.DELTA
    update_dtype: str = "F32"
    """safetensors name of the dtype for deltas and gradients; F64 parameters travel as F64."""
    max_steps: int = 0
    """How many passes each loop over `Context.steps` makes at most: for a rehearsal, not for training. 0: no limit."""
    checkpoint_dir: Path | None = None
    """Where a training that writes no gradient keeps its checkpoint, and finds the one to go on from."""
    checkpoint_every: float = 0.0
    """Seconds between two checkpoints; 0: none is written, and none is looked for."""
    rounds: int = 0
    """Rounds of the whole run; 0: not known."""
    asked: Mapping[str, float] = field(default_factory=dict)
    """What the run asks of this site in a round, of `fedclient.trainer.share.Limits`; not for gradients."""
    share: Mapping[str, float] = field(default_factory=dict)
    """The same of what the site gives at most."""
    limits: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Least and greatest value of numeric settings at this site: where to look for those that are "auto"."""

    def __post_init__(self) -> None:
        """Rebuild the typed values that JSON has no room for."""
        object.__setattr__(self, "kind", JobKind(self.kind))
        object.__setattr__(self, "write", Write(self.write))
        for name in ("model_dir", "out_dir", "checkpoint_dir"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else Path(value))


@dataclass(frozen=True)
class Progress(_Message):
    """How far a job is."""

    step: int
    total: int
    """0 if the trainer has not said."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The last value of each metric logged so far."""
    memory_bytes: int = 0
    """Peak resident memory of the process."""
    note: str = ""
    """Something for the daemon's log: where the job went on from, why it writes no checkpoint."""


@dataclass(frozen=True)
class Result(_Message):
    """What a job gave."""

    num_examples: int
    steps: int
    metrics: Mapping[str, float]
    compute_seconds: float
    """Wall time of the user's code alone."""
    files: tuple[Path, ...] = ()
    """The files written into `Job.out_dir`, in the order of the model's shards."""
    memory_bytes: int = 0
    """Peak resident memory of the process."""
    device_memory_bytes: int = 0
    """Peak memory that torch took on accelerators; 0 without one."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What `Workload.describe_data` gave."""
    examples_seen: int = 0
    """Examples that the loops have handed out; 0: not known."""
    cut: str = ""
    """`Context.cut`."""
    found: Mapping[str, float] = field(default_factory=dict)
    """What a job to calibrate found, by setting."""

    def __post_init__(self) -> None:
        """Rebuild the typed values that JSON has no room for."""
        object.__setattr__(self, "files", tuple(Path(f) for f in self.files))


@dataclass(frozen=True)
class Failure(_Message):
    """Why a job, or the start, gave nothing."""

    reason: FailReason
    exception_class: str = ""
    step: int = 0
    memory_bytes: int = 0
    text: str = ""
    """The exception's message; may quote the site's data, so it leaves the site only where that is allowed."""
    exit_code: int = 0
    """Of one of several processes that ended, negative for a signal; else 0. `text` is then of our making."""

    def __post_init__(self) -> None:
        """Rebuild the typed values that JSON has no room for."""
        object.__setattr__(self, "reason", FailReason(self.reason))


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value
