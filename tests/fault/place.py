"""Where cases are carried out: in memory if there is room, for each writes a gigabyte that nothing has to outlive."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

_MEMORY = Path("/dev/shm")
_ROOM = 8 << 30


def roomy_directory() -> Path:
    """A new directory; whoever made it removes it."""
    in_memory = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _ROOM
    return Path(tempfile.mkdtemp(prefix="fedlink-fault-", dir=_MEMORY if in_memory else None))
