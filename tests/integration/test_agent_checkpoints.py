"""The daemon and the checkpoints of its trainings: gone on from after a kill or a crash, and deleted when over."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from fedlink.errors import Reason
from fedlink.v1 import coordination_service_pb2 as pb
from tests.support.fake_server import FakeServer
from tests.support.site import Site, add_model, journal, killed, running, train_task, values


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer() as running:
        yield running


CHECKPOINTS = "checkpoint_every = 1e-9"
"""A checkpoint before every step but the first."""
FIVE_STEPS = json.dumps({"steps": 5, "stop_at": 3})


async def test_killed_in_training_goes_on_from_the_checkpoint(server: FakeServer, tmp_path: Path) -> None:
    site = Site(tmp_path / "site", server.address, workload=CHECKPOINTS)
    model = add_model(server, tmp_path / "model")
    site.set("hold")
    async with killed(site):
        await server.give(train_task(model, settings_json=FIVE_STEPS))
        await server.until(lambda _: 3 in site.steps)
    assert site.checkpoints == ["r1@adder/checkpoint.safetensors"]
    site.clear("hold")
    async with running(site):
        await server.until(lambda s: s.completed)
        await server.until(lambda _: not site.checkpoints)
    assert site.steps == [0, 1, 2, 3, 3, 4]
    assert values(server, server.state.completed[0])["b"] == [5.0, 5.0]
    assert server.state.completed[0].steps == 5


async def test_another_attempt_goes_on_from_the_checkpoint(server: FakeServer, tmp_path: Path) -> None:
    site = Site(tmp_path / "site", server.address, workload=CHECKPOINTS)
    model = add_model(server, tmp_path / "model")
    site.set("crash")
    async with running(site):
        await server.give(train_task(model, settings_json=FIVE_STEPS))
        await server.until(lambda s: s.failed)
        assert server.state.failed[0].reason == pb.FailTaskRequest.REASON_CRASHED
        await server.until(lambda _: not journal(site))
        assert site.checkpoints == ["r1@adder/checkpoint.safetensors"]
        site.clear("crash")
        await server.give(train_task(model, attempt=1, settings_json=FIVE_STEPS))
        await server.until(lambda s: s.completed)
    assert site.steps == [0, 1, 2, 3, 3, 4]
    assert values(server, server.state.completed[0])["b"] == [5.0, 5.0]
    await server.until(lambda _: not site.checkpoints)


async def test_where_going_on_fails_the_training_begins_anew(server: FakeServer, tmp_path: Path) -> None:
    site = Site(tmp_path / "site", server.address, workload=CHECKPOINTS)
    model = add_model(server, tmp_path / "model")
    site.set("crash")
    async with running(site):
        await server.give(train_task(model, settings_json=FIVE_STEPS))
        await server.until(lambda s: s.failed)
        await server.until(lambda _: not journal(site))
        site.clear("crash")
        site.set("raise")
        await server.give(train_task(model, attempt=1, settings_json=FIVE_STEPS))
        # The model's shards are told once, and loaded twice.
        await server.until(lambda s: len(s.failed) == 2)
    assert server.state.failed[1].reason == pb.FailTaskRequest.REASON_EXCEPTION
    assert site.steps == [0, 1, 2, 3, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_failure_whose_answer_is_lost_keeps_the_checkpoint(
    server: FakeServer, tmp_path: Path, restarted: bool
) -> None:
    site = Site(tmp_path / "site", server.address, workload=CHECKPOINTS)
    model = add_model(server, tmp_path / "model")
    site.set("crash")
    unheard = [grpc.StatusCode.UNAVAILABLE] * 1000
    server.state.faults["FailTask"].extend(unheard)
    async with killed(site):
        token = await server.give(train_task(model, settings_json=FIVE_STEPS))
        await server.until(lambda s: len(s.faults["FailTask"]) < len(unheard))
        # The server has noted it, and the answer is lost; all that it says from now on is that the task is over.
        if not restarted:
            server.state.over[token] = Reason.ROUND_CLOSED
            server.state.faults.clear()
            await server.until(lambda _: not journal(site))
    server.state.over[token] = Reason.ROUND_CLOSED
    server.state.faults.clear()
    site.clear("crash")
    site.set("hold")
    async with running(site):
        # Started again or not, the daemon has the checkpoint when the server gives the training once more.
        await server.until(lambda s: s.polls and s.waiting and not journal(site))
        assert site.checkpoints == ["r1@adder/checkpoint.safetensors"]
        site.clear("hold")
        await server.give(train_task(model, attempt=2, settings_json=FIVE_STEPS))
        await server.until(lambda s: s.completed)
    assert site.steps[-2:] == [3, 4]
    assert site.steps.count(0) == 1
    assert values(server, server.state.completed[0])["b"] == [5.0, 5.0]
    await server.until(lambda _: not site.checkpoints)


async def test_a_task_that_is_over_leaves_no_checkpoint(server: FakeServer, tmp_path: Path) -> None:
    site = Site(tmp_path / "site", server.address, workload=CHECKPOINTS)
    model = add_model(server, tmp_path / "model")
    async with running(site):
        site.set("raise")
        await server.give(train_task(model, settings_json=FIVE_STEPS))
        await server.until(lambda s: s.failed and not site.checkpoints)
        site.clear("raise")
        site.set("hold")
        token = await server.give(train_task(model, settings_json=FIVE_STEPS))
        await server.until(lambda _: site.steps.count(3) == 2)
        assert site.checkpoints
        server.state.cancelled.add(token)
        await server.until(lambda _: not site.checkpoints)
        site.clear("hold")
