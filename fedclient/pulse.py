"""The daemon's sign of life: a file in the state directory that its event loop writes anew all the time.

`fedclient health` reads it, for the health checks of containers and supervisors. A daemon that
hangs, or whose disk does, writes no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

from fedclient.aside import off_loop
from fedclient.spool import in_use
from fedlink.errors import FedlinkError, Reason

BEAT_SECONDS = 10.0
"""Between two signs."""
LATE_SECONDS = 60.0
"""A daemon whose last sign is older counts as gone."""
_FILE = "pulse"


class Pulse:
    """Writes the signs of life of a daemon, as long as the context lasts.

    Args:
        state_dir: the daemon's, which it has locked.

    Attributes:
        phase: what the daemon is at, for people.
    """

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / _FILE
        self.phase = "starting"

    @contextlib.asynccontextmanager
    async def beating(self) -> AsyncIterator[None]:
        """Write signs until the context ends; then none is left."""
        beats = asyncio.create_task(self._beat())
        try:
            yield
        finally:
            beats.cancel()
            await asyncio.gather(beats, return_exceptions=True)
            self._path.unlink(missing_ok=True)

    async def _beat(self) -> None:
        while True:
            # Aside: a disk that hangs must not stop the heartbeats of tasks, only these signs.
            await off_loop(self._write)
            await asyncio.sleep(BEAT_SECONDS)

    def _write(self) -> None:
        # On a full disk the last sign gets old, and so the daemon unhealthy: it could not train either.
        with contextlib.suppress(OSError):
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(json.dumps({"phase": self.phase}), encoding="ascii")
            temporary.replace(self._path)


def read_pulse(state_dir: Path) -> str:
    """What the daemon of a state directory is at.

    Raises:
        FedlinkError: FAILED: no daemon runs there, or it hangs.
    """
    path = state_dir / _FILE
    try:
        age = time.time() - path.stat().st_mtime
        phase = str(json.loads(path.read_text(encoding="ascii"))["phase"])
    except (OSError, ValueError, KeyError, TypeError):
        text = f"no fedclient runs with state_dir {state_dir}: start one with `fedclient start`"
        raise FedlinkError(Reason.FAILED, text) from None
    if not in_use(state_dir):
        raise FedlinkError(Reason.FAILED, f"the fedclient with state_dir {state_dir} was killed; start it again")
    if age > LATE_SECONDS:
        text = f"the fedclient with state_dir {state_dir} gave no sign of life for {age:.0f} s: it hangs"
        raise FedlinkError(Reason.FAILED, text)
    return phase
