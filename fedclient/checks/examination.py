"""What the checks of one examination share: the site, one connection, the trainers, and what was found out so far."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import grpc.aio

from fedclient.aside import off_loop
from fedclient.launch import Description, Trainer
from fedclient.local_files import LocalModel
from fedclient.settings import SiteSettings
from fedlink import rpc
from fedlink.tls import open_channel
from fedlink.v1 import coordination_service_pb2 as pb

_SCRATCH = "run-"
_STALE = 86400.0
_PATIENCE = 10.0


@dataclass
class Examination:
    """One visit to a site; use as an async context manager.

    It works beside a running daemon: no session is opened, and everything that is written goes to a
    directory of its own.
    """

    site: SiteSettings
    config: Path
    train: bool = True
    """Whether to build models and train a step."""
    loadable: bool = True
    """Whether the workloads' modules and interpreters are there."""
    server: pb.GetServerInfoResponse | None = None
    descriptions: dict[str, Description] = field(default_factory=dict)
    models: dict[str, LocalModel] = field(default_factory=dict)
    """What each workload's class built."""
    _trainers: dict[str, Trainer] = field(default_factory=dict)
    _channel: grpc.aio.Channel | None = None
    _elsewhere: Path | None = None
    """Where logs and models go if the state directory does not take them."""

    async def __aenter__(self) -> Self:
        try:
            async with asyncio.timeout(_PATIENCE):
                self.logs, self.scratch = await off_loop(_make_room, self.site.state_dir / "doctor")
        except (OSError, TimeoutError):
            # The check of the disk says what is the matter.
            self.logs = self._elsewhere = Path(tempfile.mkdtemp(prefix="fedclient-doctor-"))
            self.scratch = Path(tempfile.mkdtemp(dir=self.logs, prefix=_SCRATCH))
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(t.close() for t in self._trainers.values()))
        if self._channel:
            await self._channel.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await off_loop(shutil.rmtree, self.scratch, True)
        if self._elsewhere:
            # Trainers' output stays if there is any, for a finding may name it.
            with contextlib.suppress(OSError):
                self._elsewhere.rmdir()

    @property
    def channel(self) -> grpc.aio.Channel:
        """The connection to the server.

        Raises:
            FedlinkError: BAD_CONFIG if a certificate or a key cannot be used.
        """
        if self._channel is None:
            self._channel = open_channel(self.site.route, self.site.client_tls, rpc.channel_options())
        return self._channel

    @property
    def model_bytes(self) -> int:
        """Bytes in the largest model that was built; 0 if none was."""
        return max((m.nbytes for m in self.models.values()), default=0)

    @property
    def host(self) -> str:
        """The host in the server's address."""
        return self.site.route.host

    @property
    def port(self) -> int:
        """The port in the server's address."""
        return int(self.site.server.rpartition(":")[2])

    def trainer(self, workload: str) -> Trainer:
        """The trainer of a workload on the site's first device."""
        if workload not in self._trainers:
            self._trainers[workload] = Trainer(self.site, workload, self.site.devices[0], self.logs)
        return self._trainers[workload]

    async def end_trainer(self, workload: str) -> None:
        """Let a workload's process go, for its memory."""
        if trainer := self._trainers.pop(workload, None):
            await trainer.close()


def _make_room(home: Path) -> tuple[Path, Path]:
    """A directory for trainers' output, which stays to be read, and one for models, which does not."""
    # Each by itself: with `parents` the mode is the last one's only.
    home.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    home.mkdir(mode=0o700, exist_ok=True)
    for left in home.glob(f"{_SCRATCH}*"):
        if time.time() - left.stat().st_mtime > _STALE:
            shutil.rmtree(left, ignore_errors=True)
    return home, Path(tempfile.mkdtemp(dir=home, prefix=_SCRATCH))
