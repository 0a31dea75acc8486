"""What is uploaded for a model: kept until the model is recorded, and not for ever; as in test_engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fedlink.blobs import BlobRef, ref_of
from fedlink.errors import FedlinkError, Reason
from fedlink.tensors import Kind
from fedlink.transfer import ImportPurpose
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
