"""What is uploaded for a model: kept until the model is recorded, and not for ever; as in test_engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fedlink.blobs import CHUNK_SIZE, BlobRef, chunk_digests_of, ref_of
from fedlink.errors import FedlinkError, Reason
from fedlink.tensors import Kind
from fedlink.transfer import ImportPurpose
from fedserver.app import running
from fedserver.runtime import imports
from fedserver.settings import ServerSettings
from fedserver.store.queries import models as model_queries
from fedserver.store.queries import tasks as task_queries
from tests.support.server import OPERATOR, Server, server, spooled, stored_is_needed
from tests.support.shards import T, put

PURPOSE = ImportPurpose(b"i" * 16)


@pytest.fixture
async def fed(tmp_path: Path) -> AsyncIterator[Server]:
    async with server(tmp_path / "data") as made:
        yield made


async def sent(fed: Server) -> BlobRef:
    """Upload a model of two files; returns its manifest."""
    model = put(fed.root / "two", Kind.MODEL, [[T.of("v", "F32", [1.0])], [T.of("w", "F32", [2.0])]])
    for path in model.files:
        await fed.upload(OPERATOR, PURPOSE, path.read_bytes())
    data = model.manifest.serialize()
    await fed.upload(OPERATOR, PURPOSE, data)
    return ref_of(data)


@pytest.mark.parametrize("links", [True, False])
async def test_an_import_that_cannot_be_recorded_keeps_its_uploads_and_nothing_else(
    fed: Server, monkeypatch: pytest.MonkeyPatch, links: bool
):
    if not links:

        def refuse(_self: Path, _target: Path) -> None:
            raise PermissionError(1, "no links here")

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    ref = await sent(fed)
    async with fed.parts.versions.blobs_lock:
        importing = asyncio.create_task(fed.parts.versions.take_in(PURPOSE.id, "name", ref))
        # It has found the name free, and waits.
        await asyncio.sleep(0.1)
        other = {"name": "name", "digest": b"", "manifest_size": 0, "size": 0, "tensors": 0, "created": 0.0}
        await fed.database.run(lambda c: model_queries.insert_model(c, **other))
    with pytest.raises(FedlinkError) as e:
        await importing
    assert e.value.reason is Reason.MODEL_EXISTS
    assert list(fed.store.digests()) == []
    assert len(await fed.database.run(task_queries.all_uploads)) == 3
    if links:
        await fed.parts.versions.take_in(PURPOSE.id, "another", ref)
    else:
        # What has moved has to be sent again.
        with pytest.raises(FedlinkError) as e:
            await fed.parts.versions.take_in(PURPOSE.id, "another", ref)
        assert e.value.reason is Reason.BLOB_MISSING
        await fed.parts.versions.take_in(PURPOSE.id, "another", await sent(fed))
    assert await stored_is_needed(fed)
    assert len(list(fed.store.digests())) == 3
    assert spooled(fed) == 0
    assert list((fed.root / "tmp").iterdir()) == []


# --- Not for ever


def age(root: Path, *upload_ids: bytes) -> None:
    """Let every upload have begun before yesterday, and nothing have come for these since."""
    with contextlib.closing(sqlite3.connect(root / "fedserver.db")) as database:
        database.execute("UPDATE uploads SET created = created - 90000")
        database.commit()
    for upload_id in upload_ids:
        os.utime(root / "spool" / upload_id.hex() / "state", (time.time() - 90000,) * 2)


async def two_imports(fed: Server) -> list[list[bytes]]:
    """Two imports of a whole file and one that has begun; their uploads."""
    ids: list[list[bytes]] = []
    for name in (b"a", b"b"):
        purpose = ImportPurpose(name * 16)
        data = name * CHUNK_SIZE * 2
        whole = await fed.upload(OPERATOR, purpose, name)
        begun = await fed.parts.access.start_upload(OPERATOR, purpose, ref_of(data), chunk_digests_of(data))
        fed.spool.append(begun, 0, [data[:CHUNK_SIZE]])
        ids.append([whole, begun])
    return ids


@pytest.mark.parametrize("running_on", [True, False])
async def test_an_import_goes_a_day_after_its_last_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running_on: bool
):
    root = tmp_path / "data"
    async with server(root) as fed:
        given_up, slow = await two_imports(fed)

    async def gone() -> bool:
        return {p.name for p in (root / "spool").glob("[!.]*")} == {i.hex() for i in slow}

    if running_on:
        monkeypatch.setattr(imports, "LOOK_SECONDS", 0.05)
        async with running(ServerSettings(data_dir=root, listen="127.0.0.1:0")):
            assert not await gone()
            age(root, *given_up, slow[0])
            await fed.until(gone, "the import to go that nobody goes on with")
    else:
        age(root, *given_up, slow[0])
    async with server(root) as fed:
        assert await gone()
        assert {u.id for u in await fed.database.run(task_queries.all_uploads)} == set(slow)
