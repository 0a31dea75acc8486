"""Files read and written by position, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from fedlink.blobs import Buffer


def read_at(fd: int, view: memoryview, offset: int) -> None:
    """Fill `view` with the bytes of a file from `offset` on.

    Raises:
        EOFError: the file ends before that.
        OSError: as the system says.
    """
    done = 0
    while done < len(view):
        n = os.preadv(fd, [view[done:]], offset + done)
        if n == 0:
            raise EOFError(f"the file ends at {offset + done}, {len(view) - done} bytes early")
        done += n


def write_at(fd: int, data: Buffer, offset: int) -> None:
    """Write all of `data` at `offset`.

    Raises:
        OSError: as the system says.
    """
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def sync(path: Path) -> None:
    """Have a file, or a directory's entries, on the disk before returning."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
