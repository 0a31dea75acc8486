"""What both ends of a gRPC connection must agree on.

Channel and server options, metadata keys, errors on the wire, and the chunk messages'
own codec (docs/protocol.md, "Chunks").
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from fedlink.blobs import MAX_MESSAGE_BYTES
from fedlink.errors import DOMAIN, FedlinkError, Reason
from fedlink.v1 import blob_service_pb2 as blob_pb

META_CLIENT = "fedlink-client"
META_SESSION = "fedlink-session-bin"
META_AUTHORIZATION = "authorization"
Metadata = tuple[tuple[str, str | bytes], ...]
"""Request metadata."""


@dataclass(frozen=True, slots=True)
class Liveness:
    """When a connection that says nothing counts as dead; seconds.

    Attributes:
        silence: of the other side, while a call is open, until it is asked for a sign (an HTTP/2 ping).
        answer: until the sign must be there. It travels behind what was sent before: a few MB on a bulk connection.
        unacknowledged: that bytes may stay without TCP's acknowledgement.
        unused: without a call until a client gives the connection up, to make a new one when it needs one; 0: never.
            Nobody notices how an unused connection dies.
    """

    silence: float
    answer: float
    unacknowledged: float
    unused: float = 0.0

    @property
    def options(self) -> list[tuple[str, Any]]:
        """What gRPC calls it."""
        return [
            ("grpc.keepalive_time_ms", int(self.silence * 1000)),
            # Of the two, this one only sets TCP_USER_TIMEOUT (in 1.85): an answer had 60 s without the next one.
            ("grpc.keepalive_timeout_ms", int(self.unacknowledged * 1000)),
            ("grpc.http2.ping_timeout_ms", int(self.answer * 1000)),
            *([("grpc.client_idle_timeout_ms", int(self.unused * 1000))] if self.unused else []),
        ]


QUICK = Liveness(silence=10.0, answer=5.0, unacknowledged=5.0)
"""For control calls, which are small and may be repeated: a lost server is noticed within 15 seconds."""
PATIENT = Liveness(silence=20.0, answer=60.0, unacknowledged=20.0, unused=5.0)
"""For blobs, whose connection a slow link keeps full for long; and for servers."""

_COMMON_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_pings_without_data", 0),
]


def patient(stall_after: float) -> Liveness:
    """For blobs, where a chunk may take so many seconds."""
    return replace(PATIENT, answer=max(PATIENT.answer, stall_after))


def server_options(liveness: Liveness = PATIENT) -> list[tuple[str, Any]]:
    """Options for every server: room for a mass reconnection, and one server a port."""
    return [
        *_COMMON_OPTIONS,
        *liveness.options,
        ("grpc.so_reuseport", 0),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.server.max_pending_requests", 100_000),
        ("grpc.server.max_pending_requests_hard_limit", 200_000),
        # Well below the silence of any client: who asks more often than that is hung up on.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ]


def channel_options(liveness: Liveness = QUICK) -> list[tuple[str, Any]]:
    """Options for every channel: a connection of its own and a quick return after an outage."""
    return [
        *_COMMON_OPTIONS,
        *liveness.options,
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 200),
        # Also the time in which a connection must come about, with TLS and a proxy and all their round trips.
        ("grpc.min_reconnect_backoff_ms", 5_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # A server in a container may come back at another address; by default names are asked for only every 30 s.
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
        ("grpc.enable_retries", 0),
    ]


def tune_malloc() -> None:
    """Keep 1 MiB messages off mmap (1.9x to 2.9x the throughput); does nothing where mallopt is missing.

    Call it before threads are started.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
    mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD; both, or glibc freezes the other at 128 KiB
    # M_ARENA_MAX: by default every thread keeps what it once held of messages, 8 heaps a processor: a server that
    # served four sites at once held 560 to 610 MB instead of 280.
    mallopt(-8, 2)


def to_status(error: FedlinkError) -> Any:
    """The gRPC status of an error, with `google.rpc.ErrorInfo` and, if it says when, `RetryInfo`."""
    info = error_details_pb2.ErrorInfo(reason=error.reason.name, domain=DOMAIN, metadata=error.metadata)
    details = [any_pb2.Any()]
    details[0].Pack(info)
    if error.retry_after is not None:
        retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration())
        retry.retry_delay.FromMilliseconds(int(error.retry_after * 1000))
        details.append(any_pb2.Any())
        details[-1].Pack(retry)
    code = grpc.StatusCode[error.reason.status]
    return rpc_status.to_status(status_pb2.Status(code=code.value[0], message=error.message, details=details))


