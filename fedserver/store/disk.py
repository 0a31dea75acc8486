"""A full disk, said in words."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from fedlink.errors import FedlinkError, Reason

RETRY_AFTER = 15.0
"""Seconds after which a client may ask again whether there is room."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_full(what: str) -> FedlinkError:
    """The error for something that finds no room now."""
    return FedlinkError(
        Reason.DISK_FULL,
        f"The server's disk has no room for {what}; it is tried again until there is.",
        retry_after=RETRY_AFTER,
    )


@contextlib.contextmanager
def full_disk_named(what: str) -> Iterator[None]:
    """Turn the system's "no space left" into DISK_FULL; other errors pass.

    Raises:
        FedlinkError: DISK_FULL.
    """
    try:
        yield
    except OSError as e:
        if e.errno in _NO_ROOM:
            raise disk_full(what) from e
        raise
