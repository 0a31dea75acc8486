"""Raw TCP between two places: one side sends a number of bytes, then takes as many; nothing else is done with them.

    python -m tests.bench.raw serve ADDRESS BYTES       prints the port
    python -m tests.bench.raw fetch ADDRESS:PORT BYTES  prints the seconds down and up

Each direction has a connection of its own, as a transfer of Fedlink's after a pause has.
"""

from __future__ import annotations

import json
import socket
import sys
import time

CHUNK = 1 << 20


def send(connection: socket.socket, nbytes: int) -> None:
    """Send zeros."""
    block = memoryview(bytes(CHUNK))
    for at in range(0, nbytes, CHUNK):
        connection.sendall(block[: nbytes - at])


def take(connection: socket.socket, nbytes: int) -> None:
    """Receive, into one buffer."""
    block = memoryview(bytearray(CHUNK))
    while nbytes:
        nbytes -= (got := connection.recv_into(block, min(CHUNK, nbytes)))
        if not got:
            raise ConnectionError("the other side has ended")


def serve(address: str, nbytes: int) -> None:
    """Send on one connection, take on the next one and say so."""
    with socket.create_server((address, 0)) as listener:
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        with listener.accept()[0] as connection:
            send(connection, nbytes)
        with listener.accept()[0] as connection:
            take(connection, nbytes)
            connection.sendall(b".")


def fetch(address: tuple[str, int], nbytes: int) -> None:
    """The other side, with a clock."""
    began = time.perf_counter()
    with socket.create_connection(address) as connection:
        take(connection, nbytes)
    down, began = time.perf_counter() - began, time.perf_counter()
    with socket.create_connection(address) as connection:
        send(connection, nbytes)
        take(connection, 1)
    print(json.dumps({"down": down, "up": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        host, _, port = sys.argv[2].rpartition(":")
        fetch((host, int(port)), int(sys.argv[3]))
