"""Settings of the server: every value has a default, so `fedserver serve` needs none."""

from __future__ import annotations

import enum
import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from fedlink.config import Bytes, Config, Seconds, load_toml
from fedlink.errors import FedlinkError, Reason
from fedlink.route import is_loopback

DEFAULT_DATA_DIR = Path("fedserver-data")
DEFAULT_LISTEN = "127.0.0.1:8470"
_MAX_SOCKET_PATH = 100


class Proof(enum.Enum):
    """How a site proves who it is."""

    NONE = enum.auto()
    """A name without a token is taken on its word."""
    TOKEN = enum.auto()
    """A bearer token."""
    CERTIFICATE = enum.auto()
    """The certificate of the connection."""


class TlsSettings(Config):
    """`[tls]`: how server and sites know each other; files in PEM, read again when they change."""

    certificate: Path
    """The server's certificate, with any intermediate ones after it."""
    key: Path
    """Its private key; not readable for everybody."""
    client_ca: Path | None = None
    """Mutual TLS: every site needs a certificate of one of these CAs, and is its common name."""
    revoked: Path | None = None
    """Revocation lists of those CAs."""

    @model_validator(mode="after")
    def _mutual(self) -> Self:
        if self.revoked and not self.client_ca:
            raise ValueError("revoked names certificates of sites, which only client_ca asks for; set both")
        return self

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file there is."""
        return tuple(f for f in (self.certificate, self.key, self.client_ca, self.revoked) if f)


class ServerSettings(Config):
    """`fedserver.toml`, and what the command line says over it."""

    data_dir: Path = DEFAULT_DATA_DIR
    """Database, blobs and spool."""
    listen: str = DEFAULT_LISTEN
    """HOST:PORT for the sites; port 0 takes a free one."""
    insecure: bool = False
    """Serve another address than loopback without TLS; every site then needs a token."""
    tls: TlsSettings | None = None
    """`[tls]`; without it, only loopback is served, or an `insecure` address."""
    database: str = ""
    """SQLAlchemy URL; by default SQLite in the data directory."""
    lease_term: Seconds = Field(30.0, ge=1, le=86400)
    """Seconds without a sign after which a task is away and a site not connected."""
    max_poll_wait: Seconds = Field(25.0, ge=0.1, le=30)
    """Seconds a poll is held; below the lease term, so that a waiting site counts as connected."""
    bulk_streams: int = Field(8, ge=1, le=256)
    """Bulk streams that may use about 12 MiB each; up to three times as many share that memory."""
    transfer_stall_after: Seconds = Field(60.0, ge=1, le=86400)
    """Seconds without a whole MiB after which a bulk stream loses its place."""
    disk_reserve: Bytes = Field(256 << 20, ge=0)
    """Bytes of the data directory's disk that uploads leave free, besides what the next version takes."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("listen")
    @classmethod
    def _address(cls, value: str) -> str:
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"{value!r} is not HOST:PORT")
        return value

    @model_validator(mode="after")
    def _safe(self) -> Self:
        if self.insecure and self.tls:
            raise ValueError("insecure and [tls] contradict each other; take one out")
        if not self.loopback and not self.insecure and not self.tls:
            raise ValueError(
                f"listen = {self.listen!r} is not a loopback address, and connections are not encrypted; "
                "add [tls] (docs/security.md), or say --insecure on a network you trust"
            )
        if self.max_poll_wait >= self.lease_term:
            raise ValueError("max_poll_wait must be below lease_term, or waiting sites would count as gone")
        return self

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.listen)

    @property
    def proof(self) -> Proof:
        """How a site proves who it is."""
        if self.tls and self.tls.client_ca:
            return Proof.CERTIFICATE
        return Proof.NONE if self.loopback and not self.tls else Proof.TOKEN

    @property
    def database_url(self) -> str:
        """The database in use."""
        return self.database or f"sqlite:///{self.data_dir / 'fedserver.db'}"


def load_settings(path: Path | None, overrides: dict[str, Any]) -> ServerSettings:
    """Settings from a file, if one is named, and from the command line; paths in the file are relative to it.

    Raises:
        FedlinkError: BAD_CONFIG, naming the key.
    """
    table = load_toml(path) if path else {}
    if path and "data_dir" in table:
        table["data_dir"] = path.resolve().parent / str(table["data_dir"])
    if path and isinstance(table.get("tls"), dict):
        table["tls"] = {
            key: path.resolve().parent / value if isinstance(value, str) else value
            for key, value in table["tls"].items()
        }
    given = {k: v for k, v in overrides.items() if v is not None}
    return ServerSettings.checked(table | given, str(path) if path else "command line")


def admin_socket(data_dir: Path) -> Path:
    """Where the operators' socket of a data directory is.

    It lies in the directory, unless the path is too long for a socket: then in a directory of
    the user's own below the system's temporary one.

    Raises:
        FedlinkError: BAD_CONFIG if that directory belongs to somebody else.
    """
    inside = data_dir.resolve() / "admin.sock"
    if len(os.fsencode(inside)) <= _MAX_SOCKET_PATH:
        return inside
    private = Path(tempfile.gettempdir()) / f"fedserver-{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    found = private.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise FedlinkError(Reason.BAD_CONFIG, f"{private} is not a private directory of this user; remove it")
    return private / f"{hashlib.sha256(os.fsencode(inside)).hexdigest()[:24]}.sock"
