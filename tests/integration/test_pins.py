"""Pinned versions stay, whatever the retention says; as in test_engine_versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlink.errors import FedlinkError, Reason
from fedserver.store.queries import runs as run_queries
from fedserver.store.rows import RunRow
from tests.support.server import ONE, QUIET, Server, server, stored_is_needed, weights


async def kept(fed: Server, run: RunRow) -> list[int]:
    return [v.number for v in await fed.database.run(lambda c: run_queries.list_versions(c, run.id))]


async def train_to(fed: Server, run: RunRow, version: int) -> None:
    while (await fed.run(run)).version < version:
        number = (await fed.run(run)).version + 1
        await fed.train("a")
        await fed.version(run, number)
    await fed.parts.versions.retire(run.id)


async def test_a_pinned_version_stays_over_rounds_and_restarts_until_it_is_unpinned(tmp_path: Path) -> None:
    async with server(tmp_path / "data") as fed:
        await fed.import_model()
        await fed.join("a")
        run = await fed.create(rounds=5, retention={"keep_versions": 1}, **ONE, **QUIET)
        await train_to(fed, run, 1)
        pinned = await fed.parts.versions.pin("r@1")
        assert (pinned.number, pinned.pinned) == (1, True)
        assert await fed.parts.versions.pin("r@1") == pinned
        await train_to(fed, run, 3)
        assert await kept(fed, run) == [1, 3]
        with pytest.raises(FedlinkError, match=r"'r@0' is not kept; there is r@1, r@3") as e:
            await fed.parts.versions.pin("r@0")
        assert e.value.reason is Reason.MODEL_NOT_FOUND
    async with server(tmp_path / "data") as fed:
        await fed.join("a")
        await train_to(fed, run, 5)
        assert await kept(fed, run) == [1, 5]
        assert await weights(fed, run, 1) == [1.5, 2.5]
        for _ in range(2):
            left = await fed.parts.versions.unpin("r@1")
            assert (left.kept, left.pinned) == (False, False)
        assert await kept(fed, run) == [5]
        assert await stored_is_needed(fed)
        # One that the retention keeps stays, pinned or not.
        await fed.parts.versions.pin("r@5")
        assert (await fed.parts.versions.unpin("r@5")).kept


@pytest.mark.parametrize("name", ["r", "start", "r@7", "none@1", "r@x"])
async def test_what_is_no_version_cannot_be_pinned(tmp_path: Path, name: str) -> None:
    async with server(tmp_path / "data") as fed:
        await fed.import_model()
        await fed.create(**ONE, **QUIET)
        for act in (fed.parts.versions.pin, fed.parts.versions.unpin):
            with pytest.raises(FedlinkError) as e:
                await act(name)
            assert e.value.reason is Reason.MODEL_NOT_FOUND
