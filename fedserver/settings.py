"""Settings of the server: every value has a default, so `fedserver serve` needs none."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import stat
import tempfile
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from fedlink.config import Config, Seconds, load_toml
from fedlink.errors import FedlinkError, Reason

DEFAULT_DATA_DIR = Path("fedserver-data")
DEFAULT_LISTEN = "127.0.0.1:8470"
_MAX_SOCKET_PATH = 100


class ServerSettings(Config):
    """`fedserver.toml`, and what the command line says over it."""

    data_dir: Path = DEFAULT_DATA_DIR
    """Database, blobs and spool."""
    listen: str = DEFAULT_LISTEN
    """HOST:PORT for the sites; port 0 takes a free one."""
    insecure: bool = False
    """Serve another address than loopback without TLS; every site then needs a token."""
    database: str = ""
    """SQLAlchemy URL; by default SQLite in the data directory."""
    lease_term: Seconds = Field(30.0, ge=1, le=86400)
    """Seconds without a sign after which a task is away and a site not connected."""
    max_poll_wait: Seconds = Field(20.0, ge=0.1, le=30)
    """Seconds a poll is held; below the lease term, so that a waiting site counts as connected."""
    bulk_streams: int = Field(8, ge=1, le=256)
    """Bulk streams admitted at once; each may use about 12 MiB."""
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
        if not self.loopback and not self.insecure:
            raise ValueError(
                f"listen = {self.listen!r} is not a loopback address, and connections are not encrypted; "
                "listen on 127.0.0.1, or say --insecure on a network you trust"
            )
        if self.max_poll_wait >= self.lease_term:
            raise ValueError("max_poll_wait must be below lease_term, or waiting sites would count as gone")
        return self

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        host = self.listen.rpartition(":")[0].strip("[]")
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

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
