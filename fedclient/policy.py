"""What the site allows: which tasks it takes, and what may leave it. No I/O happens here.

Everything the server sends is checked here before a trainer sees it, and everything a
trainer says passes here before the server sees it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from fedclient.launch import Description, TrainerFailed
from fedclient.session import Offer, TaskFailure
from fedclient.settings import WorkloadSettings
from fedclient.spool import Order
from fedlink.errors import FedlinkError, Reason
from fedlink.settings_schema import Schema, check_settings, narrow, open_settings, parse_schema, parse_settings
from fedlink.tensors import UPDATE_DTYPES, Kind

MAX_METRICS = 64
"""Metrics a task may report."""
MAX_NAME = 64
"""Characters in the name of a metric or of an exception's class."""
MAX_MESSAGE = 2000
"""Characters of a failure's message that are sent."""


class Refused(Exception):  # noqa: N818 - an answer, not an error
    """The site does not take a task; the text says why."""


@dataclass(frozen=True)
class Terms:
    """The site's terms for one workload."""

    name: str
    settings: WorkloadSettings
    schema: Schema
    """What a run may set, after the site's limits."""
    abilities: tuple[str, ...]

    @classmethod
    def of(cls, name: str, settings: WorkloadSettings, description: Description) -> Terms:
        """The terms, from what site.toml says and what the trainer says of itself.

        Raises:
            FedlinkError: BAD_CONFIG: a limit on a setting that the trainer doesn't have, or that excludes everything.
        """
        limits = {key: (limit.min, limit.max) for key, limit in settings.limits.items()}
        try:
            schema = narrow(parse_schema(json.dumps(description.settings_schema)), limits)
        except FedlinkError as e:
            raise FedlinkError(Reason.BAD_CONFIG, f"[workload.{name}] {e.message}") from None
        return cls(name, settings, schema, description.abilities)

    @property
    def offer(self) -> Offer:
        """What the server is told."""
        return Offer(self.name, self.schema.to_json(), self.abilities, self.settings.runs)

    def accept(self, order: Order) -> dict[str, Any]:
        """The settings to train with.

        Raises:
            Refused: the site does not allow the task.
        """
        if not any(fnmatchcase(order.run, pattern) for pattern in self.settings.runs):
            raise Refused(f"this site does not let run {order.run} use workload {self.name}")
        needed = "gradient" if order.update is Kind.GRADIENT else order.activity
        if needed not in self.abilities:
            raise Refused(f"workload {self.name} of this site cannot do {needed!r}")
        if order.update and order.update_dtype not in UPDATE_DTYPES:
            raise Refused(f"this client cannot write updates in {order.update_dtype!r}")
        try:
            settings = parse_settings(order.settings_json)
        except FedlinkError as e:
            raise Refused(e.message) from None
        wrong = check_settings(self.schema, settings)
        if not_open := sorted(set(order.calibrate) - set(open_settings(self.schema, settings))):
            wrong.append(f"{', '.join(not_open)}: there is nothing to measure")
        if wrong:
            raise Refused(f"settings of workload {self.name}: {'; '.join(wrong)}"[:MAX_MESSAGE])
        return settings

    @property
    def limits(self) -> dict[str, tuple[float | None, float | None]]:
        """Least and greatest value of each numeric setting that has one."""
        bounded = {name: (known.minimum, known.maximum) for name, known in self.schema.properties.items()}
        return {name: bounds for name, bounds in bounded.items() if bounds != (None, None)}

    def let_out(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Those metrics that may leave the site: allowed by name, finite, not too many."""
        allowed = {k: float(v) for k, v in metrics.items() if self.allows_metric(k) and math.isfinite(v)}
        return dict(sorted(allowed.items())[:MAX_METRICS])

    def allows_metric(self, name: str) -> bool:
        """Whether a metric of this name may leave the site."""
        return 0 < len(name) <= MAX_NAME and any(fnmatchcase(name, p) for p in self.settings.metrics)

    def report(self, failure: TrainerFailed) -> TaskFailure:
        """What the server is told of a failure: nothing of the trainer's output unless the site shares it."""
        message = failure.message
        if self.settings.share_errors and failure.output:
            message = f"{message}: {failure.output}"
        return TaskFailure(
            failure.reason.value,
            message[:MAX_MESSAGE],
            exception_class=failure.exception_class[:MAX_NAME],
            exit_code=failure.exit_code,
            step=failure.step,
            memory_bytes=failure.memory_bytes,
            retryable=failure.retryable,
        )
