"""A look at every stored file: what it says of blobs that versions share, that go, or that the disk does not give."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from fedserver.runtime.integrity import Finding
from fedserver.store.queries import runs as run_queries
from tests.support.server import ONE, QUIET, Server, server


@pytest.fixture
async def fed(tmp_path: Path) -> AsyncIterator[Server]:
    async with server(tmp_path / "data") as made:
        await made.import_model()
        yield made


async def file_of(fed: Server, name: str) -> Path:
    """The only shard of a model."""
    _, manifest, _ = await fed.parts.versions.find(name)
    (path,) = fed.parts.versions.files_of(manifest.digest).files
    return path


async def damaged(fed: Server) -> list[Finding]:
    return [f async for f in fed.parts.integrity.verify("") if f.damage]


async def test_damage_is_not_forgotten_when_the_version_that_showed_it_goes(
    fed: Server, monkeypatch: pytest.MonkeyPatch
):
    await fed.join("a")
    run = await fed.create(**ONE, **QUIET)
    await fed.train("a")
    await fed.version(run, 1)
    await fed.create("other", model="r@1", workload="x", **ONE)
    path = await file_of(fed, "r@1")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    verify, loop, looks = fed.store.verify, asyncio.get_running_loop(), []

    def as_it_goes(digest: bytes, unwanted: Callable[[], bool]) -> None:
        if digest.hex() == path.name and path.name not in looks:
            retired = fed.database.run(lambda c: run_queries.save_version(c, run.id, 1, kept=False))
            asyncio.run_coroutine_threadsafe(retired, loop).result(10)
        looks.append(digest.hex())
        verify(digest, unwanted)

    monkeypatch.setattr(fed.store, "verify", as_it_goes)
    (found,) = await damaged(fed)
    assert (found.model, found.ref.digest.hex()) == ("other@0", path.name)
    assert looks.count(path.name) == 2


async def test_a_file_that_the_disk_does_not_give_is_damage_by_name(fed: Server):
    path = await file_of(fed, "start")
    await fed.import_model("same")
    path.unlink()
    path.symlink_to(path)
    found = await damaged(fed)
    assert [f.model for f in found] == ["start", "same"]
    assert all("cannot be read from the server's disk (Too many levels" in f.damage for f in found)
    assert all(path.name[:12] in f.damage for f in found)
