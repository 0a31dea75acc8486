"""Raw TCP between two places: one side sends a number of bytes, then takes as many; nothing else is done with them.

    python -m tests.bench.raw serve ADDRESS BYTES ROUNDS       prints the port
    python -m tests.bench.raw fetch ADDRESS:PORT BYTES ROUNDS  prints the seconds down and up of each round

One connection serves all rounds, as one of Fedlink's does.
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


def serve(address: str, nbytes: int, rounds: int) -> None:
    """Send, take, and say so, over one connection."""
    with socket.create_server((address, 0)) as listener:
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        with listener.accept()[0] as connection:
            for _ in range(rounds):
                send(connection, nbytes)
                take(connection, nbytes)
                connection.sendall(b".")


def fetch(address: tuple[str, int], nbytes: int, rounds: int) -> None:
    """The other side, with a clock."""
    took: dict[str, list[float]] = {"down": [], "up": []}
    with socket.create_connection(address) as connection:
        for _ in range(rounds):
            began = time.perf_counter()
            take(connection, nbytes)
            took["down"].append(time.perf_counter() - began)
            began = time.perf_counter()
            send(connection, nbytes)
            take(connection, 1)
            took["up"].append(time.perf_counter() - began)
    print(json.dumps(took), flush=True)


if __name__ == "__main__":
    size, times = int(sys.argv[3]), int(sys.argv[4])
    if sys.argv[1] == "serve":
        serve(sys.argv[2], size, times)
    else:
        host, _, port = sys.argv[2].rpartition(":")
        fetch((host, int(port)), size, times)
