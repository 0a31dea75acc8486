"""Transitions that must not stop half-way when a caller hangs up."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class _Locked(Protocol):
    @property
    def lock(self) -> asyncio.Lock: ...


S = TypeVar("S", bound=_Locked)


def whole(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Decorate a coroutine function: it runs to its end even if whoever awaits it is cancelled.

    gRPC cancels a handler when its client goes away. Between the commit of a transaction and
    the change in memory that belongs to it, that would leave the two apart.
    """

    @functools.wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        task = asyncio.ensure_future(method(*args, **kwargs))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # Nobody is left to be told of a failure but the event loop's own log.
            if not task.done():
                task.add_done_callback(_report)
            raise

    return call


def serial(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Decorate a method: it holds its object's `lock`, and runs to its end as `whole` has it."""

    @whole
    @functools.wraps(method)
    async def call(owner: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        async with owner.lock:
            return await method(owner, *args, **kwargs)

    return call


def _report(task: asyncio.Future[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        context = {"message": "a transition whose caller had gone failed", "exception": error, "future": task}
        task.get_loop().call_exception_handler(context)
