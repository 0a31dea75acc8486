"""What a daemon and its trainer do at the same time: fetch and load, write and send; as in test_agent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fedlink import bulk
from fedlink.errors import FedlinkError, Reason
from fedlink.v1 import coordination_service_pb2 as pb
from tests.support.fake_server import FakeServer
from tests.support.site import Site, add_model, journal, killed, running, train_task, values

STALL_AFTER = 4.0


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer() as running:
        yield running


@pytest.fixture
def site(tmp_path: Path, server: FakeServer) -> Site:
    return Site(tmp_path / "site", server.address, trainer="watched:Watched")


def shard(data: bytes) -> bool:
    """Whether a blob is a file with `w`, the first shard of a model or an update."""
    return b'"w"' in data[:300]


async def test_a_shard_is_loaded_while_the_next_one_is_fetched(server: FakeServer, tmp_path: Path) -> None:
    site = Site(tmp_path / "site", server.address, trainer="watched:Watched", workload=f"stall_after = {STALL_AFTER}")
    server.state.lease_term = 0.6
    model = add_model(server, tmp_path / "model")
    last = server.hold_back(model, 1)
    clock = asyncio.get_running_loop().time
    async with running(site):
        await server.give(train_task(model))
        await server.until(lambda s: s.held_back.keys() <= {*s.read} and site.loaded == ["w"])
        # Longer than a trainer may be silent; it waits for bytes, and the server hears which.
        loaded, server.state.beats = clock(), []
        await server.until(lambda s: clock() > loaded + STALL_AFTER + 1 and len(s.beats) > 3)
        assert {b.activity for b in server.state.beats} == {pb.ExtendLeaseRequest.ACTIVITY_DOWNLOADING}
        assert all(0 < b.done < b.total for b in server.state.beats)
        last.set()
        await server.until(lambda s: s.completed)
    assert site.loaded == ["w", "b"]
    assert values(server, server.state.completed[0]) == {"w": [2.0] * 4, "b": [2.0] * 2}
    assert not server.state.failed


@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_a_fetch_that_ends_half_way_leaves_a_warm_trainer(
    server: FakeServer, site: Site, tmp_path: Path, how: str
) -> None:
    server.state.lease_term = 0.6
    model, other = (add_model(server, tmp_path / str(n), start=n) for n in (1.0, 5.0))
    last = server.hold_back(model, 1)
    async with running(site):
        token = await server.give(train_task(model))
        await server.until(lambda _: site.loaded == ["w"])
        if how == "cancelled":
            server.state.cancelled.add(token)
            server.state.over[token] = Reason.ROUND_CLOSED
        else:
            for digest in server.state.held_back:
                del server.state.blobs[digest]
            last.set()
            await server.until(lambda s: s.failed)
            assert server.state.failed[0].reason == pb.FailTaskRequest.REASON_UNAVAILABLE
            assert server.state.failed[0].retryable
        await server.until(lambda _: not journal(site))
        await server.give(train_task(other))
        await server.until(lambda s: s.completed)
    # Right only if every tensor was loaded anew: what is sent is the difference to the files.
    assert values(server, server.state.completed[0]) == {"w": [2.0] * 4, "b": [2.0] * 2}
    assert len(site.trained) == 1
    assert len(site.built) == 2
    assert len(set(site.built)) == 1


async def test_a_shard_is_sent_while_the_next_one_is_written(
    server: FakeServer, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    hash_file = bulk.hash_file
    monkeypatch.setattr(bulk, "hash_file", lambda path: hashed.append(path.name) or hash_file(path))
    model = add_model(server, tmp_path / "model")
    before = {*server.state.blobs}
    site.set("hold-write")
    async with running(site):
        await server.give(train_task(model))
        await server.until(lambda s: len(s.blobs) > len(before))
        [first] = server.state.blobs.keys() - before
        assert shard(server.state.blobs[first])
        assert journal(site)[0]["outcome"] is None
        site.clear("hold-write")
        await server.until(lambda s: s.completed)
        await server.until(lambda _: journal(site)[0]["completed"])
    manifest, _ = server.update_of(server.state.completed[0])
    files = [f.blob.digest for f in manifest.files]
    assert files[0] == first
    assert list(server.state.uploads) == [d[:16] for d in (first, server.state.completed[0].update.digest, files[1])]
    assert sorted(hashed) == ["manifest", *(f.name for f in manifest.files)]
    assert [values(server, c) for c in server.state.completed] == [{"w": [2.0] * 4, "b": [2.0] * 2}]
    # A life that finds the whole update sends the very same.
    [entry] = (site.directory / "fedclient-state" / "journal").iterdir()
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"completed": False}))
    server.state.uploads.clear()
    server.state.announced.clear()
    async with running(site):
        await server.until(lambda s: len(s.completed) == 2)
    assert server.state.completed[0] == server.state.completed[1]


async def test_a_shard_that_cannot_be_sent_ahead_goes_with_the_rest(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    model = add_model(server, tmp_path / "model")
    server.state.faults["StartUpload"].append(FedlinkError(Reason.TOO_LARGE, "said the test"))
    site.set("hold-write")
    async with running(site):
        await server.give(train_task(model))
        await server.until(lambda s: not s.faults["StartUpload"])
        assert server.state.received == 0
        site.clear("hold-write")
        await server.until(lambda s: s.completed)
    assert values(server, server.state.completed[0]) == {"w": [2.0] * 4, "b": [2.0] * 2}
    assert len(site.trained) == 1
    assert not server.state.failed


async def test_killed_with_half_of_the_update_at_the_server(server: FakeServer, site: Site, tmp_path: Path) -> None:
    model = add_model(server, tmp_path / "model")
    before = {*server.state.blobs}
    site.set("hold-write")
    async with killed(site):
        await server.give(train_task(model))
        await server.until(lambda s: len(s.blobs) > len(before))
    [first] = server.state.blobs.keys() - before
    server.state.received = 0
    site.clear("hold-write")
    async with running(site):
        await server.until(lambda s: s.completed)
    assert len(site.trained) == 2
    manifest, files = server.update_of(server.state.completed[0])
    assert manifest.files[0].blob.digest == first
    assert server.state.received == len(files[1]) + len(manifest.serialize())


async def test_what_was_sent_of_an_update_that_is_written_anew_counts_for_nothing(
    server: FakeServer, tmp_path: Path
) -> None:
    size = 1 << 20
    site = Site(tmp_path / "site", server.address, trainer="watched:Watched", size=size)
    model = add_model(server, tmp_path / "model", size=size)
    async with running(site):
        earlier = {await server.give(train_task(model, round=n)) for n in (1, 2)}
        await server.until(lambda s: len(s.completed) == 2)
        # Their files are kept to be written over; that one of them gives room is why the third training is done again.
        async with server.state.changed:
            server.state.released |= earlier
            server.state.changed.notify_all()
        await server.until(lambda _: not journal(site))
        site.set("hold-write")
        site.set("no-room")
        token = await server.give(train_task(model, round=3))
        await server.until(lambda s: any(t == token for t, _ in s.announced))
        site.clear("hold-write")
        await server.until(lambda s: len(s.completed) == 3)
    assert len(site.trained) == 4
    assert set(values(server, server.state.completed[2])["w"]) == {3.0}
