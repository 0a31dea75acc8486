"""The floor under a round: raw TCP on loopback that moves and adds the same bytes, nothing else.

Server: one thread per client sends a file of `size` bytes, then receives as many and adds them (numpy float32) into
one accumulator; at the end it writes the result to a file. Clients: processes that receive into one reused buffer and
send from one. Prints {"round_s": median of the rounds}.

usage: tcp_round.py SIZE_BYTES CLIENTS [ROUNDS]
"""

import json
import multiprocessing as mp
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

CHUNK = 1 << 20


def recv_into(sock: socket.socket, view: memoryview) -> None:
    while len(view):
        view = view[sock.recv_into(view) :]


def client(port: int, size: int, rounds: int) -> None:
    buf = memoryview(bytearray(CHUNK))  # zeros until the first chunk arrives
    with socket.create_connection(("127.0.0.1", port)) as s:
        for _ in range(rounds):
            for send in (False, True):
                left = size
                while left:
                    n = min(CHUNK, left)
                    s.sendall(buf[:n]) if send else recv_into(s, buf[:n])
                    left -= n


def serve(conn: socket.socket, path: Path, acc: np.ndarray, locks: list[threading.Lock], size: int) -> None:
    buf = bytearray(CHUNK)
    view = memoryview(buf)
    fd = os.open(path, os.O_RDONLY)
    for offset in range(0, size, CHUNK):
        n = os.preadv(fd, [view[: min(CHUNK, size - offset)]], offset)
        conn.sendall(view[:n])
    os.close(fd)
    for offset in range(0, size, CHUNK):
        n = min(CHUNK, size - offset)
        recv_into(conn, view[:n])
        i = offset // 4
        with locks[(offset // CHUNK) % len(locks)]:
            acc[i : i + n // 4] += np.frombuffer(buf, np.float32, n // 4)


def main(size: int, clients: int, rounds: int = 3) -> None:
    size -= size % 4
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        path = Path(folder) / "global"
        block = np.random.default_rng(0).standard_normal(CHUNK // 4, dtype=np.float32).tobytes()
        with path.open("wb") as f:
            f.writelines(block[: min(CHUNK, size - offset)] for offset in range(0, size, CHUNK))
        procs = [mp.Process(target=client, args=(listener.getsockname()[1], size, rounds)) for _ in range(clients)]
        for p in procs:
            p.start()
        conns = [listener.accept()[0] for _ in procs]
        acc, locks, took = np.zeros(size // 4, np.float32), [threading.Lock() for _ in range(64)], []
        for _ in range(rounds):
            start = time.perf_counter()
            threads = [threading.Thread(target=serve, args=(c, path, acc, locks, size)) for c in conns]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            with (Path(folder) / "new").open("wb") as f:
                f.write(memoryview(acc).cast("B"))
            took.append(time.perf_counter() - start)
        for p in procs:
            p.join()
    print(json.dumps({"round_s": round(statistics.median(took), 3), "rounds": [round(t, 3) for t in took]}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
