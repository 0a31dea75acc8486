"""ProbeDownload and ProbeUpload: how fast the line to a site is (blob_service.proto is the specification).

Nothing here touches the disk or a session, so a site may be examined beside its running daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from fedlink import rpc
from fedlink.blobs import CHUNK_SIZE, MAX_PROBE_BYTES, chunk_spans
from fedlink.errors import FedlinkError, Reason
from fedlink.v1 import blob_service_pb2 as pb
from fedserver.services.admission import Admission
from fedserver.services.blob import Identify
from fedserver.services.status import Context, translated

PROBE_SECONDS = 60.0
"""A probe ends after so long with what has moved until then."""

_SERVICE = pb.DESCRIPTOR.services_by_name["BlobService"].full_name


class ProbeServicer:
    """The two calls.

    Args:
        identify: says who is calling, by the credential alone.
        admission: the places that blobs are moved in, too.
    """

    def __init__(self, *, identify: Identify, admission: Admission) -> None:
        self._identify = identify
        self._admission = admission

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Register the calls, beside those of `BlobServicer`."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "ProbeDownload": grpc.unary_stream_rpc_method_handler(
                self.probe_download, pb.ProbeDownloadRequest.FromString, None
            ),
            "ProbeUpload": grpc.stream_unary_rpc_method_handler(
                self.probe_upload, None, pb.ProbeUploadResponse.SerializeToString
            ),
        }
        server.add_registered_method_handlers(_SERVICE, handlers)

    @translated
    async def probe_download(self, request: pb.ProbeDownloadRequest, context: Context) -> None:
        """ProbeDownload."""
        caller = await self._identify(context)
        if request.size > MAX_PROBE_BYTES:
            text = f"A probe moves at most {MAX_PROBE_BYTES} bytes, not {request.size}; ask for less."
            raise FedlinkError(Reason.TOO_LARGE, text)
        if request.size == 0:
            return
        # Not zeros: something on the way may compress.
        block = memoryview(os.urandom(min(CHUNK_SIZE, request.size)))
        with self._admission.place(caller), contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROBE_SECONDS):
                for offset, length in chunk_spans(0, request.size):
                    await context.write(rpc.chunk_message(offset, block[:length]))

    @translated
    async def probe_upload(self, requests: AsyncIterator[bytes], context: Context) -> pb.ProbeUploadResponse:
        """ProbeUpload."""
        caller = await self._identify(context)
        received = 0
        with self._admission.place(caller), contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROBE_SECONDS):
                async for message in requests:
                    received += _payload_size(message)
                    if received >= MAX_PROBE_BYTES:
                        break
        return pb.ProbeUploadResponse(received=received)


def _payload_size(message: bytes) -> int:
    if fast := rpc.split_chunk(message):
        return len(fast[1])
    try:
        return len(pb.ProbeUploadRequest.FromString(message).payload)
    except DecodeError:
        raise FedlinkError(Reason.CHUNK_SIZE, "A message is not a ProbeUploadRequest.") from None
