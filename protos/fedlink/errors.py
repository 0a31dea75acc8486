"""Every reason for which something can be refused, in one table.

    FedlinkError            carries a Reason, one sentence, and values for programs
        └─ no subclasses: code that must tell errors apart looks at `.reason`

A `Reason` knows its gRPC status, whether a repeat can help, and the exit code a
command ends with. `fedlink.rpc` turns a FedlinkError into a status with
`google.rpc.ErrorInfo` on the server and back into a FedlinkError on the client.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple, Self

DOMAIN = "fedlink"
"""`google.rpc.ErrorInfo.domain` of every error here."""

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_REFUSED = range(5)
"""Exit codes of both command lines."""


class _Rule(NamedTuple):
    status: str
    retryable: bool
    exit_code: int


class Reason(enum.Enum):
    """Why something was refused; the name is `ErrorInfo.reason` on the wire."""

    # Who is calling
    BAD_CREDENTIALS = ("UNAUTHENTICATED", False)
    SESSION_UNKNOWN = ("UNAUTHENTICATED", True)
    SESSION_REPLACED = ("ABORTED", False)
    NOT_AN_OPERATOR = ("PERMISSION_DENIED", False)
    CLIENT_TOO_OLD = ("FAILED_PRECONDITION", False)
    CLIENT_TOO_NEW = ("FAILED_PRECONDITION", False)
    BAD_REGISTRATION = ("INVALID_ARGUMENT", False)
    # Tasks
    TASK_NOT_FOUND = ("NOT_FOUND", False)
    ROUND_CLOSED = ("FAILED_PRECONDITION", False)
    TASK_COMPLETED = ("FAILED_PRECONDITION", False)
    WRONG_RESULT = ("INVALID_ARGUMENT", False)
    # Updates
    BAD_MANIFEST = ("INVALID_ARGUMENT", False)
    TENSOR_MISSING = ("INVALID_ARGUMENT", False)
    TENSOR_UNEXPECTED = ("INVALID_ARGUMENT", False)
    SHAPE_MISMATCH = ("INVALID_ARGUMENT", False)
    DTYPE_MISMATCH = ("INVALID_ARGUMENT", False)
    NOT_FINITE = ("INVALID_ARGUMENT", False)
    NO_EXAMPLES = ("INVALID_ARGUMENT", False)
    # Blobs
    BLOB_NOT_FOUND = ("NOT_FOUND", False)
    BLOB_MISSING = ("FAILED_PRECONDITION", False)
    BLOB_CORRUPT = ("DATA_LOSS", False, EXIT_FAILED)
    UPLOAD_NOT_FOUND = ("NOT_FOUND", False)
    UPLOAD_SUPERSEDED = ("ABORTED", True)
    OFFSET_MISMATCH = ("OUT_OF_RANGE", True)
    CHUNK_CORRUPT = ("DATA_LOSS", True, EXIT_FAILED)
    CHUNK_SIZE = ("INVALID_ARGUMENT", False)
    DIGEST_MISMATCH = ("INVALID_ARGUMENT", False)
    TOO_LARGE = ("INVALID_ARGUMENT", False)
    # Operators
    BAD_RUN = ("INVALID_ARGUMENT", False, EXIT_USAGE)
    BAD_NAME = ("INVALID_ARGUMENT", False, EXIT_USAGE)
    BAD_PAGE = ("INVALID_ARGUMENT", False, EXIT_USAGE)
    RUN_NOT_FOUND = ("NOT_FOUND", False)
    RUN_EXISTS = ("ALREADY_EXISTS", False)
    RUN_STATE = ("FAILED_PRECONDITION", False)
    BELOW_QUORUM = ("FAILED_PRECONDITION", False)
    ROUND_NOT_FOUND = ("NOT_FOUND", False)
    MODEL_NOT_FOUND = ("NOT_FOUND", False)
    MODEL_EXISTS = ("ALREADY_EXISTS", False)
    CLIENT_NOT_FOUND = ("NOT_FOUND", False)
    CLIENT_EXISTS = ("ALREADY_EXISTS", False)
    CLIENT_REVOKED = ("FAILED_PRECONDITION", False)
    # The server's condition
    BUSY = ("RESOURCE_EXHAUSTED", True, EXIT_FAILED)
    DISK_FULL = ("RESOURCE_EXHAUSTED", True, EXIT_FAILED)
    DISK_UNWRITABLE = ("UNAVAILABLE", True, EXIT_FAILED)
    DRAINING = ("UNAVAILABLE", True, EXIT_UNREACHABLE)
    INTERNAL = ("INTERNAL", True, EXIT_FAILED)
    # Made on this side of the wire
    UNREACHABLE = ("UNAVAILABLE", True, EXIT_UNREACHABLE)
    TLS_REFUSED = ("UNAVAILABLE", False)
    PROXY_REFUSED = ("UNAVAILABLE", False)
    UNKNOWN = ("UNKNOWN", True, EXIT_FAILED)
    BAD_CONFIG = ("INVALID_ARGUMENT", False, EXIT_USAGE)
    FAILED = ("INTERNAL", False, EXIT_FAILED)

    # Members with equal rules would become aliases of the first one; a running number keeps them apart.
    def __new__(cls, status: str, retryable: bool, exit_code: int = EXIT_REFUSED) -> Self:
        """Keep the rule beside a value of its own."""
        member = object.__new__(cls)
        member._value_ = len(cls.__members__)
        member._rule = _Rule(status, retryable, exit_code)
        return member

    _rule: _Rule

    @property
    def status(self) -> str:
        """Name of the canonical gRPC status."""
        return self._rule.status

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later without anybody acting."""
        return self._rule.retryable

    @property
    def exit_code(self) -> int:
        """Exit code of a command that ends with this reason."""
        return self._rule.exit_code


class FedlinkError(Exception):
    """One refused or failed action.

    Attributes:
        reason: from the table above.
        message: one sentence: what happened, to which tensor, file or site, and what to do.
        metadata: values a program needs, as text (e.g. `committed_size`, `tensor`).
        retry_after: seconds the other side asks to wait, if it does.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after
