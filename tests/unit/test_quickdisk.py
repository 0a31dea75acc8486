"""Disk calls from an event loop."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from fedlink.quickdisk import ASIDE, SLOW, QuickDisk


async def test_a_slow_disk_is_left_to_a_thread_for_a_while() -> None:
    now = 100.0
    disk = QuickDisk(lambda: now)

    def where(takes: float = 0.0) -> bool:
        nonlocal now
        now += takes
        return threading.current_thread() is threading.main_thread()

    assert await disk.do(where)
    assert await disk.do(where, takes=SLOW / 2)
    assert await disk.do(where, takes=SLOW * 2)
    assert not await disk.do(where)
    now += ASIDE - SLOW
    assert not await disk.do(where, takes=SLOW * 2)
    now += ASIDE / 2
    assert not await disk.do(where)
    now += ASIDE
    assert await disk.do(where)


async def test_errors_pass_and_a_cancelled_call_is_waited_for() -> None:
    disk = QuickDisk()
    with pytest.raises(OSError, match="full"):
        await disk.do(_full)
    await disk.do(time.sleep, SLOW * 1.5)
    with pytest.raises(OSError, match="full"):
        await disk.do(_full)
    ended = []

    def slow() -> None:
        time.sleep(0.2)
        ended.append(True)

    calling = asyncio.create_task(disk.do(slow))
    await asyncio.sleep(0.05)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert ended


def _full() -> None:
    raise OSError("full")
