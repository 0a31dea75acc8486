"""What the .proto promises of single calls, over real sockets."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from fedlink import PROTOCOL_VERSION, rpc
from fedlink.blobs import MAX_MESSAGE_BYTES
from fedlink.errors import FedlinkError, Reason
from fedlink.v1 import admin_service_pb2 as admin_pb
from fedlink.v1 import coordination_service_pb2 as pb
from fedlink.v1.coordination_service_pb2_grpc import CoordinationServiceStub
from fedserver.app import running
from fedserver.remote import Admin
from fedserver.settings import ServerSettings
from tests.support.server import SCHEMA
from tests.support.shards import T, write_safetensors


@pytest.fixture
async def fed(tmp_path: Path) -> AsyncIterator[tuple[Any, Admin]]:
    data_dir = tmp_path / "data"
    async with (
        running(ServerSettings(data_dir=data_dir, listen="127.0.0.1:0")) as app,
        grpc.aio.insecure_channel(app.address, options=rpc.channel_options()) as channel,
        Admin(data_dir) as admin,
    ):
        write_safetensors(tmp_path / "start.safetensors", [T.of("w", "F32", [1.0, 2.0])])
        await admin.import_model(
            tmp_path / "start.safetensors", "start", buffers=(), frozen=(), progress=lambda *_: None
        )
        yield CoordinationServiceStub(channel), admin


async def refused(call: Any) -> Reason:
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call
    return rpc.from_rpc_error(e.value).reason


async def join(site: Any, name: str = "a") -> list[tuple[str, Any]]:
    offer = pb.RegisterClientRequest.WorkloadOffer(name="w", settings_schema_json=SCHEMA, abilities=["train"])
    request = pb.RegisterClientRequest(instance_id=os.urandom(16), protocol_version=PROTOCOL_VERSION, workloads=[offer])
    metadata = [(rpc.META_CLIENT, name)]
    session = (await site.RegisterClient(request, metadata=metadata)).session
    return [*metadata, (rpc.META_SESSION, session)]


async def begin(admin: Admin, name: str = "r", **spec: Any) -> admin_pb.Run:
    table = {"name": name, "workload": "w", "rounds": 1, "model": "start", "cohort": {"min_clients": 1}, **spec}
    return await admin.create_run(json.dumps(table))


async def poll(site: Any, metadata: Any, *held: bytes, wait: int = 5000) -> pb.PollTaskResponse:
    request = pb.PollTaskRequest(held_tokens=held)
    request.wait.FromMilliseconds(wait)
    return await site.PollTask(request, metadata=metadata)


async def test_a_repeated_failure_gives_the_same_answer(fed: tuple[Any, Admin]):
    site, admin = fed
    metadata = await join(site)
    await begin(admin)
    token = (await poll(site, metadata)).task.token
    request = pb.FailTaskRequest(token=token, reason=pb.FailTaskRequest.REASON_EXCEPTION, exception_class="ValueError")
    for _ in range(2):
        await site.FailTask(request, metadata=metadata)
    assert await refused(site.FailTask(pb.FailTaskRequest(token=b"x" * 24), metadata=metadata)) is Reason.TASK_NOT_FOUND
    beat = site.ExtendLease(pb.ExtendLeaseRequest(token=token), metadata=metadata)
    assert await refused(beat) is Reason.ROUND_CLOSED


async def test_a_repeated_goodbye_gives_the_same_answer(fed: tuple[Any, Admin]):
    site, admin = fed
    first = await join(site)
    for _ in range(2):
        await site.DeregisterClient(pb.DeregisterClientRequest(), metadata=first)
    clients = await admin.pages(admin.stub.ListClients, admin_pb.ListClientsRequest(), "clients")
    assert [c.connected for c in clients] == [False]
    # The session is over for every other call, and the goodbye of a process that another replaced is told so.
    assert await refused(site.PollTask(pb.PollTaskRequest(), metadata=first)) is Reason.SESSION_UNKNOWN
    second, third = await join(site), await join(site)
    assert (
        await refused(site.DeregisterClient(pb.DeregisterClientRequest(), metadata=second)) is Reason.SESSION_REPLACED
    )
    assert (await poll(site, third, wait=0)).task.token == b""


async def test_what_a_newer_client_says_in_numbers_unknown_here_is_taken(fed: tuple[Any, Admin]):
    site, admin = fed
    metadata = await join(site)
    await begin(admin)
    token = (await poll(site, metadata)).task.token
    await site.ExtendLease(pb.ExtendLeaseRequest(token=token, activity=99), metadata=metadata)
    await site.FailTask(pb.FailTaskRequest(token=token, reason=99), metadata=metadata)
    found = (await admin.stub.GetRound(admin_pb.GetRoundRequest(run="r", number=1))).round
    assert found.attempt == 2  # the first one failed with its only task


async def test_settings_travel_as_short_as_they_were_checked(fed: tuple[Any, Admin]):
    site, admin = fed
    schema = json.dumps({"type": "object", "additionalProperties": False, "properties": {"text": {"type": "string"}}})
    offer = pb.RegisterClientRequest.WorkloadOffer(name="w", settings_schema_json=schema, abilities=["train"])
    request = pb.RegisterClientRequest(instance_id=os.urandom(16), protocol_version=PROTOCOL_VERSION, workloads=[offer])
    metadata: list[tuple[str, Any]] = [(rpc.META_CLIENT, "a")]
    metadata.append((rpc.META_SESSION, (await site.RegisterClient(request, metadata=metadata)).session))
    text = "é" * 20_000
    await admin.call(
        admin.stub.CreateRun,
        admin_pb.CreateRunRequest(
            spec_json=json.dumps(
                {
                    "name": "r",
                    "workload": "w",
                    "rounds": 1,
                    "model": "start",
                    "settings": {"text": text},
                    "cohort": {"min_clients": 1},
                },
                ensure_ascii=False,
            ),
            request_id=os.urandom(16),
        ),
    )
    task = (await poll(site, metadata)).task
    assert json.loads(task.settings_json) == {"text": text}
    assert len(task.settings_json.encode()) < 64 << 10


async def test_a_task_says_how_many_rounds_the_run_has_now(fed: tuple[Any, Admin]):
    site, admin = fed
    await begin(admin, rounds=2)
    await admin.call(admin.stub.ExtendRun, admin_pb.ExtendRunRequest(run="r", rounds=5))
    assert (await poll(site, await join(site))).task.rounds == 5


async def test_a_site_has_no_say_on_the_operators_listener(fed: tuple[Any, Admin]):
    _, admin = fed
    for metadata in ([(rpc.META_CLIENT, "a")], [(rpc.META_AUTHORIZATION, "Bearer x")]):
        call = admin.stub.ListRuns(admin_pb.ListRunsRequest(), metadata=metadata)
        assert await refused(call) is Reason.NOT_AN_OPERATOR


async def test_a_page_fits_into_a_message(fed: tuple[Any, Admin]):
    _, admin = fed
    cohort = {"min_clients": 9}
    for i in range(90):
        await begin(admin, f"r{i}", settings={f"k{j}": "x" * 1000 for j in range(60)}, cohort=cohort)
    request = admin_pb.ListRunsRequest(page_size=1000)
    first = await admin.stub.ListRuns(request)
    assert first.ByteSize() < MAX_MESSAGE_BYTES
    assert 0 < len(first.runs) < 90
    runs = await admin.pages(admin.stub.ListRuns, request, "runs")
    assert [r.name for r in runs] == [f"r{i}" for i in range(90)]


@pytest.mark.parametrize("token", ["x", "-1", "²", "9" * 40])
async def test_a_page_token_that_is_none_is_refused(fed: tuple[Any, Admin], token: str):
    _, admin = fed
    with pytest.raises(FedlinkError) as e:
        await admin.call(admin.stub.ListModels, admin_pb.ListModelsRequest(page_token=token))
    assert e.value.reason is Reason.BAD_PAGE


@pytest.mark.parametrize("name", ["nothing", "r@", "r@x", "r@²", "r@" + "9" * 40, "r@7"])
async def test_a_model_that_is_not_there(fed: tuple[Any, Admin], name: str):
    _, admin = fed
    await begin(admin)
    with pytest.raises(FedlinkError) as e:
        await admin.call(admin.stub.GetModel, admin_pb.GetModelRequest(name=name))
    assert e.value.reason is Reason.MODEL_NOT_FOUND
