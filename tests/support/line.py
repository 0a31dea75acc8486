"""A TCP line to a server that a test can cut, silence, stall, slow down, refuse and lead elsewhere.

    with Line(server.address) as line:
        fault = line.cut(after_bytes=1_000_000, towards="server", connection=2)
        ...                      # clients connect to line.address
        fault.until_fired()
    # every fault has fired, or leaving the context fails

A fault waits for its moment: so many bytes carried in one direction, so many seconds of age, so
many seconds of silence, on one connection (from 1, as they were accepted) or on the first that
comes to it. Bytes are counted exactly: a cut after n bytes lets n bytes through and not one more.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

Towards = Literal["server", "client"]
End = Literal["rst", "fin"]
Kind = Literal["cut", "half_open", "stall", "refuse"]

PATIENCE = 120.0
"""Seconds after which a test that waits for a fault gives up."""
_TICK = 0.02
_BITE = 1 << 16
_RESET = struct.pack("ii", 1, 0)
_OTHER: dict[Towards, Towards] = {"server": "client", "client": "server"}


class Fired(NamedTuple):
    """A fault that has happened."""

    kind: Kind
    connection: int
    towards_server: int
    """Bytes this connection had carried to the server by then."""
    towards_client: int


@dataclass(eq=False)
class Fault:
    """Something that is to happen to a connection; all of its conditions have to hold.

    Attributes:
        towards: the direction whose bytes are counted, and that a stall stops.
        after_bytes: carried by the connection in that direction.
        after_seconds: age of the connection.
        idle: seconds since it last carried anything in either direction.
        marker: bytes that the client must have sent, such as the name of a method (in the clear, once a connection).
        connection: its number, from 1; None for whichever comes to it.
        times: on how many connections at most; None for every one. Never twice on the same.
        end: how a cut ends both legs.
        seconds: how long a stall lasts; None until `release`.
        hit: the numbers of the connections it has happened to.
    """

    kind: Kind
    towards: Towards = "server"
    after_bytes: int = 0
    after_seconds: float = 0.0
    idle: float = 0.0
    connection: int | None = None
    times: int | None = 1
    end: End = "rst"
    seconds: float | None = None
    marker: bytes = b""
    hit: list[int] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    _fired: threading.Event = field(default_factory=threading.Event)

    @property
    def fired(self) -> bool:
        """Whether it has happened at least once."""
        return self._fired.is_set()

    def until_fired(self, seconds: float = PATIENCE) -> Self:
        """Wait until it has happened."""
        assert self._fired.wait(seconds), f"no connection came to {self}"
        return self

    def release(self) -> None:
        """Let a stall go on, and stall nobody any more."""
        self.released.set()

    def may_hit(self, connection: int) -> bool:
        """Whether it can still happen to a connection."""
        if self.released.is_set() or connection in self.hit or (self.times is not None and len(self.hit) >= self.times):
            return False
        return self.connection in (None, connection)

    @property
    def timed(self) -> bool:
        """Whether it may come due without a byte."""
        return bool(self.after_seconds or self.idle)


class Line:
    """A line to `target`, HOST:PORT; a context manager, for tests with and without an event loop.

    Args:
        target: where connections lead.
        host: address to listen on.
        strict: leaving the context fails if a fault has not fired.

    Attributes:
        address: HOST:PORT for the clients.
        fired: what has happened, in order.
        carried: bytes carried so far, by direction.
        connections: how many were accepted so far (refused ones not).
    """

    def __init__(self, target: str, *, host: str = "127.0.0.1", strict: bool = True) -> None:
        self._target = target
        self._strict = strict
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="line", daemon=True)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=256)
        self._listener.setblocking(False)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._listener.getsockname()[1]}"
        self.fired: list[Fired] = []
        self.carried: dict[Towards, int] = {"server": 0, "client": 0}
        self.connections = 0
        self._faults: list[Fault] = []
        self._live: dict[int, _Connection] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._refusal: tuple[Fault, float] | None = None
        self._rates: dict[Towards, float | None] = {"server": None, "client": None}
        self._free_at: dict[Towards, float] = {"server": 0.0, "client": 0.0}

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._open())
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()
        if self._strict and exc is None:
            assert not self.pending, f"never happened: {self.pending}; happened: {self.fired}"

    # --- Faults

    def cut(
        self,
        *,
        after_bytes: int = 0,
        towards: Towards = "server",
        after_seconds: float = 0.0,
        idle: float = 0.0,
        connection: int | None = None,
        times: int | None = 1,
        end: End = "rst",
        marker: bytes = b"",
    ) -> Fault:
        """End a connection, both legs, by RST or FIN; see `Fault`."""
        return self._schedule(
            Fault("cut", towards, after_bytes, after_seconds, idle, connection, times, end, marker=marker)
        )

    def half_open(
        self,
        *,
        after_bytes: int = 0,
        towards: Towards = "server",
        after_seconds: float = 0.0,
        connection: int | None = None,
        times: int | None = 1,
    ) -> Fault:
        """Let each side vanish for the other: what is sent is swallowed, nothing comes, both sockets stay open."""
        return self._schedule(
            Fault("half_open", towards, after_bytes, after_seconds, connection=connection, times=times)
        )

    def stall(
        self,
        seconds: float | None = None,
        *,
        after_bytes: int = 0,
        towards: Towards = "server",
        after_seconds: float = 0.0,
        connection: int | None = None,
        times: int | None = 1,
        marker: bytes = b"",
    ) -> Fault:
        """Stop carrying in one direction for a while, or until `Fault.release`; the bytes wait and then go on."""
        return self._schedule(
            Fault("stall", towards, after_bytes, after_seconds, 0.0, connection, times, seconds=seconds, marker=marker)
        )

    def refuse(self, seconds: float | None = None, *, times: int | None = None) -> Fault:
        """Reset new connections, for a while or so many of them; those that are there stay."""
        fault = Fault("refuse", times=times)
        self._faults.append(fault)
        self._refusal = (fault, time.monotonic() + (float("inf") if seconds is None else seconds))
        return fault

    def drop(self, how: End | Literal["half_open"] = "rst") -> int:
        """End, or silence, every connection that is there now; returns how many were."""

        async def drop() -> int:
            live = [c for c in self._live.values() if not c.ended]
            for connection in live:
                fault = Fault("half_open") if how == "half_open" else Fault("cut", end=how)
                self._fire(fault, connection)
            return len(live)

        return self._do(drop())

    def retarget(self, target: str) -> None:
        """Lead new connections elsewhere; `drop` ends the others."""
        self._target = target

    def throttle(self, rate: float | None, *, towards: Towards | None = None) -> None:
        """Carry so many bytes a second, all connections together, in one direction or in each; None: as many as come.

        The sockets of connections made from now on hold little, so that senders feel it.
        """
        for direction in (towards,) if towards else _OTHER:
            self._rates[direction] = rate
        if rate is not None:
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                self._listener.setsockopt(socket.SOL_SOCKET, option, 1 << 14)

    @property
    def live(self) -> list[int]:
        """The numbers of the connections that are there now."""
        return list(self._live)

    @property
    def pending(self) -> list[Fault]:
        """The faults that have not happened at all."""
        return [f for f in self._faults if not f.fired]

    def _schedule(self, fault: Fault) -> Fault:
        async def schedule() -> None:
            self._faults.append(fault)
            for connection in list(self._live.values()):
                self._check(connection)

        self._do(schedule())
        return fault

    # --- On the loop

    async def _open(self) -> None:
        # Not sock_accept: cancelled at the wrong moment it loses the socket that it has just accepted.
        self._loop.add_reader(self._listener, self._accept)
        self._begin(self._watch())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close(self) -> None:
        self._loop.remove_reader(self._listener)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in self._live.values():
            connection.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            near, _ = self._listener.accept()
        except OSError:
            return  # the client has given up
        near.setblocking(False)
        if self._refuses():
            _close(near, "rst")
        else:
            self._begin(self._serve(self._connection(near)))

    def _refuses(self) -> bool:
        if self._refusal is None:
            return False
        fault, until = self._refusal
        if time.monotonic() >= until or len(fault.hit) == fault.times:
            return False
        self._note(fault, 0, {"server": 0, "client": 0})
        return True

    def _connection(self, near: socket.socket) -> _Connection:
        self.connections += 1
        far = socket.socket(socket.AF_INET6 if self._target.startswith("[") else socket.AF_INET)
        far.setblocking(False)
        if any(self._rates.values()):
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                far.setsockopt(socket.SOL_SOCKET, option, 1 << 14)
        for leg in (near, far):
            leg.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = self._live[self.connections] = _Connection(self.connections, {"client": near, "server": far})
        return connection

    async def _serve(self, connection: _Connection) -> None:
        host, _, port = self._target.rpartition(":")
        pumps: list[asyncio.Task[None]] = []
        try:
            await self._loop.sock_connect(connection.legs["server"], (host.strip("[]"), int(port)))
            self._check(connection)
            pumps = [self._loop.create_task(self._pump(connection, towards)) for towards in _OTHER]
            await connection.over.wait()
        except OSError:
            connection.ended = "rst"
        finally:
            for pump in pumps:
                pump.cancel()
            try:
                await asyncio.gather(*pumps, return_exceptions=True)
            finally:
                del self._live[connection.number]
                connection.close()

    async def _pump(self, connection: _Connection, towards: Towards) -> None:
        source, sink = connection.legs[_OTHER[towards]], connection.legs[towards]
        end: End = "fin"
        try:
            while data := await self._loop.sock_recv(source, self._bite(towards)):
                await self._paced(towards, len(data))
                await self._carry(connection, towards, memoryview(data), sink)
        except OSError:
            end = "rst"
        connection.closed(towards, end)

    async def _carry(self, connection: _Connection, towards: Towards, data: memoryview, sink: socket.socket) -> None:
        while data and not connection.silent:
            while stall := connection.stalls.get(towards):
                await self._wait_out(connection, towards, stall)
            if connection.silent:
                return
            part = data[: self._room(connection, towards)]
            await self._loop.sock_sendall(sink, part)
            if towards == "server":
                self._look_for_markers(connection, part)
            data = data[len(part) :]
            connection.moved = time.monotonic()
            connection.carried[towards] += len(part)
            self.carried[towards] += len(part)
            self._check(connection)
            if connection.ended:
                await connection.never()

    def _look_for_markers(self, connection: _Connection, part: memoryview) -> None:
        markers = {f.marker for f in self._faults if f.marker} - connection.seen
        if markers:
            text = connection.tail + bytes(part)
            connection.seen |= {m for m in markers if m in text}
            connection.tail = text[-64:]

    def _bite(self, towards: Towards) -> int:
        rate = self._rates[towards]
        return _BITE if rate is None else max(512, min(_BITE, int(rate * _TICK)))

    def _room(self, connection: _Connection, towards: Towards) -> int:
        """How many bytes may pass until a fault may come due."""
        done = connection.carried[towards]
        ahead = [
            f.after_bytes - done
            for f in self._faults
            if f.towards == towards and f.after_bytes > done and f.may_hit(connection.number)
        ]
        return min(ahead, default=_BITE)

    async def _paced(self, towards: Towards, length: int) -> None:
        rate, now = self._rates[towards], time.monotonic()
        if rate is not None:
            self._free_at[towards] = max(self._free_at[towards], now) + length / rate
            await asyncio.sleep(self._free_at[towards] - now)

    async def _wait_out(self, connection: _Connection, towards: Towards, stall: tuple[Fault, float]) -> None:
        fault, until = stall
        if fault.released.is_set() or time.monotonic() >= until:
            del connection.stalls[towards]
        else:
            await asyncio.sleep(_TICK)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            if any(f.timed for f in self._faults):
                for connection in list(self._live.values()):
                    self._check(connection)

    def _check(self, connection: _Connection) -> None:
        now = time.monotonic()
        for fault in self._faults:
            if (
                not connection.ended
                and fault.kind != "refuse"
                and fault.may_hit(connection.number)
                and connection.carried[fault.towards] >= fault.after_bytes
                and now - connection.born >= fault.after_seconds
                and now - connection.moved >= fault.idle
                and (not fault.marker or fault.marker in connection.seen)
            ):
                self._fire(fault, connection)

    def _fire(self, fault: Fault, connection: _Connection) -> None:
        if fault.kind == "cut":
            connection.finish(fault.end)
        elif fault.kind == "half_open":
            connection.silent = True
        else:
            until = float("inf") if fault.seconds is None else time.monotonic() + fault.seconds
            connection.stalls[fault.towards] = (fault, until)
        self._note(fault, connection.number, connection.carried)

    def _note(self, fault: Fault, connection: int, carried: dict[Towards, int]) -> None:
        fault.hit.append(connection)
        self.fired.append(Fired(fault.kind, connection, carried["server"], carried["client"]))
        fault._fired.set()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)


class _Connection:
    """Two sockets, by the side they lead to."""

    def __init__(self, number: int, legs: dict[Towards, socket.socket]) -> None:
        self.number = number
        self.legs = legs
        self.carried: dict[Towards, int] = {"server": 0, "client": 0}
        self.stalls: dict[Towards, tuple[Fault, float]] = {}
        self.silent = False
        self.seen: set[bytes] = set()
        self.tail = b""
        self.born = self.moved = time.monotonic()
        self.ended: End | None = None
        self.over = asyncio.Event()
        self._left: set[Towards] = {"server", "client"}

    def finish(self, end: End) -> None:
        self.ended = self.ended or end
        self.over.set()

    def closed(self, towards: Towards, end: End) -> None:
        """A side has closed its leg; of a silent connection the other one is not to learn of it."""
        self._left.discard(towards)
        if not self.silent or not self._left:
            self.finish(end)

    def close(self) -> None:
        for leg in self.legs.values():
            _close(leg, self.ended or "rst")

    async def never(self) -> None:
        await asyncio.get_running_loop().create_future()


def _close(leg: socket.socket, end: End) -> None:
    with contextlib.suppress(OSError):
        if end == "rst":
            leg.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        else:
            leg.shutdown(socket.SHUT_RDWR)
    leg.close()
