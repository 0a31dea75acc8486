"""site.toml: what this site offers, to whom, and what may leave it (docs/site-file.md)."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from fedclient.text_settings import LoraSettings, ParameterSettings, PrecisionSettings, check_data
from fedclient.trainer.options import BUILT_IN, SCRIPT_SUFFIX
from fedlink.config import Bytes, Config, Name, Seconds, load_toml
from fedlink.errors import FedlinkError, Reason
from fedlink.route import Route, check_proxy, is_loopback, route_to
from fedlink.tls import ClientTls
from fedlink.transfer import STALL
from fedlink.work import WorkLimits

DEFAULT_SERVER = "127.0.0.1:8470"
"""Where `fedserver serve` listens by default."""

_CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Limit(Config):
    """Bounds the site puts on one setting of a workload."""

    min: float | None = None
    max: float | None = None


class DistributedSettings(Config):
    """`[workload.NAME.distributed]`: train with several processes, through torch's own launcher."""

    processes: int | Literal["auto"] = Field("auto", ge=1, le=1024)
    """On each machine; "auto": one for each GPU, or one."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """A whole model in each process, or a share of it."""
    nodes: int = Field(1, ge=1, le=4096)
    """Machines; on the others `fedclient join` is to run."""
    rendezvous: str = Field("", pattern=r"^([A-Za-z0-9._-]+:\d{1,5})?$")
    """HOST:PORT of this machine, where the others find it."""

    @model_validator(mode="after")
    def _nodes(self) -> Self:
        if (self.nodes > 1) != bool(self.rendezvous):
            raise ValueError("nodes and rendezvous belong together: HOST:PORT of this machine, for the other ones")
        return self

    @property
    def alone(self) -> bool:
        """Whether one process trains, as without this table."""
        return self.processes == 1 and self.nodes == 1 and self.strategy == "ddp"

    @property
    def may_be_alone(self) -> bool:
        """Whether one process may train, where the device is one for no more."""
        return self.processes in (1, "auto") and self.nodes == 1 and self.strategy == "ddp"


class WorkloadSettings(Config):
    """`[workload.NAME]`: one thing this site is ready to train."""

    trainer: str
    """`module:Class`, looked up beside site.toml, then among the installed packages of `python`; a built-in one; or a
    script's path."""
    args: tuple[str, ...] = ()
    """A script's arguments."""
    model: str = ""
    """Directory of the pretrained model, in Hugging Face layout; for the built-in workloads."""
    trust_remote_code: bool = False
    """Execute Python files that lie in `model`, if its config.json asks for it."""
    python: Path | None = None
    """The interpreter that trains; by default the one that runs the daemon."""
    data: Mapping[str, Any] = Field(default_factory=dict)
    """`[workload.NAME.data]`: free-form, for the class only; never leaves the site. A built-in one's is checked."""
    lora: LoraSettings | None = None
    """`[workload.NAME.lora]`: train low-rank adapters instead of the model itself."""
    parameters: ParameterSettings | None = None
    """`[workload.NAME.parameters]`: which parameters of a full model train."""
    precision: PrecisionSettings | None = None
    """`[workload.NAME.precision]`: what is computed and held in which dtype."""
    distributed: DistributedSettings | None = None
    """`[workload.NAME.distributed]`: train with several processes."""
    share: WorkLimits = WorkLimits()
    """`[workload.NAME.share]`: what this site does in a round at most."""
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
    checkpoint_every: Seconds = Field(300.0, ge=0)
    """Write so often down how far a training is, for one that is interrupted; 0: never."""

    @field_validator("trainer")
    @classmethod
    def _class(cls, value: str) -> str:
        if value not in BUILT_IN and not _CLASS.fullmatch(value) and not value.endswith(SCRIPT_SUFFIX):
            raise ValueError(
                f"{value[:80]!r} is neither module:Class nor one of {', '.join(BUILT_IN)}, nor a script's path with .py"
            )
        return value

    @model_validator(mode="after")
    def _script(self) -> Self:
        unread = {"model", "trust_remote_code", "data", "lora", "parameters", "precision"} & self.model_fields_set
        if self.script and unread:
            raise ValueError(f"a script does not read {min(unread)}: give it what it takes by args")
        if self.args and not self.script:
            raise ValueError("args are for a script: trainer names none")
        if self.script and self.distributed and not self.distributed.alone:
            raise ValueError(
                "[distributed] is not for a script, which trains by itself in one process: leave the table out, or "
                "make a class of it"
            )
        return self

    @model_validator(mode="after")
    def _built_in(self) -> Self:
        if self.built_in and not self.model:
            raise ValueError(f"trainer = {self.trainer!r} needs model, the directory of a pretrained model")
        if self.built_in and not self.data:
            raise ValueError(f"trainer = {self.trainer!r} needs a table data with train, the file to learn from")
        if self.lora and self.parameters:
            raise ValueError("[lora] and [parameters] contradict each other: with adapters nothing else is trained")
        if self.precision and self.precision.quantize != "none" and not self.lora:
            raise ValueError(
                "[precision] quantize is for [lora]: quantized weights cannot be trained, adapters on them can"
            )
        return self

    @model_validator(mode="after")
    def _one_process(self) -> Self:
        if self.precision and self.distributed and not self.distributed.alone:
            if self.precision.compile:
                raise ValueError("[precision] compile is for one process: leave it or [distributed] out")
            if self.precision.quantize != "none" and self.distributed.strategy == "fsdp":
                raise ValueError('[precision] quantize: a quantized base is not shared out; say strategy = "ddp"')
        return self

    @field_validator("data")
    @classmethod
    def _data(cls, value: Mapping[str, Any], info: ValidationInfo) -> Mapping[str, Any]:
        return check_data(info.data.get("trainer", ""), value)

    @property
    def built_in(self) -> bool:
        """Whether it needs no code of the site's."""
        return self.trainer in BUILT_IN

    @property
    def script(self) -> bool:
        """Whether it is a script, and no class."""
        return self.trainer.endswith(SCRIPT_SUFFIX)

    @property
    def options(self) -> dict[str, Any]:
        """What a class, or a script, is told besides its data table: only what is set."""
        names = {"args", "model", "trust_remote_code", "lora", "parameters", "precision"}
        return self.model_dump(mode="json", include=names, exclude_unset=True)


