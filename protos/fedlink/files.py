"""Files read and written by position, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

Buffer = bytes | bytearray | memoryview
"""Anything that can be hashed, written or sent without a copy."""
_BLOCK = 512


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


def open_to_fill(path: str | os.PathLike[str], size: int) -> int:
    """A descriptor for a file of `size` bytes whose blocks are all there, so that a full disk shows now.

    A file that is there is written over: what is not written keeps what it was.

    Raises:
        OSError: as the system says.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    before = os.fstat(fd)
    try:
        if before.st_size != size:
            os.truncate(fd, size)
        if min(before.st_size, before.st_blocks * _BLOCK) < size:
            _allocate(fd, size)
    except BaseException:
        # What could be had must not stay taken.
        with contextlib.suppress(OSError):
            os.truncate(fd, min(size, before.st_size))
        os.close(fd)
        raise
    return fd


def _allocate(fd: int, size: int) -> None:
    # Writing into blocks that are there is also faster.
    try:
        os.posix_fallocate(fd, 0, size)
    except AttributeError:  # macOS
        return
    except OSError as e:
        # A file system that cannot promise room says so when something is written.
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def sync(path: Path) -> None:
    """Have a file, or a directory's entries, on the disk before returning."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def boot_id() -> str:
    """Which boot of this machine this is; empty where the system does not say.

    What was written and not synced is there as long as it is the same.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def make_directory(path: Path, mode: int = 0o777) -> None:
    """Make a directory, with its parents, if it is not there; it survives a power loss once this returns.

    Raises:
        OSError: as the system says.
    """
    made = [path]
    while not made[-1].parent.is_dir():
        made.append(made[-1].parent)
    path.mkdir(mode, parents=True, exist_ok=True)
    # Also of one that is there: who made it may have been killed before this.
    for directory in reversed(made):
        # Whoever may not read the parent cannot have made anything in it.
        with contextlib.suppress(PermissionError):
            sync(directory.parent)
