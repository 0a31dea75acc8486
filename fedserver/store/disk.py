"""The disk under the data directory: how much of it stays free, what it refuses, and what it must not be."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from fedlink import log as logs
from fedlink.errors import FedlinkError, Reason
from fedlink.recycle import Recycler

RETRY_AFTER = 5.0
"""Seconds after which a client may ask again."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FURTHER = "further uploads"
"""The use of the disk for what `check_room` is asked about."""
_NEWS_SECONDS = 60.0
"""What was not met again for so long is over."""

_NETWORK = re.compile(
    r"afs|beegfs|ceph|cifs|davfs|glusterfs|gpfs|lustre|ncp|ncpfs|nfs|nfs4|smb2|smb3|smbfs|fuse\.(blobfuse|ceph|ceph-fuse|"
    r"curlftpfs|davfs|gcsfuse|glusterfs|goofys|juicefs|mountpoint-s3|rclone|s3fs|seaweedfs|sshfs)"
)
_OCTAL = re.compile(r"\\(\d{3})")


def is_disk(error: BaseException) -> bool:
    """Whether an error passes when there is room again, or the disk can be written; a `Disk` has logged it."""
    return isinstance(error, FedlinkError) and error.reason in (Reason.DISK_FULL, Reason.DISK_UNWRITABLE)


def disk_full(what: str) -> FedlinkError:
    """The error for something that finds no room now."""
    return FedlinkError(
        Reason.DISK_FULL,
        f"The server's disk has no room for {what}; it is tried again until there is.",
        retry_after=RETRY_AFTER,
    )


def disk_unwritable(what: str, why: str) -> FedlinkError:
    """The error for something that cannot be written now."""
    return FedlinkError(
        Reason.DISK_UNWRITABLE,
        f"The server's disk cannot be written ({why}), so {what} has to wait; it is tried again until it can.",
        retry_after=RETRY_AFTER,
    )


@contextlib.contextmanager
def disk_errors_named(what: str) -> Iterator[None]:
    """Turn the system's "no space left" into DISK_FULL and "read-only" into DISK_UNWRITABLE; other errors pass.

    Raises:
        FedlinkError: DISK_FULL, DISK_UNWRITABLE.
    """
    try:
        yield
    except OSError as e:
        if e.errno in _NO_ROOM:
            raise disk_full(what) from e
        if e.errno == errno.EROFS:
            raise disk_unwritable(what, "it is read-only") from e
        raise


class Disk:
    """Keeps part of the disk free, and remembers what the disk refused; any thread.

    Args:
        root: a directory on it.
        reserve: bytes that uploads leave free.
        spare: files on it that are only kept to be written over: they go when room is needed.
    """

    def __init__(self, root: Path, *, reserve: int = 0, spare: Recycler | None = None) -> None:
        self._root = root
        self._spare = spare
        self._reserve = reserve
        self._troubles: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self._log = logs.get("disk")

    def check_room(self, size: int, what: str, *, leave: int = 0) -> None:
        """Return if `size` bytes may be taken.

        Args:
            size: bytes wanted.
            what: for the message.
            leave: bytes that must stay free besides the reserve.

        Raises:
            FedlinkError: DISK_FULL.
        """
        kept = self._reserve + leave
        free = shutil.disk_usage(self._root).free
        if free < size + kept and self._spare and self._spare.held:
            self._spare.clear()
            free = shutil.disk_usage(self._root).free
        if free < size + kept:
            text = f"has no room for further uploads: {free} bytes are free, {size} are needed and {kept} kept free"
            self.note(FURTHER, text)
            raise disk_full(what)

    @property
    def room(self) -> int:
        """Bytes that may be taken now."""
        spare = self._spare.held if self._spare else 0
        return max(0, shutil.disk_usage(self._root).free + spare - self._reserve)

    @property
    def reserve(self) -> int:
        """Bytes that uploads leave free."""
        return self._reserve

    @contextlib.contextmanager
    def used_for(self, use: str) -> Iterator[None]:
        """Do something that writes, and remember how it ended.

        Args:
            use: for people: "uploads", "the next version".
        """
        try:
            with disk_errors_named(use):
                yield
        except FedlinkError as e:
            # Without a cause it is `check_room` that refused, which has said so.
            if is_disk(e) and e.__cause__ is not None:
                self.failed(use, e)
            raise
        self.worked(use)

    def failed(self, use: str, error: FedlinkError) -> None:
        """The disk refused something."""
        what = "cannot be written"
        if self._spare:
            self._spare.clear()
        if error.reason is Reason.DISK_FULL:
            what = f"is full ({shutil.disk_usage(self._root).free} bytes free)"
        self.note(use, f"{what}, which holds up {use}")

    def worked(self, use: str) -> None:
        """The disk did what it refused before, if it did."""
        if use in self._troubles:
            with self._lock:
                self._troubles.pop(use, None)
            self._log.info("the disk does what it refused", use=use)

    def note(self, use: str, text: str) -> None:
        """Remember what is wrong, and log it unless that is no news."""
        now = time.monotonic()
        with self._lock:
            known = self._troubles.get(use)
            self._troubles[use] = (text, now)
        if known is None or now - known[1] > _NEWS_SECONDS:
            self._log.error(f"the disk of {self._root} {text}")

    @property
    def trouble(self) -> str:
        """What is wrong now, for people; empty if nothing is known to be."""
        now = time.monotonic()
        with self._lock:
            texts = [text for text, at in self._troubles.values() if now - at <= _NEWS_SECONDS]
        return "; ".join(f"the disk of {self._root} {text}" for text in texts)


def refuse_network_disk(path: Path, mounts: str | None = None) -> None:
    """Return if a path is on a disk of this machine, as far as can be seen: SQLite corrupts its files on others.

    Args:
        path: a file or directory, which need not exist.
        mounts: what /proc/self/mountinfo says; read if None, and believed if it is not there.

    Raises:
        FedlinkError: BAD_CONFIG.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return
    point, kind = _mount_of(path.resolve(), mounts)
    if _NETWORK.fullmatch(kind):
        raise FedlinkError(
            Reason.BAD_CONFIG,
            f"{path} is on a network file system ({kind} at {point}), where SQLite loses data: put data_dir on a disk "
            "of this machine, or name a PostgreSQL database with `database` in fedserver.toml",
        )


def _mount_of(path: Path, mounts: str) -> tuple[str, str]:
    """Mount point and type of the file system that a path is on; the last mount on a point hides the others."""
    best, kind = Path("/"), ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields, types = before.split(" "), after.split(" ")
        if len(fields) < 5 or not types[0]:
            continue
        point = Path(_OCTAL.sub(lambda m: chr(int(m[1], 8)), fields[4]))
        if path.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, types[0]
    return str(best), kind