class TlsSettings(Config):
    """`[tls]`: how this site and the server know each other; files in PEM."""

    ca: Path | None = None
    """Certificates of the CAs that the server's certificate may come from; by default what this machine trusts."""
    certificate: Path | None = None
    """This site's certificate, if the server wants one; its common name is the site's name."""
    key: Path | None = None
    """The certificate's private key; not readable for everybody."""
    server_name: str = ""
    """The name in the server's certificate, if it is not the host in `server`."""

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: give both or none")
        return self


class SiteSettings(Config):
    """A site.toml."""

    name: Name
    """The site's name at the server."""
    server: str = DEFAULT_SERVER
    """Address of the server, HOST:PORT."""
    insecure: bool = False
    """Talk to another address than loopback without TLS: everybody on the way can read and change everything."""
    proxy: str | None = None
    """HTTP proxy to go through, `http://[USER:PASSWORD@]HOST:PORT`, or `none`; by default the environment's."""
    tls: TlsSettings | None = None
    """`[tls]`; without it, TLS is used all the same unless the server is on loopback or `insecure` is set."""
    token_file: Path | None = None
    """File that holds the token `fedserver client add` printed; not readable for others."""
    state_dir: Path = Path("fedclient-state")
    """Journal, cache and unsent updates; locked by the daemon."""
    cache_limit: Bytes = Field(50 << 30, ge=0)
    """Bytes of downloaded model files to keep."""
    transfer_stall_after: Seconds = Field(STALL, gt=0)
    """Give a transfer's call up, and continue it in a new one, if not even one MiB moves for so long."""
    devices: tuple[str, ...] = ("auto",)
    """Devices to train on, one task each: "cpu", "cuda:0", "mps" or "auto" (the best one there is)."""
    workload: Mapping[Name, WorkloadSettings] = Field(min_length=1)
    directory: Path = Path()
    """Where site.toml lies; set by `load_site`."""

    @field_validator("server")
    @classmethod
    def _address(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"{value!r} is not HOST:PORT")
        return value

    @field_validator("proxy")
    @classmethod
    def _proxy(cls, value: str | None) -> str | None:
        return None if value is None else check_proxy(value)

    @model_validator(mode="after")
    def _tls_or_not(self) -> Self:
        if self.insecure and self.tls:
            raise ValueError("insecure = true and [tls] contradict each other; take one out")
        return self

    @model_validator(mode="after")
    def _devices_differ(self) -> Self:
        if not self.devices or len(set(self.devices)) != len(self.devices):
            raise ValueError("devices: name at least one, each once")
        return self

    @model_validator(mode="after")
    def _devices_of_several(self) -> Self:
        several = [name for name, w in self.workload.items() if w.distributed and not w.distributed.alone]
        if several and any(":" in device for device in self.devices):
            raise ValueError(
                f'devices: [workload.{several[0]}.distributed] gives each process a GPU of its own: say "auto", '
                "and choose among GPUs by CUDA_VISIBLE_DEVICES"
            )
        shared = [n for n, w in self.workload.items() if w.distributed and not w.distributed.may_be_alone]
        if shared and "mps" in self.devices:
            raise ValueError(
                f'devices: [workload.{shared[0]}.distributed] trains with several processes, and "mps" is for one '
                'alone: say devices = ["cpu"], or leave the table out'
            )
        return self

    @property
    def route(self) -> Route:
        """The way to the server."""
        return route_to(self.server, self.proxy)

    @property
    def client_tls(self) -> ClientTls | None:
        """What goes into a handshake; None if the connection is not to be encrypted."""
        if self.tls is None:
            return None if self.insecure or is_loopback(self.server) else ClientTls()
        return ClientTls(self.tls.ca, self.tls.certificate, self.tls.key, self.tls.server_name)

    def interpreter(self, workload: str) -> Path:
        """The Python that trains a workload."""
        python = self.workload[workload].python
        return self.directory / python if python else Path(sys.executable)


def load_site(path: Path, *, insecure: bool = False) -> SiteSettings:
    """Read a site.toml; relative paths in it are relative to it.

    Args:
        path: the file.
        insecure: set `insecure`, whatever the file says.

    Raises:
        FedlinkError: BAD_CONFIG, naming the key.
    """
    directory = path.resolve().parent
    table = {k: v for k, v in load_toml(path).items() if k != "directory"} | ({"insecure": True} if insecure else {})
    site = SiteSettings.checked(table, str(path))
    if (proxy := site.route.proxy) and site.proxy and proxy.credentials and path.stat().st_mode & 0o077:
        text = f"{path} holds the proxy's password and is open to others: chmod 600 it"
        raise FedlinkError(Reason.BAD_CONFIG, text)
    token = directory / site.token_file if site.token_file else None
    tls = site.tls
    if tls:
        files = {name: directory / file for name in ("ca", "certificate", "key") if (file := getattr(tls, name))}
        tls = tls.model_copy(update=files)
    return site.model_copy(
        update={"directory": directory, "state_dir": directory / site.state_dir, "token_file": token, "tls": tls}
    )
