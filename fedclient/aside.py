"""Work that may block, in threads that nobody waits for."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


async def off_loop(work: Callable[..., T], *arguments: Any) -> T:
    """Do something that may block in a thread of its own, which nobody waits for if it never returns.

    Threads of the event loop's pool would hold up the end of the process; a dead network disk must not.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(result)  # type: ignore[arg-type]
        else:
            done.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work(*arguments)
        except Exception as e:  # noqa: BLE001 - raised where it is awaited
            error = e
        with contextlib.suppress(RuntimeError):  # the loop is gone, and with it whoever waited
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="fedclient-aside", daemon=True).start()
    return await done
