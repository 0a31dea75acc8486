"""Which errors are worth waiting for."""

from __future__ import annotations

from sqlalchemy.exc import OperationalError

from fedserver.store.disk import is_disk


def may_pass(error: BaseException) -> bool:
    """Whether the same may go well later: what the disk, the database, or want of memory or of open files refused."""
    return is_disk(error) or isinstance(error, OSError | MemoryError | OperationalError)
