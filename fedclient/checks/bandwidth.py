"""Check "bandwidth": how fast bytes go both ways, and what that means for a model."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from fedclient.checks.examination import Examination
from fedclient.checks.finding import Finding, failed, ok, skipped, warning
from fedclient.session import credentials
from fedlink import rpc
from fedlink.blobs import CHUNK_SIZE, MAX_PROBE_BYTES
from fedlink.errors import FedlinkError, Reason
from fedlink.v1 import blob_service_pb2 as pb

EXAMPLE_BYTES = 500_000_000
"""A model to say in seconds what a rate means."""
SLOW_SECONDS = 600.0
"""For the example; beyond, other sites will wait for this one."""

_MEASURE_SECONDS = 5.0
_CALL_SECONDS = 25.0
_BUSY_TRIES = 10
_SERVICE = "/fedlink.v1.BlobService/"


async def check_bandwidth(visit: Examination) -> Finding:
    """Move at most 32 MiB each way, for some seconds."""
    if visit.server is None or "probe" not in visit.server.features:
        return skipped("this server cannot measure it", "Have the server upgraded.")
    rates: list[float | None] = []
    for measure in (_down, _up):
        try:
            rates.append(await _when_free(measure, visit))
        except FedlinkError as e:
            if e.reason is Reason.BUSY:
                return skipped("the server moves as many blobs as it can at once", "Try again later.")
            if e.reason is not Reason.UNREACHABLE:
                return failed(e.message, "Try again; if it stays so, the server's log says why.")
            rates.append(None)
    down, up = rates
    if down is None or up is None:
        return warning(
            f"less than {CHUNK_SIZE / _CALL_SECONDS / 1e6:.2f} MB/s {'down' if down is None else 'up'}",
            "Have the line looked at: something on the way cuts long transfers off, or it is too slow for any model.",
        )
    example = [EXAMPLE_BYTES / rate for rate in (down, up)]
    found = f"{_rate(down)} down, {_rate(up)} up: a model of 500 MB takes {_time(example[0])} and {_time(example[1])}"
    if max(example) > SLOW_SECONDS:
        return warning(
            found,
            "Ask whoever creates runs for update_dtype = bfloat16 and deadlines that leave this site that time; "
            "or run fedclient where the line is faster.",
        )
    return ok(found)


async def _when_free(measure: Callable[[Examination], Awaitable[float]], visit: Examination) -> float:
    for left in reversed(range(_BUSY_TRIES)):
        try:
            return await measure(visit)
        except grpc.RpcError as e:
            error = rpc.from_rpc_error(e)
            if error.reason is not Reason.BUSY or not left:
                raise error from None
            await asyncio.sleep(max(0.5, error.retry_after or 0))
    raise AssertionError("the last try raises or returns")


async def _down(visit: Examination) -> float:
    """Bytes a second, counted from the first message on."""
    method: Any = visit.channel.unary_stream(
        _SERVICE + "ProbeDownload",
        request_serializer=pb.ProbeDownloadRequest.SerializeToString,
        response_deserializer=None,
    )
    began = time.monotonic()
    call = method(
        pb.ProbeDownloadRequest(size=MAX_PROBE_BYTES), metadata=credentials(visit.site), timeout=_CALL_SECONDS
    )
    try:
        first_bytes = len(await call.read())
        first = last = time.monotonic()
        received = 0
        while last - first < _MEASURE_SECONDS and (message := await call.read()) is not grpc.aio.EOF:
            received, last = received + len(message), time.monotonic()
    finally:
        call.cancel()
    return received / max(last - first, 1e-6) if received else first_bytes / max(last - began, 1e-6)


async def _up(visit: Examination) -> float:
    """Bytes a second, until the server has said how many came."""
    method: Any = visit.channel.stream_unary(
        _SERVICE + "ProbeUpload", request_serializer=None, response_deserializer=pb.ProbeUploadResponse.FromString
    )
    block = os.urandom(CHUNK_SIZE)
    began = time.monotonic()
    call = method(metadata=credentials(visit.site), timeout=_CALL_SECONDS)
    try:
        for offset in range(0, MAX_PROBE_BYTES, CHUNK_SIZE):
            await call.write(rpc.chunk_message(offset, block))
            if time.monotonic() - began > _MEASURE_SECONDS:
                break
        await call.done_writing()
    except (asyncio.InvalidStateError, grpc.RpcError):
        # The server has answered already; the answer says why.
        pass
    answer: pb.ProbeUploadResponse = await call
    return max(answer.received, 1) / max(time.monotonic() - began, 1e-6)


def _rate(rate: float) -> str:
    return f"{rate / 1e6:.0f} MB/s" if rate >= 1e7 else f"{rate / 1e6:.2g} MB/s"


def _time(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    return f"{seconds:.0f} s" if seconds < 300 else f"{seconds / 60:.0f} min"
