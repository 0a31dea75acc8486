"""Errors on their way out: every failed call carries a status and an ErrorInfo, and nothing else."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn, TypeVar, cast

import grpc.aio

from fedlink import log, rpc
from fedlink.errors import FedlinkError, Reason

Method = TypeVar("Method", bound=Callable[..., Any])
Context = grpc.aio.ServicerContext[Any, Any]
"""Context of a call in progress."""


async def abort(context: Context, error: FedlinkError) -> NoReturn:
    """End a call with an error's status.

    Raises:
        grpc.aio.AbortError: always; let it pass.
    """
    await context.abort_with_status(rpc.to_status(error))
    raise AssertionError("abort_with_status returned")


@contextlib.asynccontextmanager
async def errors_as_status(context: Context, method: str) -> AsyncIterator[None]:
    """Turn what is raised inside into the call's status.

    A FedlinkError goes out as it is. Anything else is a fault of ours: it is logged with its
    traceback and goes out as INTERNAL without details.
    """
    try:
        yield
    except FedlinkError as e:
        say = log.get("services").debug if e.reason.retryable else log.get("services").info
        say("refused", method=method, reason=e.reason.name, error=e.message)
        await abort(context, e)
    except grpc.aio.BaseError:
        # The call has ended already: aborted, or its peer is gone.
        raise
    except Exception:  # noqa: BLE001  (nothing may leave as a traceback)
        log.get("services").exception("a call failed", method=method)
        text = "The server failed to carry this out; its log says why. Try again later."
        await abort(context, FedlinkError(Reason.INTERNAL, text))


def translated(method: Method) -> Method:
    """Put a method `(self, request, context)`, coroutine or async generator, under `errors_as_status`."""
    name = method.__name__

    @functools.wraps(method)
    async def call(self: Any, request: Any, context: Context) -> Any:
        async with errors_as_status(context, name):
            return await method(self, request, context)

    @functools.wraps(method)
    async def stream(self: Any, request: Any, context: Context) -> AsyncIterator[Any]:
        async with errors_as_status(context, name), contextlib.aclosing(method(self, request, context)) as responses:
            async for response in responses:
                yield response

    return cast("Method", stream if inspect.isasyncgenfunction(method) else call)
