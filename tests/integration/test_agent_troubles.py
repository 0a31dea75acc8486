"""The daemon in trouble: servers that lose what they had, disks that refuse, drains at any time; as in test_agent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from fedclient.agent import Agent
from fedclient.work import Work
from fedlink.errors import FedlinkError, Reason
from fedlink.v1 import coordination_service_pb2 as pb
from tests.support.fake_server import FakeServer
from tests.support.site import Site, add_model, evaluate_task, journal, killed, running, train_task


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer() as running:
        yield running


@pytest.fixture
def site(tmp_path: Path, server: FakeServer) -> Site:
    return Site(tmp_path / "site", server.address)


def task_dirs(site: Site) -> list[str]:
    return [p.name for p in (site.directory / "fedclient-state" / "tasks").iterdir()]


async def test_server_restart_needs_no_client_restart(server: FakeServer, site: Site, tmp_path: Path) -> None:
    model = add_model(server, tmp_path / "model")
    async with running(site):
        site.set("hold")
        token = await server.give(train_task(model))
        await server.until(lambda _: site.trained)
        await server.stop()
        server.state.sessions.clear()
        site.clear("hold")
        await asyncio.sleep(0.3)
        await server.start()
        await server.until(lambda s: s.completed)
        assert server.state.completed[0].token == token
        assert len(server.state.registrations) == 2
        assert len({r.instance_id for r in server.state.registrations}) == 1
        await server.until(lambda s: s.waiting and s.polls[-1] == (token,))
        # Whatever was accepted is handed in once more: the server may have lost it.
        server.state.blobs.pop(server.state.completed[0].update.digest)
        server.state.uploads.clear()
        await server.stop()
        await asyncio.sleep(0.3)
        await server.start()
        await server.until(lambda s: len(s.completed) >= 2)
    assert server.state.completed[1] == server.state.completed[0]
    assert len(site.trained) == 1


async def test_a_lost_update_is_sent_again_when_asked_for(server: FakeServer, site: Site, tmp_path: Path) -> None:
    model = add_model(server, tmp_path / "model")
    async with running(site):
        token = await server.give(train_task(model))
        await server.until(lambda s: s.completed)
        await server.until(lambda _: journal(site)[0]["completed"])
        server.state.blobs = {d: b for d, b in server.state.blobs.items() if d in server.state.read}
        server.state.uploads.clear()
        async with server.state.changed:
            server.state.reopened.add(token)
            server.state.changed.notify_all()
        await server.until(lambda s: len(s.completed) == 2)
    assert server.state.completed[0] == server.state.completed[1]
    assert len(site.trained) == 1


async def test_an_accepted_update_is_sent_again_under_its_lease(server: FakeServer, site: Site, tmp_path: Path) -> None:
    server.state.lease_term = 0.6
    model = add_model(server, tmp_path / "model")
    async with running(site):
        token = await server.give(train_task(model))
        await server.until(lambda s: s.completed)
        await server.until(lambda _: journal(site)[0]["completed"])
        # The server loses its power, and with it the update; the line is slow.
        await server.stop()
        server.state.blobs = {d: b for d, b in server.state.blobs.items() if d in server.state.read}
        server.state.uploads.clear()
        server.state.beats.clear()
        server.state.received = 0
        server.state.write_delay = 60.0
        server.state.faults["ExtendLease"].append(FedlinkError(Reason.TASK_COMPLETED, "it is in"))
        await server.start()
        await server.until(lambda s: len([b for b in s.beats if b.token == token]) > 3)
        assert server.state.beats[-1].activity == pb.ExtendLeaseRequest.ACTIVITY_UPLOADING
        # Being asked for it meanwhile keeps nothing else from being done.
        async with server.state.changed:
            server.state.reopened.add(token)
            server.state.changed.notify_all()
        await server.until(lambda s: not s.reopened)
        await server.give(evaluate_task(model))
        await server.until(lambda s: len(s.completed) == 2)
        assert server.state.received == 0
        server.state.write_delay = 0.0
        await server.stop()
        await server.start()
        await server.until(lambda s: [c.token for c in s.completed].count(token) >= 3)
    assert len(site.trained) == 1


async def test_a_released_task_that_still_runs_makes_no_tight_loop(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    model = add_model(server, tmp_path / "model")
    server.state.write_delay = 60.0
    async with running(site):
        token = await server.give(train_task(model))
        await server.until(lambda s: any(b.activity == pb.ExtendLeaseRequest.ACTIVITY_UPLOADING for b in s.beats))
        async with server.state.changed:
            server.state.released.add(token)
            server.state.changed.notify_all()
        polls = len(server.state.polls)
        await asyncio.sleep(1.5)
        assert 1 <= len(server.state.polls) - polls < 20
        server.state.over[token] = Reason.ROUND_CLOSED
        await server.until(lambda _: not journal(site))


async def test_equal_updates_are_announced_for_each_task(server: FakeServer, site: Site, tmp_path: Path) -> None:
    async with running(site):
        for n in range(2):
            model = add_model(server, tmp_path / f"model{n}", start=n)
            await server.give(train_task(model, round=n + 1))
            await server.until(lambda s, n=n: len(s.completed) == n + 1)
    first, second = server.state.completed
    assert first.update == second.update
    shards = [f.blob.digest for f in server.update_of(first)[0].files]
    for request in (first, second):
        assert {(request.token, d) for d in [*shards, request.update.digest]} <= server.state.announced


async def test_accepted_but_killed_before_it_was_noted(server: FakeServer, site: Site, tmp_path: Path) -> None:
    model = add_model(server, tmp_path / "model")
    async with running(site):
        await server.give(train_task(model))
        await server.until(lambda s: s.completed)
        await server.until(lambda _: journal(site)[0]["completed"])
    (entry,) = (site.directory / "fedclient-state" / "journal").iterdir()
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"completed": False}))
    server.state.faults["StartUpload"].append(FedlinkError(Reason.TASK_COMPLETED, "it is in"))
    async with running(site):
        await server.until(lambda s: len(s.completed) == 2)
        await server.until(lambda _: journal(site)[0]["completed"])
    assert len(site.trained) == 1


async def test_a_heartbeat_after_the_verdict_loses_nothing(server: FakeServer, tmp_path: Path) -> None:
    site = Site(tmp_path / "site", server.address, size=1 << 20)
    server.state.lease_term = 0.3
    server.state.write_delay = 0.1
    model = add_model(server, tmp_path / "model", size=1 << 20)
    async with running(site):
        await server.give(train_task(model))
        await server.until(lambda s: s.received)
        server.state.faults["ExtendLease"].append(FedlinkError(Reason.TASK_COMPLETED, "it is in"))
        await server.until(lambda s: s.completed)
        await server.until(lambda _: journal(site)[0]["completed"])
    assert not server.state.faults["ExtendLease"]


async def test_hiccups_of_every_kind_pass(server: FakeServer, site: Site, tmp_path: Path) -> None:
    model = add_model(server, tmp_path / "model")
    busy = FedlinkError(Reason.BUSY, "too many", retry_after=0.05)
    methods = ["RegisterClient", "PollTask", "ReadBlob", "StartUpload", "WriteBlob", "CompleteTask"]
    for method in methods:
        faults = [busy, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED]
        if method != "RegisterClient":
            faults.append(FedlinkError(Reason.SESSION_UNKNOWN, "who are you"))
        server.state.faults[method].extend(faults)
    async with running(site):
        await server.give(train_task(model))
        await server.until(lambda s: s.completed)
    assert not any(server.state.faults.values())


@pytest.mark.parametrize("reason", [Reason.TLS_REFUSED, Reason.PROXY_REFUSED])
async def test_what_only_a_new_start_cures_is_no_failure_of_the_task(
    server: FakeServer, site: Site, tmp_path: Path, reason: Reason
) -> None:
    model = add_model(server, tmp_path / "model")
    # Said by the session, when a renewed certificate or a proxy is in its way.
    server.state.faults["CompleteTask"].append(FedlinkError(reason, "start it again"))
    await server.give(train_task(model))
    with pytest.raises(FedlinkError, match="start it again"):
        await asyncio.wait_for(Agent(site.settings).run(), 20)
    assert server.state.failed == []
    async with running(site):
        await server.until(lambda s: s.completed)
    assert len(site.trained) == 1


async def test_a_finished_update_waits_for_whatever_ails_the_site(
    server: FakeServer, site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = add_model(server, tmp_path / "model")

    async def ails_for_a_while() -> None:
        said = 0
        while not said:
            await asyncio.sleep(0.01)
            said = capsys.readouterr().out.count("the finished result waits")
        await asyncio.sleep(1.0)
        assert "the finished result waits" not in capsys.readouterr().out

    async with killed(site):
        token = await server.give(train_task(model))
        await server.until(lambda s: s.completed)
        await server.until(lambda _: journal(site)[0]["completed"])
        state = site.directory / "fedclient-state"
        [file] = (state / "tasks" / token.hex() / "update").glob("*-00001-*.safetensors")
        away = file.rename(tmp_path / "away")
        # When it is sent once more: a file that cannot be opened now, though it is there.
        file.symlink_to(file.name)
        await server.stop()
        server.state.blobs = {d: b for d, b in server.state.blobs.items() if d in server.state.read}
        server.state.uploads.clear()
        await server.start()
        await ails_for_a_while()
        file.unlink()
        away.rename(file)
        await server.until(lambda s: len(s.completed) == 2)
    # When it is hashed.
    [entry] = (state / "journal").iterdir()
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"completed": False}))
    file.rename(away)
    file.symlink_to(file.name)
    async with running(site):
        await ails_for_a_while()
        file.unlink()
        away.rename(file)
        await server.until(lambda s: len(s.completed) == 3)
    assert server.state.failed == []
    assert len(site.trained) == 1


async def test_a_disk_that_refuses_to_delete_holds_up_nothing_else(server: FakeServer, tmp_path: Path) -> None:
    site = Site(tmp_path / "site", server.address, extra="cache_limit = 0")
    state = site.directory / "fedclient-state"
    model = add_model(server, tmp_path / "model")
    site.set("hold")
    async with running(site):
        token = await server.give(train_task(model))
        await server.until(lambda _: site.trained)
        assert list((state / "cache").iterdir())
        # No file that could be unlinked.
        entry = state / "journal" / f"{token.hex()}.json"
        entry.rename(tmp_path / "entry")
        entry.mkdir()
        server.state.over[token] = Reason.ROUND_CLOSED
        await server.until(lambda _: not list((state / "cache").iterdir()))
        site.clear("hold")
        await server.give(evaluate_task(model))
        await server.until(lambda s: s.completed)


async def test_a_transfer_that_stalls_is_begun_anew_as_soon_as_the_site_says(
    server: FakeServer, tmp_path: Path
) -> None:
    site = Site(tmp_path / "site", server.address, extra="transfer_stall_after = 0.5")
    model = add_model(server, tmp_path / "model")
    server.state.faults["ReadBlob"].append(60.0)
    async with running(site):
        await server.give(evaluate_task(model))
        await server.until(lambda s: s.completed)


async def test_draining_hands_training_back_and_keeps_it(server: FakeServer, site: Site, tmp_path: Path) -> None:
    model = add_model(server, tmp_path / "model")
    site.set("hold")
    async with running(site):
        token = await server.give(train_task(model))
        await server.until(lambda _: site.trained)
    assert server.state.deregistered == 1
    assert server.state.failed == server.state.completed == []
    assert [j["order"]["token"] for j in journal(site)] == [token.hex()]


async def test_draining_finishes_an_upload(server: FakeServer, tmp_path: Path) -> None:
    site = Site(tmp_path / "site", server.address, size=1 << 20)
    model = add_model(server, tmp_path / "model", size=1 << 20)
    server.state.write_delay = 0.1
    async with running(site):
        await server.give(train_task(model))
        await server.until(lambda s: s.received)
    assert len(server.state.completed) == 1
    assert server.state.deregistered == 1


async def test_draining_while_the_server_is_away(tmp_path: Path) -> None:
    site = Site(tmp_path / "site", "127.0.0.1:1")
    async with running(site):
        await asyncio.sleep(0.5)


@pytest.mark.parametrize("later", range(3))
async def test_draining_at_the_last_steps_of_a_task(
    server: FakeServer, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: int
) -> None:
    forget = Work.forget
    drains: list[asyncio.Task[None]] = []

    async def drain_soon() -> None:
        for _ in range(later):
            await asyncio.sleep(0)
        agent.drain()

    async def forget_and_drain(work: Work) -> None:
        await forget(work)
        drains.append(asyncio.create_task(drain_soon()))

    monkeypatch.setattr(Work, "forget", forget_and_drain)
    model = add_model(server, tmp_path / "model")
    server.state.lease_term = 0.6
    async with running(site) as agent:
        token = await server.give(train_task(model, settings_json='{"steps": 100000000}'))
        await server.until(lambda s: s.points)
        server.state.cancelled.add(token)
        await server.until(lambda s: s.deregistered)
