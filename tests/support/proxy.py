"""An HTTP CONNECT proxy as companies have them: it may ask for a password, and may look into what it carries."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.pki import Pki

PATIENCE = 60.0


@dataclass(frozen=True)
class Interception:
    """A proxy that ends TLS with certificates of its own CA, and speaks TLS to the server itself."""

    authority: Pki
    trust: Path
    """The CA of the servers."""


class ConnectProxy:
    """A proxy on loopback; a context manager.

    Args:
        credentials: USER:PASSWORD that it asks for.
        interception: how it looks into what it carries, if it does.

    Attributes:
        address: HOST:PORT.
        asked: the HOST:PORT of every CONNECT.
        tunnels: how many were opened.
        refused: how many were refused for want of credentials.
    """

    def __init__(self, *, credentials: str = "", interception: Interception | None = None) -> None:
        self._expected = "Basic " + base64.b64encode(credentials.encode()).decode() if credentials else ""
        self._interception = interception
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self.asked: list[str] = []
        self.tunnels = 0
        self.refused = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()

    async def _close(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            with contextlib.suppress(OSError, EOFError):
                await self._tunnel(reader, writer, writers)
        finally:
            for w in writers:
                w.transport.abort()

    async def _tunnel(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, writers: list[asyncio.StreamWriter]
    ) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        assert method == "CONNECT"
        self.asked.append(target)
        fields = {name.strip().lower(): value.strip() for name, _, value in (f.partition(":") for f in head[1:])}
        if self._expected and fields.get("proxy-authorization") != self._expected:
            self.refused += 1
            writer.write(b'HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm="x"\r\n\r\n')
            await writer.drain()
            return
        host, _, port = target.rpartition(":")
        outside = self._context(self._interception) if self._interception else None
        try:
            up_reader, up_writer = await asyncio.open_connection(host, int(port), ssl=outside)
        except OSError:
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
            await writer.drain()
            return
        writers.append(up_writer)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await writer.drain()
        if self._interception:
            await writer.start_tls(self._shown(self._interception, host))
        self.tunnels += 1
        pumps = [self._loop.create_task(_pump(*ends)) for ends in ((reader, up_writer), (up_reader, writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def _context(self, interception: Interception) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=interception.trust)
        context.set_alpn_protocols(["h2"])
        return context

    def _shown(self, interception: Interception, host: str) -> ssl.SSLContext:
        leaf = interception.authority.leaf("proxy", host, file="shown")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(leaf["certificate"], leaf["key"])
        return context


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(1 << 16):
        sink.write(data)
        await sink.drain()
