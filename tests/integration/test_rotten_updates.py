"""A bit turns in an update between its arrival and its check: the site sends it again and is not blamed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fedlink.errors import FedlinkError, Reason
from fedserver.store.queries import tasks as task_queries
from tests.support.server import ONE, QUIET, Server, server, weights

ALMOST_INFINITE = 1.5 * 2.0**127
"""One bit from NaN in float32."""


@pytest.fixture
async def fed(tmp_path: Path) -> AsyncIterator[Server]:
    async with server(tmp_path / "data") as made:
        await made.import_model()
        yield made


def turn(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize(("at", "bit"), [(-2, 7), (9, 0), (6, 6)], ids=["value", "name", "header"])
async def test_it_is_sent_again(fed: Server, at: int, bit: int):
    await fed.join("a")
    run = await fed.create(**ONE, **QUIET)
    task = await fed.task("a")
    update = await fed.send(task, (0.5, ALMOST_INFINITE))
    (path,) = [
        fed.spool.path(u.id) for u in await fed.database.run(task_queries.all_uploads) if u.digest != update.digest
    ]
    turn(path, at, bit)
    with pytest.raises(FedlinkError) as e:
        await fed.complete(task, update)
    assert e.value.reason is Reason.BLOB_MISSING
    assert "changed on the server's disk; send it again" in e.value.message
    assert await fed.send(task, (0.5, ALMOST_INFINITE)) == update
    verdict = await fed.complete(task, update)
    assert verdict is not None
    assert verdict.accepted
    assert (await fed.ended(run)).version == 1
    assert await weights(fed, run, 1) == [1.5, ALMOST_INFINITE]


async def test_what_a_site_has_sent_is_refused(fed: Server):
    await fed.join("a")
    await fed.create(**ONE, **QUIET)
    task = await fed.task("a")
    verdict = await fed.complete(task, await fed.send(task, (0.5, float("nan"))))
    assert verdict is not None
    assert (verdict.accepted, verdict.reason, verdict.tensor) == (False, "NOT_FINITE", "w")
