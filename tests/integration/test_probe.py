"""ProbeDownload and ProbeUpload against a real server: bounds, credentials, places, and what they leave alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from fedclient.checks import Examination, bandwidth
from fedclient.settings import SiteSettings, WorkloadSettings
from fedlink import rpc
from fedlink.blobs import CHUNK_SIZE, MAX_PROBE_BYTES
from fedlink.errors import Reason
from fedlink.v1 import blob_service_pb2 as pb
from fedlink.v1 import blob_service_pb2_grpc as pb_grpc
from fedlink.v1.coordination_service_pb2 import GetServerInfoResponse
from fedserver.app import running
from fedserver.services import probe
from fedserver.services.admission import Admission, BulkLimits
from fedserver.services.probe import ProbeServicer
from fedserver.settings import ServerSettings
from tests.support.peer import Peer, refusal
from tests.support.transfer import as_client, channel_to, identify

MIB = 1 << 20
LIMITS = BulkLimits(streams=2, streams_per_caller=1, retry_after=0.01)


@pytest.fixture
async def stub() -> AsyncIterator[pb_grpc.BlobServiceStub]:
    """The probes alone, with one place for each caller."""
    server = grpc.aio.server(options=rpc.server_options())
    ProbeServicer(identify=identify, admission=Admission(LIMITS)).add_to_server(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with channel_to(f"127.0.0.1:{port}") as channel:
        yield pb_grpc.BlobServiceStub(channel)
    await server.stop(None)


def down(stub: pb_grpc.BlobServiceStub, size: int, name: str = "a") -> grpc.aio.UnaryStreamCall:
    return stub.ProbeDownload(pb.ProbeDownloadRequest(size=size), metadata=as_client(name)())


def up(stub: pb_grpc.BlobServiceStub, *sizes: int, name: str = "a") -> grpc.aio.StreamUnaryCall:
    messages = (pb.ProbeUploadRequest(payload=bytes(size)) for size in sizes)
    return stub.ProbeUpload(iter(messages), metadata=as_client(name)())


async def reason(call: grpc.aio.Call) -> Reason:
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call.read() if isinstance(call, grpc.aio.UnaryStreamCall) else await call
    return rpc.from_rpc_error(e.value).reason


@pytest.mark.parametrize("size", [0, 1, MIB, 3 * MIB + 7, MAX_PROBE_BYTES])
async def test_as_many_bytes_come_as_were_asked_for(stub: pb_grpc.BlobServiceStub, size: int) -> None:
    messages = [m async for m in down(stub, size)]
    assert sum(len(m.payload) for m in messages) == size
    assert [m.offset for m in messages] == list(range(0, size, CHUNK_SIZE))
    assert all(len(m.payload) <= CHUNK_SIZE for m in messages)


async def test_what_came_is_counted(stub: pb_grpc.BlobServiceStub) -> None:
    assert (await up(stub)).received == 0
    assert (await up(stub, MIB, 0, 5)).received == MIB + 5
    assert (await up(stub, *[MIB] * 40)).received == MAX_PROBE_BYTES


async def test_the_fast_codec_is_counted_too(stub: pb_grpc.BlobServiceStub) -> None:
    message = pb.ProbeUploadRequest.FromString(rpc.chunk_message(0, bytes(MIB)))
    assert (await stub.ProbeUpload(iter([message]), metadata=as_client("a")())).received == MIB


async def test_too_much_and_nobody_are_refused(stub: pb_grpc.BlobServiceStub) -> None:
    assert await reason(down(stub, MAX_PROBE_BYTES + 1)) is Reason.TOO_LARGE
    assert await reason(stub.ProbeDownload(pb.ProbeDownloadRequest(size=1))) is Reason.BAD_CREDENTIALS
    assert await reason(stub.ProbeUpload(iter([]))) is Reason.BAD_CREDENTIALS


async def test_places_are_shared_and_come_back(stub: pb_grpc.BlobServiceStub) -> None:
    held = down(stub, MAX_PROBE_BYTES)
    await held.read()  # 31 MiB wait for a reader
    assert await reason(down(stub, 1)) is Reason.BUSY
    assert await reason(up(stub, 1)) is Reason.BUSY
    assert [m async for m in down(stub, 0)] == []  # takes no place
    assert len([m async for m in down(stub, 1, name="b")]) == 1
    held.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await held.read()
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                assert (await up(stub, 5)).received == 5
                return
            await asyncio.sleep(0.01)


async def test_a_sender_that_stands_still_loses_its_place(
    stub: pb_grpc.BlobServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "PROBE_SECONDS", 0.2)
    call = stub.ProbeUpload(metadata=as_client("a")())
    await call.write(pb.ProbeUploadRequest(payload=bytes(9)))
    assert (await asyncio.wait_for(call, 10)).received == 9


@pytest.mark.parametrize(("streams", "outcome"), [(1, "ok"), (0, "skipped")])
async def test_the_doctor_measures_or_comes_back_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams: int, outcome: str
) -> None:
    monkeypatch.setattr(bandwidth, "_BUSY_TRIES", 2)
    server = grpc.aio.server(options=rpc.server_options())
    limits = BulkLimits(streams=streams, streams_per_caller=1)
    ProbeServicer(identify=identify, admission=Admission(limits)).add_to_server(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    workload = {"w": WorkloadSettings(trainer="m:C")}
    site = SiteSettings(name="ada", server=f"127.0.0.1:{port}", state_dir=tmp_path / "state", workload=workload)
    async with Examination(site, tmp_path / "site.toml") as visit:
        visit.server = GetServerInfoResponse(features=["probe"])
        found = await bandwidth.check_bandwidth(visit)
    await server.stop(None)
    assert found.outcome.value == outcome, found
    assert ("MB/s down" in found.found) is (outcome == "ok")


async def test_beside_a_session_that_stays_as_it_is(tmp_path: Path) -> None:
    async with running(ServerSettings(data_dir=tmp_path / "data", listen="127.0.0.1:0")) as app:
        await asyncio.to_thread(_beside, app.address)


def _beside(address: str) -> None:
    with Peer(address, "ada") as daemon, Peer(address, "ada") as doctor:
        daemon.register()
        request = pb.ProbeDownloadRequest(size=2 * MIB)
        assert sum(len(m.payload) for m in doctor.call(doctor.blobs.ProbeDownload, request)) == 2 * MIB
        answer = doctor.call(doctor.blobs.ProbeUpload, iter([pb.ProbeUploadRequest(payload=b"abc")]))
        assert answer.received == 3
        daemon.poll()
    with Peer(address, "ada", token="fedlink_wrong") as stranger, refusal(Reason.BAD_CREDENTIALS):
        list(stranger.call(stranger.blobs.ProbeDownload, pb.ProbeDownloadRequest()))
