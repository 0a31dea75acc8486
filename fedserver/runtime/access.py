"""Who may move which bytes: what the blob service asks of the runtime.

A digest is a name, not a permission. Every right follows from the tasks of the caller
(or, for an operator, from the import); these are the questions, and the runtime, which
knows tasks and rounds, answers them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fedlink.blobs import BlobRef
from fedlink.errors import FedlinkError
from fedlink.transfer import Purpose


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling, after authentication."""

    name: str
    """The client's name; for operators a name for the log."""
    operator: bool
    """Whether the call came in on the operators' listener."""


class BlobAccess(Protocol):
    """The authority over blobs and uploads. Every method is quick or leaves the event loop."""

    async def readable(self, caller: Caller, task_token: bytes, digest: bytes) -> BlobRef:
        """The blob, if this caller may read it under this task (an operator under the empty token).

        Raises:
            FedlinkError: TASK_NOT_FOUND, ROUND_CLOSED; BLOB_NOT_FOUND, whether or not the blob exists.
        """
        ...

    async def missing(self, caller: Caller, purpose: Purpose, digests: Sequence[bytes]) -> list[bytes]:
        """Those of the digests the caller has to send, in order; what others hold counts as missing.

        Raises:
            FedlinkError: TASK_NOT_FOUND, ROUND_CLOSED.
        """
        ...

    async def start_upload(self, caller: Caller, purpose: Purpose, ref: BlobRef, chunk_digests: bytes) -> bytes:
        """The id (16 bytes) of the spool slot for this purpose and blob: found, created, or linked to bytes here.

        The list has been checked against the digest.

        Raises:
            FedlinkError: TASK_NOT_FOUND, ROUND_CLOSED, TOO_LARGE, DISK_FULL, DRAINING.
        """
        ...

    async def owned(self, caller: Caller, upload_id: bytes) -> None:
        """Return if the upload is the caller's and still wanted.

        Raises:
            FedlinkError: UPLOAD_NOT_FOUND, ROUND_CLOSED.
        """
        ...

    async def damaged(self, caller: Caller, digest: bytes, error: FedlinkError) -> FedlinkError:
        """Take note of a blob that was found damaged; what to tell the caller, who is an operator or was reading it."""
        ...

    def count_read(self, task_token: bytes, nbytes: int) -> None:
        """Account for payload sent under a task."""
        ...

    def count_written(self, upload_id: bytes, nbytes: int) -> None:
        """Account for payload committed to an upload."""
        ...
