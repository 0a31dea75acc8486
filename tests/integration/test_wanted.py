"""What runs on a thread for long ends soon after nobody waits for it any more; as in test_engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from fedserver.runtime import completion
from tests.support.server import ONE, QUIET, Server, server


@pytest.fixture
async def fed(tmp_path: Path) -> AsyncIterator[Server]:
    async with server(tmp_path / "data") as made:
        await made.import_model()
        yield made


class Endless:
    """Work that ends only when it is not wanted any more."""

    def __init__(self) -> None:
        self.begun = self.ended = False

    def work(self, *_: object, unwanted: Callable[[], bool]) -> int:
        self.begun = True
        deadline = time.monotonic() + 60
        while not unwanted() and time.monotonic() < deadline:
            time.sleep(0.01)
        self.ended = unwanted()
        return 0


@pytest.mark.parametrize("what", ["check", "reverify"])
async def test_it_ends_with_its_caller(fed: Server, monkeypatch: pytest.MonkeyPatch, what: str):
    endless = Endless()

    def check(*_: object, unwanted: Callable[[], bool], **_more: Any) -> None:
        endless.work(unwanted=unwanted)

    def reverify(_id: bytes, unwanted: Callable[[], bool]) -> int:
        return endless.work(unwanted=unwanted)

    monkeypatch.setattr(completion, "check_update", check)
    monkeypatch.setattr(fed.spool, "reverify", reverify)
    await fed.join("a")
    await fed.create(**ONE, **QUIET)
    task = await fed.task("a")
    update = await fed.send(task)
    if what == "check":
        assert await fed.complete(task, update, wait=0.05) is None
        waiting: asyncio.Task[Any] | None = task.check
    else:
        waiting = asyncio.create_task(fed.parts.versions.reverify(task.row))
    assert waiting is not None
    await fed.until(lambda: endless.begun, "the work to begin")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert endless.ended