def from_rpc_error(error: grpc.RpcError) -> FedlinkError:
    """The FedlinkError that a failed call stands for.

    A status without our ErrorInfo comes from gRPC itself or from something between the two
    sides: UNAVAILABLE, CANCELLED and DEADLINE_EXCEEDED become UNREACHABLE, the rest UNKNOWN.
    """
    code = error.code()
    text = error.details() or code.name
    status = None
    with contextlib.suppress(ValueError):
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
    reason, metadata, retry_after = None, {}, None
    for detail in status.details if status else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            reason, metadata = Reason.__members__.get(info.reason), dict(info.metadata)
        elif detail.Unpack(retry):
            retry_after = retry.retry_delay.ToMilliseconds() / 1000
    if reason is None:
        gone = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
        reason = Reason.UNREACHABLE if code in gone else Reason.UNKNOWN
        text = f"{code.name}: {text}"
    return FedlinkError(reason, text, metadata=metadata, retry_after=retry_after)


# A chunk message is a constant-length prefix and the payload: field 3 (fixed64 offset)
# and field 4 (bytes) with its length as a varint padded to five bytes.
_PREFIX = struct.Struct("<BQB5s")
_PREFIX_SIZE = _PREFIX.size
_OFFSET_TAG, _PAYLOAD_TAG = 0x19, 0x22


def chunk_message(offset: int, payload: bytes | bytearray | memoryview) -> bytes:
    """One chunk as a serialized ReadBlobResponse or WriteBlobRequest, with one copy of the payload."""
    return b"".join((_PREFIX.pack(_OFFSET_TAG, offset, _PAYLOAD_TAG, _padded(len(payload))), payload))


@functools.lru_cache(maxsize=64)
def _padded(n: int) -> bytes:
    return bytes((n & 127 | 128, n >> 7 & 127 | 128, n >> 14 & 127 | 128, n >> 21 & 127 | 128, n >> 28))


def split_chunk(message: bytes) -> tuple[int, memoryview] | None:
    """Offset and payload of a message made by `chunk_message`, without a copy; None for any other message."""
    if len(message) < _PREFIX_SIZE:
        return None
    first, offset, tag, padded = _PREFIX.unpack_from(message)
    if first != _OFFSET_TAG or tag != _PAYLOAD_TAG or padded != _padded(len(message) - _PREFIX_SIZE):
        return None
    return offset, memoryview(message)[_PREFIX_SIZE:]


class Chunk:
    """One chunk of a blob, as the codec below hands it over."""

    __slots__ = ("offset", "payload")

    def __init__(self, offset: int, payload: bytes | bytearray | memoryview) -> None:
        self.offset = offset
        self.payload = payload


def decode_read_response(message: bytes) -> Chunk | blob_pb.ReadBlobResponse:
    """A ReadBlobResponse: a Chunk, or the head of the stream. Understands stock protobuf peers."""
    fast = split_chunk(message)
    if fast:
        return Chunk(*fast)
    parsed = blob_pb.ReadBlobResponse.FromString(message)
    return Chunk(parsed.offset, parsed.payload) if parsed.payload else parsed


def decode_write_request(message: bytes) -> Chunk | blob_pb.WriteBlobRequest:
    """A WriteBlobRequest: a Chunk, or the head of the stream. Understands stock protobuf peers."""
    fast = split_chunk(message)
    if fast:
        return Chunk(*fast)
    parsed = blob_pb.WriteBlobRequest.FromString(message)
    return Chunk(parsed.offset, parsed.payload) if parsed.payload else parsed


def encode_bulk(message: bytes | blob_pb.ReadBlobResponse | blob_pb.WriteBlobRequest) -> bytes:
    """Serializer for both bulk streams: `chunk_message` bytes pass, heads are serialized."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def metadata_value(metadata: Sequence[tuple[str, str | bytes]] | None, key: str) -> str | bytes | None:
    """The first value of a metadata key, or None."""
    return next((value for k, value in metadata or () if k == key), None)
