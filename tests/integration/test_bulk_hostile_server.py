"""What the client does with a server that lies, breaks off or falls silent: nothing wrong is ever kept."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from fedlink import bulk, rpc
from fedlink.blobs import CHUNK_SIZE, chunk_digests_of, ref_of
from fedlink.errors import FedlinkError, Reason
from fedlink.transfer import STALL, Retry, TaskPurpose
from fedlink.v1 import blob_service_pb2 as pb
from tests.support.transfer import QUICK, as_client, channel_to, some_bytes

MIB = CHUNK_SIZE
DATA = some_bytes(3 * MIB + 7)
REF, LIST = ref_of(DATA), chunk_digests_of(DATA)
Script = Callable[[Any, Any], Awaitable[Any]]


def honest_head() -> bytes:
    return pb.ReadBlobResponse(size=len(DATA), chunk_digests=LIST).SerializeToString()


def honest(start: int = 0) -> list[bytes]:
    return [rpc.chunk_message(at, DATA[at : at + MIB]) for at in range(start, len(DATA), MIB)]


@contextlib.asynccontextmanager
async def scripted(**methods: Script) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server whose methods send and receive raw bytes."""
    makers: dict[str, Any] = {
        "ReadBlob": grpc.unary_stream_rpc_method_handler,
        "WriteBlob": grpc.stream_unary_rpc_method_handler,
        "StartUpload": grpc.unary_unary_rpc_method_handler,
        "FindMissingBlobs": grpc.unary_unary_rpc_method_handler,
    }
    server = grpc.aio.server(options=rpc.server_options())
    handlers = {name: makers[name](script) for name, script in methods.items()}
    server.add_registered_method_handlers("fedlink.v1.BlobService", handlers)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with channel_to(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(None)


async def download(channel: grpc.aio.Channel, target: Path, *, stall: float = STALL, **retry: Any) -> None:
    await bulk.download_blob(
        channel, REF, target, task_token=b"t", metadata=as_client("a"), retry=Retry(**QUICK | retry), stall=stall
    )


LIES = {
    "garbage for a head": [b"\xff\xff\xff"],
    "a chunk for a head": honest(),
    "another size": [pb.ReadBlobResponse(size=5, chunk_digests=LIST).SerializeToString()],
    "no list": [pb.ReadBlobResponse(size=len(DATA)).SerializeToString(), *honest()],
    "another list": [pb.ReadBlobResponse(size=len(DATA), chunk_digests=bytes(128)).SerializeToString()],
    "an endless list": [pb.ReadBlobResponse(size=len(DATA), chunk_digests=LIST * 9).SerializeToString()],
}
LATER_LIES = {
    "garbage for a chunk": [b"\xff\xff\xff"],
    "a head for a chunk": [honest_head()],
    "a gap": honest()[1:],
    "a repeat": [honest()[0], honest()[0]],
    "half a chunk": [rpc.chunk_message(0, DATA[: MIB // 2])],
    "two chunks": [rpc.chunk_message(0, DATA[: 2 * MIB])],
    "other bytes": [rpc.chunk_message(0, bytes(MIB))],
    "more than asked": [*honest(), rpc.chunk_message(len(DATA), b"more")],
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_from_the_start_is_never_believed(tmp_path: Path, lie: str) -> None:
    async def read(_request: Any, context: Any) -> None:
        for message in LIES[lie]:
            await context.write(message)

    async with scripted(ReadBlob=read) as channel:
        with pytest.raises(FedlinkError) as e:
            await download(channel, tmp_path / "target")
    assert e.value.reason is Reason.BLOB_CORRUPT
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("lie", LATER_LIES)
async def test_a_lie_in_between_costs_only_itself(tmp_path: Path, lie: str) -> None:
    calls = 0

    async def read(request: bytes, context: Any) -> None:
        nonlocal calls
        calls += 1
        asked = pb.ReadBlobRequest.FromString(request)
        await context.write(honest_head())
        for message in LATER_LIES[lie] if calls == 1 else honest(asked.offset):
            await context.write(message)

    async with scripted(ReadBlob=read) as channel:
        await download(channel, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == DATA
    assert calls <= 2


async def test_a_call_that_the_server_cancels_is_not_our_cancellation(tmp_path: Path) -> None:
    calls = 0

    async def read(request: bytes, context: Any) -> None:
        nonlocal calls
        calls += 1
        await context.write(honest_head())
        if calls < 4:
            await context.abort(grpc.StatusCode.CANCELLED, "go away")
        for message in honest(pb.ReadBlobRequest.FromString(request).offset):
            await context.write(message)

    async def write(_requests: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.CANCELLED, "go away")

    async def start(_request: bytes, _context: Any) -> bytes:
        return pb.StartUploadResponse(upload_id=b"1" * 16).SerializeToString()

    source = tmp_path / "source"
    source.write_bytes(DATA)
    async with scripted(ReadBlob=read, WriteBlob=write, StartUpload=start) as channel:
        await download(channel, tmp_path / "target")
        with pytest.raises(FedlinkError) as e:
            await bulk.upload_file(
                channel, source, REF, LIST, TaskPurpose(b"t"), metadata=as_client("a"), retry=Retry(**QUICK, limit=3)
            )
    # What grpc.aio makes of a write into a call that has ended.
    assert e.value.reason is Reason.UNREACHABLE or "Internal error from Core" in e.value.message
    assert (tmp_path / "target").read_bytes() == DATA


async def test_a_server_that_falls_silent(tmp_path: Path) -> None:
    calls = 0

    async def read(request: bytes, context: Any) -> None:
        nonlocal calls
        calls += 1
        at = pb.ReadBlobRequest.FromString(request).offset
        await context.write(honest_head())
        await context.write(honest(at)[0])
        if at < 3 * MIB:
            await asyncio.sleep(30)

    async def silent(_requests: Any, _context: Any) -> None:
        await asyncio.sleep(30)

    async def start(_request: bytes, _context: Any) -> bytes:
        return pb.StartUploadResponse(upload_id=b"1" * 16).SerializeToString()

    source = tmp_path / "source"
    source.write_bytes(DATA * 10)
    async with scripted(ReadBlob=read, WriteBlob=silent, StartUpload=start, FindMissingBlobs=silent) as channel:
        await download(channel, tmp_path / "target", stall=0.2)
        assert calls == 4
        for work in (
            bulk.upload_file(
                channel,
                source,
                ref_of(DATA * 10),
                chunk_digests_of(DATA * 10),
                TaskPurpose(b"t"),
                metadata=as_client("a"),
                retry=Retry(**QUICK, limit=2),
                stall=0.2,
            ),
            bulk.find_missing(
                channel,
                TaskPurpose(b"t"),
                [bytes(32)],
                metadata=as_client("a"),
                retry=Retry(**QUICK, limit=2),
                stall=0.2,
            ),
        ):
            with pytest.raises(FedlinkError) as e:
                await work
            assert e.value.reason is Reason.UNREACHABLE
    assert (tmp_path / "target").read_bytes() == DATA


async def test_metadata_is_asked_for_with_every_call(tmp_path: Path) -> None:
    """So a new session, made while an upload waits, is used from then on."""
    seen = []

    async def start(_request: bytes, context: Any) -> bytes:
        seen.append(rpc.metadata_value(context.invocation_metadata(), rpc.META_CLIENT))
        if len(seen) < 3:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "later")
        return pb.StartUploadResponse(upload_id=b"1" * 16, complete=True).SerializeToString()

    source = tmp_path / "source"
    source.write_bytes(DATA)
    names = iter(["one", "two", "three"])
    async with scripted(StartUpload=start) as channel:
        await bulk.upload_file(
            channel,
            source,
            REF,
            LIST,
            TaskPurpose(b"t"),
            metadata=lambda: ((rpc.META_CLIENT, next(names)),),
            retry=Retry(**QUICK),
        )
    assert seen == ["one", "two", "three"]
