"""The line that tests of the network stand on: it does what it is told, to the byte, and counts it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.federation import until
from tests.support.line import Line


@contextlib.contextmanager
def echo(greeting: bytes = b"") -> Iterator[str]:
    """A server that greets, and gives back what it gets."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=give_back, args=(connection,), daemon=True).start()

    def give_back(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(greeting)
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def connection(line: Line, timeout: float = 5.0) -> Iterator[socket.socket]:
    host, _, port = line.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=timeout) as s:
        yield s


def got(s: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := s.recv(size - len(data))):
        data += more
    return data


def reset(s: socket.socket) -> bool:
    """Read to the end of a connection; whether that was a reset."""
    try:
        while s.recv(1 << 16):
            pass
    except ConnectionResetError:
        return True
    return False


def test_cut_at_the_byte() -> None:
    with echo() as server, Line(server) as line:
        line.cut(after_bytes=1000, towards="server", connection=2)
        line.cut(after_bytes=777, towards="client", connection=3, end="fin")
        with connection(line) as s:
            s.sendall(bytes(5000))
            assert len(got(s, 5000)) == 5000
        with connection(line) as s:
            s.sendall(bytes(5000))
            assert reset(s)
        with connection(line) as s:
            s.sendall(bytes(5000))
            with contextlib.suppress(ConnectionResetError):
                assert len(got(s, 5000)) == 777
    assert [(f.kind, f.connection) for f in line.fired] == [("cut", 2), ("cut", 3)]
    assert line.fired[0].towards_server == 1000
    assert line.fired[1].towards_client == 777
    assert line.connections == 3


def test_half_open() -> None:
    with echo() as server, Line(server) as line:
        fault = line.half_open(after_bytes=10, towards="client")
        with connection(line, 0.3) as s:
            s.sendall(bytes(10))
            assert len(got(s, 10)) == 10
            fault.until_fired()
            s.sendall(bytes(100_000))
            with pytest.raises(TimeoutError):
                s.recv(1)
        assert line.carried == {"server": 10, "client": 10}
        with connection(line) as s:
            s.sendall(b"next")
            assert got(s, 4) == b"next"
        # The server still has its leg of the first one.
        until(lambda: line.live == [1], "the second connection to end")
        assert line.drop() == 1


def test_stall_goes_on_after_its_time_and_when_released() -> None:
    with echo() as server, Line(server) as line:
        began = time.monotonic()
        line.stall(0.3, after_bytes=5)
        held = line.stall(after_bytes=20)
        with connection(line) as s:
            s.sendall(bytes(15))
            assert len(got(s, 15)) == 15
            assert time.monotonic() - began >= 0.3
            s.sendall(bytes(15))
            assert len(got(s, 5)) == 5
            held.until_fired()
            s.settimeout(0.2)
            with pytest.raises(TimeoutError):
                s.recv(1)
            held.release()
            s.settimeout(5)
            assert len(got(s, 10)) == 10


def test_throttle() -> None:
    with echo() as server, Line(server) as line:
        line.throttle(100_000, towards="server")
        began = time.monotonic()
        with connection(line) as s:
            s.sendall(bytes(50_000))
            assert len(got(s, 50_000)) == 50_000
        assert 0.4 < time.monotonic() - began < 3


def test_refuse_retarget_and_drop() -> None:
    with echo(b"one") as first, echo(b"two") as second, Line(first) as line:
        with connection(line) as old:
            assert got(old, 3) == b"one"
            line.retarget(second)
            with connection(line) as s:
                assert got(s, 3) == b"two"
            assert line.drop("fin") >= 1
            assert old.recv(1) == b""
        line.refuse(times=2)
        for _ in range(2):
            with pytest.raises(ConnectionResetError), connection(line) as s:
                s.recv(1)
        with connection(line) as s:
            assert got(s, 3) == b"two"


def test_what_never_happens_is_told_and_what_comes_again_is_counted() -> None:
    with pytest.raises(AssertionError, match="never happened"), echo() as server, Line(server) as line:
        line.cut(after_bytes=10)
    with echo() as server, Line(server) as line:
        idle = line.cut(idle=0.1, times=None, end="fin")
        for _ in range(2):
            with connection(line) as s:
                assert s.recv(1) == b""
        assert idle.hit == [1, 2]
