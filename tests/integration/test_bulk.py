"""Blobs over a real grpc.aio server: both ways, through cut lines, against hostile peers."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from fedlink import bulk, rpc
from fedlink.blobs import CHUNK_SIZE, chunk_digests_of, ref_of
from fedlink.errors import FedlinkError, Reason
from fedlink.transfer import Retry, TaskPurpose
from fedlink.v1 import blob_service_pb2 as pb
from fedlink.v1 import blob_service_pb2_grpc as pb_grpc
from fedlink.v1 import types_pb2
from fedserver.services.blob import BulkLimits
from tests.support.line import Line
from tests.support.transfer import QUICK, BlobServer, as_client, blob_server, channel_to, some_bytes

MIB = 1 << 20
TASK = TaskPurpose(b"task-a")


@pytest.mark.parametrize("size", [0, 1, CHUNK_SIZE, CHUNK_SIZE + 1, 9 * MIB + 5, 70 * MIB + 3])
async def test_up_and_down(tmp_path: Path, size: int) -> None:
    data = some_bytes(size)
    source = tmp_path / "source"
    source.write_bytes(data)
    ref, digests = bulk.hash_file(source)
    assert (ref, digests) == (ref_of(data), chunk_digests_of(data))
    async with blob_server(tmp_path / "server") as server, channel_to(server.address) as channel:
        seen: list[tuple[int, int]] = []
        await bulk.upload_file(
            channel, source, ref, digests, TASK, metadata=as_client("a"), on_progress=lambda *p: seen.append(p)
        )
        assert seen[-1] == (size, size)
        (upload_id,) = server.spool.ids()
        assert server.spool.complete(upload_id)
        assert server.spool.path(upload_id).read_bytes() == data
        assert server.access.written == size

        server.access.publish(data, tmp_path)
        target = tmp_path / "target"
        await bulk.download_blob(channel, ref, target, task_token=b"task-a", metadata=as_client("a"))
        assert target.read_bytes() == data
        assert server.access.read == size
        assert not list(tmp_path.glob("target.*"))


async def test_an_outage_is_not_said_at_every_try(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Impatient(random.Random):
        def random(self) -> float:
            return 0.001

    source = tmp_path / "source"
    source.write_bytes(b"x")
    ref, digests = bulk.hash_file(source)
    async with channel_to("127.0.0.1:1") as channel:
        with pytest.raises(FedlinkError):
            await bulk.upload_file(
                channel, source, ref, digests, TASK, metadata=as_client("a"), retry=Retry(limit=50), rng=Impatient()
            )
    assert capsys.readouterr().out.count("waiting to try again") == 1


async def test_through_a_line_that_breaks(tmp_path: Path) -> None:
    data = some_bytes(40 * MIB + 17)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(data)
    ref, digests = bulk.hash_file(source)
    cuts = [3 * MIB, 9 * MIB, 500, 11 * MIB, 2 * MIB, 12 * MIB]
    async with blob_server(tmp_path / "server") as server:
        with Line(server.address) as line:
            for number, n in enumerate(cuts, 1):
                line.cut(after_bytes=n, towards="server", connection=number)
            async with channel_to(line.address) as channel:
                await bulk.upload_file(
                    channel, source, ref, digests, TASK, metadata=as_client("a"), retry=Retry(**QUICK)
                )
        (upload_id,) = server.spool.ids()
        assert server.spool.path(upload_id).read_bytes() == data
        assert server.access.written == len(data)
        server.access.publish(data, tmp_path)
        with Line(server.address) as line:
            for number, n in enumerate(cuts, 1):
                line.cut(after_bytes=n, towards="client", connection=number)
            async with channel_to(line.address) as channel:
                await bulk.download_blob(
                    channel, ref, target, task_token=b"task-a", metadata=as_client("a"), retry=Retry(**QUICK)
                )
        assert target.read_bytes() == data
        assert server.access.read < len(data) + len(cuts) * 16 * MIB


class Peer:
    """A client of its own kind: the generated stubs and nothing else."""

    def __init__(self, channel: grpc.aio.Channel, name: str = "a") -> None:
        self.stub = pb_grpc.BlobServiceStub(channel)
        self.metadata = as_client(name)()

    async def start(self, data: bytes, token: bytes = b"task-a", **changes: Any) -> pb.StartUploadResponse:
        ref = ref_of(data)
        fields: dict[str, Any] = {
            "task_token": token,
            "blob": types_pb2.BlobRef(digest=ref.digest, size=ref.size),
            "chunk_digests": chunk_digests_of(data),
        }
        return await self.stub.StartUpload(pb.StartUploadRequest(**fields | changes), metadata=self.metadata)

    async def write(self, *messages: pb.WriteBlobRequest) -> pb.WriteBlobResponse:
        return await self.stub.WriteBlob(iter(messages), metadata=self.metadata)

    async def committed(self, upload_id: bytes) -> int:
        answer = await self.stub.QueryUpload(pb.QueryUploadRequest(upload_id=upload_id), metadata=self.metadata)
        return answer.committed_size

    async def read(self, digest: bytes, token: bytes = b"task-a", **fields: Any) -> list[pb.ReadBlobResponse]:
        request = pb.ReadBlobRequest(task_token=token, digest=digest, **fields)
        return [message async for message in self.stub.ReadBlob(request, metadata=self.metadata)]


def head(upload_id: bytes) -> pb.WriteBlobRequest:
    return pb.WriteBlobRequest(upload_id=upload_id)


def chunks(data: bytes, start: int = 0) -> list[pb.WriteBlobRequest]:
    return [
        pb.WriteBlobRequest(offset=at, payload=data[at : at + CHUNK_SIZE]) for at in range(start, len(data), CHUNK_SIZE)
    ]


@contextlib.contextmanager
def refused(reason: Reason, **metadata: str) -> Iterator[None]:
    with pytest.raises(grpc.aio.AioRpcError) as e:
        yield
    error = rpc.from_rpc_error(e.value)
    assert e.value.code().name == reason.status
    assert error.reason is reason
    assert metadata.items() <= error.metadata.items()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[BlobServer]:
    async with blob_server(tmp_path / "server") as server:
        yield server


@pytest.fixture
async def channel(server: BlobServer) -> AsyncIterator[grpc.aio.Channel]:
    async with channel_to(server.address) as channel:
        yield channel


async def test_stock_protobuf_peer(server: BlobServer, channel: grpc.aio.Channel, tmp_path: Path) -> None:
    data = some_bytes(66 * MIB + 9)
    peer = Peer(channel)
    started = await peer.start(data)
    messages = chunks(data)
    written = await peer.write(head(started.upload_id), *messages[:64])
    assert (written.committed_size, written.complete) == (64 * MIB, False)
    again = await peer.start(data)
    assert (again.upload_id, again.committed_size) == (started.upload_id, 64 * MIB)
    written = await peer.write(head(started.upload_id), *messages[64:])
    assert (written.committed_size, written.complete) == (len(data), True)
    assert server.spool.path(started.upload_id).read_bytes() == data

    ref = server.access.publish(data, tmp_path)
    first, *rest = await peer.read(ref.digest, include_chunk_digests=True)
    assert (first.size, first.chunk_digests, first.payload) == (len(data), chunk_digests_of(data), b"")
    assert [m.offset for m in rest] == [i * MIB for i in range(64)]
    (_, *rest) = await peer.read(ref.digest, offset=64 * MIB)
    assert b"".join(m.payload for m in rest) == data[64 * MIB :]
    (_, *rest) = await peer.read(ref.digest, offset=65 * MIB, limit=MIB + 5)
    assert b"".join(m.payload for m in rest) == data[65 * MIB : 66 * MIB]
    (_, *rest) = await peer.read(ref.digest, offset=66 * MIB, limit=9)
    assert b"".join(m.payload for m in rest) == data[66 * MIB :]


async def test_the_server_ends_a_stream_at_its_limit(server: BlobServer, channel: grpc.aio.Channel) -> None:
    data = some_bytes(66 * MIB)
    peer = Peer(channel)
    started = await peer.start(data)
    written = await peer.write(head(started.upload_id), *chunks(data))
    assert written.committed_size == 64 * MIB


async def test_bytes_that_are_here_are_not_sent(server: BlobServer, channel: grpc.aio.Channel, tmp_path: Path) -> None:
    data = some_bytes(2 * MIB)
    ref = server.access.publish(data, tmp_path)
    source = tmp_path / "source"
    source.write_bytes(data)
    other = b"\1" * 32
    missing = await bulk.find_missing(channel, TASK, [other, ref.digest], metadata=as_client("a"))
    assert missing == [other]
    many = [i.to_bytes(32, "big") for i in range(5000)]
    assert await bulk.find_missing(channel, TASK, many, metadata=as_client("a")) == many
    await bulk.upload_file(channel, source, ref, chunk_digests_of(data), TASK, metadata=as_client("a"))
    assert server.access.written == 0


async def test_wrong_messages(server: BlobServer, channel: grpc.aio.Channel) -> None:
    data = some_bytes(5 * MIB + 1)
    peer = Peer(channel)
    upload = head((await peer.start(data)).upload_id)
    messages = chunks(data)
    with refused(Reason.OFFSET_MISMATCH, committed_size="0"):
        await peer.write(upload, messages[1])
    with refused(Reason.OFFSET_MISMATCH, committed_size=str(2 * MIB)):
        await peer.write(upload, messages[0], messages[1], messages[3])
    with refused(Reason.OFFSET_MISMATCH, committed_size=str(2 * MIB)):
        await peer.write(upload, messages[1])
    bad = pb.WriteBlobRequest(offset=3 * MIB, payload=bytes(MIB))
    with refused(Reason.CHUNK_CORRUPT, committed_size=str(3 * MIB)):
        await peer.write(upload, messages[2], bad, messages[4])
    half = pb.WriteBlobRequest(offset=3 * MIB, payload=messages[3].payload[: MIB // 2])
    with refused(Reason.CHUNK_SIZE, committed_size=str(3 * MIB)):
        await peer.write(upload, half)
    double = pb.WriteBlobRequest(offset=3 * MIB, payload=data[3 * MIB : 5 * MIB])
    with refused(Reason.CHUNK_SIZE, committed_size=str(3 * MIB)):
        await peer.write(upload, double)
    with refused(Reason.CHUNK_SIZE, committed_size=str(4 * MIB)):
        await peer.write(upload, messages[3], upload)
    assert await peer.committed(upload.upload_id) == 4 * MIB
    written = await peer.write(upload, *messages[4:])
    assert written.complete
    # Nothing follows the last byte; what is sent all the same is not read.
    assert (await peer.write(upload, messages[0])).complete
    assert server.spool.path(upload.upload_id).read_bytes() == data


async def test_garbage_instead_of_messages(server: BlobServer, channel: grpc.aio.Channel) -> None:
    raw = channel.stream_unary("/fedlink.v1.BlobService/WriteBlob")
    with refused(Reason.CHUNK_SIZE):
        await raw(iter([b"\xff" * 40]), metadata=as_client("a")())
    with refused(Reason.UPLOAD_NOT_FOUND):
        await raw(iter([]), metadata=as_client("a")())
    with refused(Reason.UPLOAD_NOT_FOUND):
        await raw(iter([rpc.chunk_message(0, b"early")]), metadata=as_client("a")())
    peer = Peer(channel)
    upload_id = (await peer.start(some_bytes(MIB))).upload_id
    with refused(Reason.CHUNK_SIZE):
        await raw(iter([head(upload_id).SerializeToString(), b"\xff" * 40]), metadata=as_client("a")())
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await raw(iter([bytes(5 * MIB)]), metadata=as_client("a")())
    assert e.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_hostile_requests(server: BlobServer, channel: grpc.aio.Channel, tmp_path: Path) -> None:
    data = some_bytes(3 * MIB)
    ref = server.access.publish(data, tmp_path)
    peer, other, nobody = Peer(channel), Peer(channel, "b"), Peer(channel)
    nobody.metadata = ()
    upload_id = (await peer.start(some_bytes(MIB, 1))).upload_id
    for digest in (b"", b"short", b"\0" * 32, b"../../../../../../../../etc/passw"[:32]):
        with refused(Reason.BLOB_NOT_FOUND):
            await peer.read(digest)
    with refused(Reason.TASK_NOT_FOUND):
        await other.read(ref.digest)
    with refused(Reason.BAD_CREDENTIALS):
        await nobody.read(ref.digest)
    for offset in (1, 4 * MIB, (1 << 64) - MIB):
        with refused(Reason.OFFSET_MISMATCH):
            await peer.read(ref.digest, offset=offset)
    assert len(await peer.read(ref.digest, limit=(1 << 64) - 1)) == 4
    assert len(await peer.read(ref.digest, offset=3 * MIB)) == 1

    with refused(Reason.UPLOAD_NOT_FOUND):
        await other.write(head(upload_id), *chunks(some_bytes(MIB, 1)))
    with refused(Reason.UPLOAD_NOT_FOUND):
        await other.committed(upload_id)
    for name in (b"", b"../../..", b"x" * 16, b"x" * 100_000):
        with refused(Reason.UPLOAD_NOT_FOUND):
            await peer.write(head(name))
        with refused(Reason.UPLOAD_NOT_FOUND):
            await peer.committed(name)

    huge = types_pb2.BlobRef(digest=ref.digest, size=(64 << 30) + 1)
    with refused(Reason.TOO_LARGE):
        await peer.start(data, blob=huge)
    with refused(Reason.TOO_LARGE):
        await peer.start(data, blob=types_pb2.BlobRef(digest=ref.digest, size=(1 << 64) - 1))
    with refused(Reason.DIGEST_MISMATCH):
        await peer.start(data, blob=types_pb2.BlobRef(digest=ref.digest, size=len(data) + 2 * MIB))
    with refused(Reason.DIGEST_MISMATCH):
        await peer.start(data, chunk_digests=bytes(96))
    with refused(Reason.DIGEST_MISMATCH):
        await peer.start(data, blob=types_pb2.BlobRef(digest=b"", size=len(data)))
    with refused(Reason.TASK_NOT_FOUND):
        await peer.stub.StartUpload(pb.StartUploadRequest(), metadata=peer.metadata)
    with refused(Reason.NOT_AN_OPERATOR):
        await peer.stub.StartUpload(pb.StartUploadRequest(import_id=bytes(16)), metadata=peer.metadata)
    with refused(Reason.NOT_AN_OPERATOR):
        await peer.stub.FindMissingBlobs(pb.FindMissingBlobsRequest(import_id=bytes(16)), metadata=peer.metadata)
    with refused(Reason.TOO_LARGE):
        asked = pb.FindMissingBlobsRequest(task_token=b"task-a", digests=[bytes(32)] * 4097)
        await peer.stub.FindMissingBlobs(asked, metadata=peer.metadata)
    with refused(Reason.DIGEST_MISMATCH):
        asked = pb.FindMissingBlobsRequest(task_token=b"task-a", digests=[b"short"])
        await peer.stub.FindMissingBlobs(asked, metadata=peer.metadata)
    assert list(server.spool.ids()) == [upload_id]


async def test_the_newer_writer_wins(server: BlobServer, channel: grpc.aio.Channel) -> None:
    data = some_bytes(8 * MIB)
    peer = Peer(channel)
    upload_id = (await peer.start(data)).upload_id
    messages = chunks(data)
    half_open = peer.stub.WriteBlob(metadata=peer.metadata)
    await half_open.write(head(upload_id))
    for message in messages[:3]:
        await half_open.write(message)
    while await peer.committed(upload_id) < 3 * MIB:
        await asyncio.sleep(0.01)
    newer = peer.stub.WriteBlob(metadata=peer.metadata)
    await newer.write(head(upload_id))
    await newer.write(messages[3])
    with refused(Reason.UPLOAD_SUPERSEDED):
        await half_open
    for message in messages[4:]:
        await newer.write(message)
    assert (await newer).complete
    assert server.spool.path(upload_id).read_bytes() == data


async def test_two_whole_writers_at_once(server: BlobServer, tmp_path: Path) -> None:
    data = some_bytes(30 * MIB)
    source = tmp_path / "source"
    source.write_bytes(data)
    ref, digests = bulk.hash_file(source)
    async with channel_to(server.address) as one, channel_to(server.address) as two:
        await asyncio.gather(
            *(
                bulk.upload_file(c, source, ref, digests, TASK, metadata=as_client("a"), retry=Retry(**QUICK))
                for c in (one, two)
            )
        )
    (upload_id,) = server.spool.ids()
    assert server.spool.path(upload_id).read_bytes() == data


async def test_admission_and_stall(tmp_path: Path) -> None:
    limits = BulkLimits(streams=3, crowd=1, streams_per_caller=2, retry_after=0.02, stall=0.5)
    data = some_bytes(64 * MIB)
    async with blob_server(tmp_path / "server", limits) as server, channel_to(server.address) as channel:
        ref = server.access.publish(data, tmp_path)
        calls = []
        for name in ("a", "a", "b"):
            request = pb.ReadBlobRequest(task_token=b"task-" + name.encode(), digest=ref.digest)
            call = pb_grpc.BlobServiceStub(channel).ReadBlob(request, metadata=as_client(name)())
            assert (await call.read()).size == ref.size
            calls.append(call)
            if len(calls) == 2:
                with refused(Reason.BUSY):
                    await Peer(channel).read(ref.digest)
        with refused(Reason.BUSY):
            await Peer(channel, "b").read(ref.digest, b"task-b")
        # Those that take nothing lose their places, and everybody gets through.
        target = tmp_path / "target"
        await bulk.download_blob(
            channel, ref, target, task_token=b"task-a", metadata=as_client("a"), retry=Retry(**QUICK)
        )
        assert target.stat().st_size == ref.size
        silent = pb_grpc.BlobServiceStub(channel).WriteBlob(metadata=as_client("a")())
        await silent.write(head((await Peer(channel).start(some_bytes(MIB))).upload_id))
        with refused(Reason.BUSY):
            await silent
        for call in calls:
            call.cancel()


async def test_fatal_answers_end_at_once(server: BlobServer, channel: grpc.aio.Channel, tmp_path: Path) -> None:
    data = some_bytes(3 * MIB)
    source = tmp_path / "source"
    source.write_bytes(data)
    ref, digests = bulk.hash_file(source)
    target = tmp_path / "target"
    with pytest.raises(FedlinkError) as e:
        await bulk.download_blob(channel, ref, target, task_token=b"task-a", metadata=as_client("a"))
    assert e.value.reason is Reason.BLOB_NOT_FOUND
    with pytest.raises(FedlinkError) as e:
        await bulk.upload_file(channel, source, ref, digests, TaskPurpose(b"stale"), metadata=as_client("a"))
    assert e.value.reason is Reason.TASK_NOT_FOUND
    server.access.closed = True
    with pytest.raises(FedlinkError) as e:
        await bulk.upload_file(channel, source, ref, digests, TASK, metadata=as_client("a"))
    assert e.value.reason is Reason.ROUND_CLOSED
    with pytest.raises(FedlinkError) as e:
        await bulk.find_missing(channel, TASK, [ref.digest], metadata=as_client("a"))
    assert e.value.reason is Reason.ROUND_CLOSED
    assert not target.exists()


@pytest.mark.parametrize("changed", [bytes(2 * MIB), bytes(9)])
async def test_file_that_changed_is_given_up(
    changed: bytes, server: BlobServer, channel: grpc.aio.Channel, tmp_path: Path
) -> None:
    data = some_bytes(6 * MIB)
    source = tmp_path / "source"
    source.write_bytes(data)
    ref, digests = bulk.hash_file(source)
    source.write_bytes(data[: 4 * MIB] + changed)
    with pytest.raises(FedlinkError) as e:
        await bulk.upload_file(channel, source, ref, digests, TASK, metadata=as_client("a"), retry=Retry(**QUICK))
    assert e.value.reason is Reason.BLOB_CORRUPT


async def test_blob_that_rots_on_the_server_is_not_taken(
    server: BlobServer, channel: grpc.aio.Channel, tmp_path: Path
) -> None:
    data = some_bytes(6 * MIB)
    ref = server.access.publish(data, tmp_path)
    with server.store.local_path(ref.digest).open("r+b") as f:
        f.seek(5 * MIB)
        f.write(b"rotten")
    target = tmp_path / "target"
    with pytest.raises(FedlinkError) as e:
        await bulk.download_blob(
            channel, ref, target, task_token=b"task-a", metadata=as_client("a"), retry=Retry(**QUICK)
        )
    assert e.value.reason is Reason.BLOB_CORRUPT
    assert "on the server's disk" in e.value.message
    assert f"byte {5 * MIB}" in e.value.message
    assert server.access.found_damaged == [ref.digest]
    assert not target.exists()
    # The good chunks came once, before the server looked; what it found damaged never left it.
    assert server.access.read < 2 * ref.size


async def test_bytes_damaged_on_the_line_come_again(
    server: BlobServer, channel: grpc.aio.Channel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = some_bytes(6 * MIB)
    ref = server.access.publish(data, tmp_path)
    real, damaged = bulk._Fetching._checked, []

    def checked(self: Any, message: Any, position: int, stop: int) -> Any:
        payload = real(self, message, position, stop)
        if position == 3 * MIB and not damaged:
            damaged.append(position)
            return bytes(len(payload))
        return payload

    monkeypatch.setattr(bulk._Fetching, "_checked", checked)
    target = tmp_path / "target"
    await bulk.download_blob(channel, ref, target, task_token=b"task-a", metadata=as_client("a"), retry=Retry(**QUICK))
    assert target.read_bytes() == data
    assert damaged
    assert not server.access.found_damaged


async def test_unreachable_server(tmp_path: Path) -> None:
    data = some_bytes(20 * MIB)
    source = tmp_path / "source"
    source.write_bytes(data)
    ref, digests = bulk.hash_file(source)
    async with blob_server(tmp_path / "server") as server, channel_to(server.address) as channel:
        await server.stop()
        with pytest.raises(FedlinkError) as e:
            await bulk.upload_file(
                channel, source, ref, digests, TASK, metadata=as_client("a"), retry=Retry(**QUICK, limit=3)
            )
        assert e.value.reason is Reason.UNREACHABLE
        # For ever means until it is back, with the slots it had.
        upload = asyncio.create_task(
            bulk.upload_file(channel, source, ref, digests, TASK, metadata=as_client("a"), retry=Retry(**QUICK))
        )
        await server.start()
        while server.access.written < 4 * MIB and not upload.done():
            await asyncio.sleep(0.001)
        await server.stop()
        await server.start()
        await upload
        (upload_id,) = server.spool.ids()
        assert server.spool.path(upload_id).read_bytes() == data


async def test_download_goes_on_from_what_is_there(
    server: BlobServer, channel: grpc.aio.Channel, tmp_path: Path
) -> None:
    data = some_bytes(10 * MIB + 7)
    ref = server.access.publish(data, tmp_path)
    target = tmp_path / "target"
    part, chunk_list = tmp_path / "target.part", tmp_path / "target.chunks"

    async def fetched() -> int:
        before = server.access.read
        await bulk.download_blob(channel, ref, target, task_token=b"task-a", metadata=as_client("a"))
        assert target.read_bytes() == data
        assert not part.exists()
        assert not chunk_list.exists()
        return server.access.read - before

    part.write_bytes(data[: 4 * MIB + 99] + bytes(100))
    chunk_list.write_bytes(chunk_digests_of(data))
    assert await fetched() == len(data) - 4 * MIB
    part.write_bytes(data[: 2 * MIB] + bytes(MIB) + data[3 * MIB :])
    chunk_list.write_bytes(chunk_digests_of(data))
    assert await fetched() == len(data) - 2 * MIB
    part.write_bytes(data + b"too long")
    chunk_list.write_bytes(chunk_digests_of(data))
    assert await fetched() == 0
    part.write_bytes(data)
    chunk_list.write_bytes(bytes(320))
    assert await fetched() == len(data)


async def test_cancelled_in_the_middle(server: BlobServer, channel: grpc.aio.Channel, tmp_path: Path) -> None:
    data = some_bytes(60 * MIB)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(data)
    ref, digests = bulk.hash_file(source)
    server.access.publish(some_bytes(60 * MIB), tmp_path)

    def stop_at(done: int, size: int) -> None:
        if done >= size // 3:
            task = asyncio.current_task()
            assert task
            task.cancel()

    async def up() -> None:
        await bulk.upload_file(channel, source, ref, digests, TASK, metadata=as_client("a"), on_progress=stop_at)

    async def down() -> None:
        await bulk.download_blob(
            channel, ref, target, task_token=b"task-a", metadata=as_client("a"), on_progress=stop_at
        )

    server.access.published.clear()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(up())
    server.access.published[ref.digest] = ref
    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(down())
    assert (tmp_path / "target.part").stat().st_size > 0
    while server.access.written == 0:
        await asyncio.sleep(0.01)
    await bulk.upload_file(channel, source, ref, digests, TASK, metadata=as_client("a"), retry=Retry(**QUICK))
    (upload_id,) = server.spool.ids()
    assert server.spool.path(upload_id).read_bytes() == data


async def test_a_small_blob_comes_along_with_the_call_that_announces_it(
    server: BlobServer, channel: grpc.aio.Channel
) -> None:
    peer = Peer(channel)
    data, other = b"small" * 100, b"large" * 20_000
    whole = await peer.start(data, content=data)
    assert whole.complete
    assert whole.committed_size == len(data)
    assert server.spool.path(whole.upload_id).read_bytes() == data
    again = await peer.start(data, content=b"something else: it is here already")
    assert again.complete
    with refused(Reason.CHUNK_SIZE):
        await peer.start(b"other", content=b"othe")
    with refused(Reason.CHUNK_CORRUPT):
        await peer.start(b"other", content=b"0ther")
    assert (await peer.start(b"other")).committed_size == 0
    with refused(Reason.CHUNK_SIZE):
        await peer.start(other, content=other)
