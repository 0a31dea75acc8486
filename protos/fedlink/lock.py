"""One process a directory: a lock file, which the kernel frees in whatever way its holder ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

_LOOKS = (0.0, 0.1, 0.3)
"""Pauses before each try: `holder` has the lock for an instant, too."""
_MAX_TEXT = 256


def take(lock: int) -> bool:
    """Take the lock on an open file until it is closed; False if another process has it."""
    for pause in _LOOKS:
        time.sleep(pause)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        return True
    return False


def holder(path: Path) -> bytes | None:
    """What the process that has the lock has written into the file; None if no process has it."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return os.read(lock, _MAX_TEXT)
    finally:
        os.close(lock)
    return None
