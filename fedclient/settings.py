"""site.toml: what this site offers, to whom, and what may leave it (docs/site-file.md)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from fedlink.config import Bytes, Config, Name, Seconds, load_toml

DEFAULT_SERVER = "127.0.0.1:8470"
"""Where `fedserver serve` listens by default."""


class Limit(Config):
    """Bounds the site puts on one setting of a workload."""

    min: float | None = None
    max: float | None = None


class WorkloadSettings(Config):
    """`[workload.NAME]`: one thing this site is ready to train."""

    trainer: str = Field(pattern=r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
    """`module:Class`, looked up beside site.toml, then among the installed packages of `python`."""
    python: Path | None = None
    """The interpreter that trains; by default the one that runs the daemon."""
    data: Mapping[str, Any] = Field(default_factory=dict)
    """`[workload.NAME.data]`: free-form, for the class only; never leaves the site."""
    limits: Mapping[str, Limit] = Field(default_factory=dict)
    """`[workload.NAME.limits]`: bounds on numeric settings; a run beyond them is refused."""
    runs: tuple[str, ...] = ("*",)
    """Shell patterns of the run names that may use this workload."""
    metrics: tuple[str, ...] = ("loss", "accuracy")
    """Shell patterns of the metrics that may leave the site."""
    share_errors: bool = False
    """Send the trainer's error message and the end of its output along with a failure."""
    stall_after: Seconds = Field(600.0, gt=0)
    """Kill and report a trainer that makes no progress for so long."""
    keep_warm: Seconds = Field(300.0, ge=0)
    """Let an idle trainer process go after so long."""


class SiteSettings(Config):
    """A site.toml."""

    name: Name
    """The site's name at the server."""
    server: str = DEFAULT_SERVER
    """Address of the server, HOST:PORT."""
    token_file: Path | None = None
    """File that holds the token `fedserver client add` printed; not readable for others."""
    state_dir: Path = Path("fedclient-state")
    """Journal, cache and unsent updates; locked by the daemon."""
    cache_limit: Bytes = Field(50 << 30, ge=0)
    """Bytes of downloaded model files to keep."""
    devices: tuple[str, ...] = ("auto",)
    """Devices to train on, one task each: "cpu", "cuda:0", "mps" or "auto" (the best one there is)."""
    workload: Mapping[Name, WorkloadSettings] = Field(min_length=1)
    directory: Path = Path()
    """Where site.toml lies; set by `load_site`."""

    @field_validator("server")
    @classmethod
    def _address(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"{value!r} is not HOST:PORT")
        return value

    @model_validator(mode="after")
    def _devices_differ(self) -> Self:
        if not self.devices or len(set(self.devices)) != len(self.devices):
            raise ValueError("devices: name at least one, each once")
        return self

    def interpreter(self, workload: str) -> Path:
        """The Python that trains a workload."""
        python = self.workload[workload].python
        return self.directory / python if python else Path(sys.executable)


def load_site(path: Path) -> SiteSettings:
    """Read a site.toml; relative paths in it are relative to it.

    Raises:
        FedlinkError: BAD_CONFIG, naming the key.
    """
    directory = path.resolve().parent
    table = {k: v for k, v in load_toml(path).items() if k != "directory"}
    site = SiteSettings.checked(table, str(path))
    token = directory / site.token_file if site.token_file else None
    return site.model_copy(
        update={"directory": directory, "state_dir": directory / site.state_dir, "token_file": token}
    )
