"""Errors as they leave the server: our own in full, anything else without details."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from fedlink import rpc
from fedlink.errors import FedlinkError, Reason
from fedserver.services.status import translated
from tests.support.transfer import channel_to


class Servicer:
    """Says or does what the request asks for."""

    @translated
    async def one(self, request: bytes, _context: Any) -> bytes:
        return self.act(request)

    @translated
    async def many(self, request: bytes, _context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        yield self.act(request)

    def act(self, request: bytes) -> bytes:
        if request == b"refuse":
            raise FedlinkError(Reason.BUSY, "later", metadata={"tensor": "w"}, retry_after=2.5)
        if request == b"break":
            raise ValueError("a secret: hunter2")
        return request


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server, servicer = grpc.aio.server(), Servicer()
    handlers: dict[str, Any] = {
        "One": grpc.unary_unary_rpc_method_handler(servicer.one),
        "Many": grpc.unary_stream_rpc_method_handler(servicer.many),
    }
    server.add_registered_method_handlers("test.Service", handlers)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with channel_to(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


@pytest.mark.parametrize("method", ["One", "Many"])
async def test_errors(channel: grpc.aio.Channel, method: str) -> None:
    async def call(request: bytes) -> list[bytes]:
        if method == "One":
            return [await channel.unary_unary("/test.Service/One")(request)]
        return [message async for message in channel.unary_stream("/test.Service/Many")(request)][1:]

    assert await call(b"fine") == [b"fine"]
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call(b"refuse")
    error = rpc.from_rpc_error(e.value)
    assert (error.reason, error.message, error.metadata) == (Reason.BUSY, "later", {"tensor": "w"})
    assert error.retry_after == 2.5
    with pytest.raises(grpc.aio.AioRpcError) as e:
        await call(b"break")
    error = rpc.from_rpc_error(e.value)
    assert error.reason is Reason.INTERNAL
    assert e.value.code() is grpc.StatusCode.INTERNAL
    assert "hunter2" not in str(e.value)
