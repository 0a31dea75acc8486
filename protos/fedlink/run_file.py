"""The run file: everything that defines a run, in one TOML file (docs/run-file.md).

`fedserver run create` sends it to the server; `fedclient train-local` reads the same file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from fedlink.config import Config, Name, Seconds
from fedlink.work import RunWork

if TYPE_CHECKING:
    from fedlink.tensors import Kind

MAX_JSON_BYTES = 64 << 10
"""Bytes in the largest JSON text that travels (settings, run files)."""
MAX_ROUNDS = 1_000_000
"""Rounds in the longest run."""
WIRE_DTYPES: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""`update_dtype` as written in a run file, and its safetensors name."""


class Cohort(Config):
    """Which sites take part in a round, and when it closes."""

    select: Literal["all", "count", "fraction"] = "all"
    """All eligible connected sites, a number of them, or a fraction (rounded up), drawn from the run's seed."""
    count: int | None = Field(None, ge=1)
    fraction: float | None = Field(None, gt=0, le=1)
    min_clients: int = Field(2, ge=1)
    """Eligible connected sites needed before a round starts."""
    target: int | None = Field(None, ge=1)
    """Close the round when so many updates are accepted; by default, when nobody is waited for any more."""
    quorum: int | None = Field(None, ge=1)
    """The least number of updates a round may be committed with; by default `min_clients`."""
    deadline: Seconds | None = Field(None, gt=0)
    """Seconds after which a round with a quorum closes, and one without fails and is tried again."""
    start_deadline: Seconds | None = Field(None, gt=0)
    """Seconds a round may wait for enough sites; then the run fails. By default it waits for ever."""
    task_retries: int = Field(2, ge=0, le=100)
    """Further attempts a site gets in one round after a failure that may pass."""
    round_attempts: int = Field(3, ge=1, le=1000)
    """How often a round is tried before the run fails."""

    @property
    def least(self) -> int:
        """The quorum in force."""
        return self.quorum or self.min_clients

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for mode in ("count", "fraction"):
            if (self.select == mode) != (getattr(self, mode) is not None):
                raise ValueError(f"select = {mode!r} and the key {mode!r} go together")
        ceiling = min(n for n in (self.target, self.count, 1 << 30) if n is not None)
        if self.least > ceiling:
            raise ValueError(
                f"quorum {self.least} is above target or count {ceiling}: no round could ever be committed"
            )
        return self


class Calibration(Config):
    """Measuring the settings that a run gives as "auto", before its first round."""

    own: tuple[str, ...] = Field(("batch_size",), max_length=64)
    """Settings that each site trains with its own value of; of all others the sites' median goes for all."""
    deadline: Seconds = Field(1800.0, gt=0)
    """Seconds the first round waits at most for what sites measure."""


class ServerOptimizer(Config):
    """How the reduced update moves the model."""

    learning_rate: float = Field(1.0, gt=0)
    """Delta strategies: x + rate * mean delta. Gradient strategies: x - rate * mean gradient."""


class Evaluation(Config):
    """Federated evaluation after each version."""

    enabled: bool = True
    metric: str = Field("accuracy", max_length=64)
    """The metric that marks the best version."""
    goal: Literal["max", "min"] = "max"
    deadline: Seconds = Field(600.0, gt=0)
    """Seconds the end of the run waits for the evaluation of the last version."""


class Stop(Config):
    """Ends a run before its last round."""

    target: float
    """End when the evaluation metric reaches this value."""


class Retention(Config):
    """What stays on the server's disk."""

    keep_versions: int = Field(2, ge=1)
    """The newest versions to keep; the best one is kept besides."""
    keep_updates: bool = False
    """Keep the clients' updates after their round is committed."""


class RunSpec(Config):
    """A run file."""

    name: Name | None = None
    """By default the workload and the time of creation."""
    workload: Name
    rounds: int = Field(ge=1, le=MAX_ROUNDS)
    model: str = Field("", max_length=140)
    """The starting model: an imported model's NAME, RUN@VERSION or RUN."""
    seed: int = Field(0, ge=0, lt=1 << 63)
    strategy: Literal["fedavg", "fedsgd"] = "fedavg"
    update_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    settings: Mapping[str, Any] = Field(default_factory=dict)
    """What the trainer reads; checked against the schema of each site's workload."""
    work: RunWork = RunWork()
    cohort: Cohort = Cohort()
    calibration: Calibration = Calibration()
    server_optimizer: ServerOptimizer = ServerOptimizer()
    evaluation: Evaluation = Evaluation()
    stop: Stop | None = None
    retention: Retention = Retention()

    @property
    def update_kind(self) -> Kind:
        """What clients send."""
        # Numpy comes with it, and would take half of the time in which a command starts.
        from fedlink.tensors import Kind  # noqa: PLC0415

        return Kind.GRADIENT if self.strategy == "fedsgd" else Kind.DELTA

    @field_validator("settings")
    @classmethod
    def _plain(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        for key, item in value.items():
            items = item if isinstance(item, list) else [item]
            if not all(isinstance(v, bool | int | float | str) for v in items):
                raise ValueError(f"{key}: settings are numbers, texts, booleans or lists of them")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.strategy == "fedsgd" and "learning_rate" not in self.server_optimizer.model_fields_set:
            raise ValueError('strategy = "fedsgd" needs [server_optimizer] learning_rate')
        if self.strategy == "fedsgd" and self.work != RunWork():
            raise ValueError('[work] is for strategy = "fedavg": a gradient is of all examples')
        if self.stop and not self.evaluation.enabled:
            raise ValueError("[stop] needs evaluation")
        return self
