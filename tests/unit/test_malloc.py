"""What `tune_malloc` asks of the C library is what it does."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAPS = """
import ctypes, sys, threading
from fedlink import rpc

libc = ctypes.CDLL(None)
if not hasattr(libc, "malloc_info"):
    sys.exit(3)
if sys.argv[1] == "tuned":
    rpc.tune_malloc()
libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p
barrier = threading.Barrier(12)

def work():
    libc.malloc(ctypes.c_size_t(100_000))
    barrier.wait()

threads = [threading.Thread(target=work) for _ in range(12)]
for t in threads:
    t.start()
for t in threads:
    t.join()
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


def heaps(how: str) -> int:
    """Heaps that the C library has after 12 threads have held memory at the same time."""
    done = subprocess.run([sys.executable, "-c", HEAPS, how], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("not the GNU C library")
    assert done.returncode == 0, done.stderr
    return done.stdout.count("<heap nr=")


def test_many_threads_share_two_heaps() -> None:
    # Every heap keeps what its threads once held of 1 MiB messages.
    assert heaps("tuned") <= 2 < heaps("plain")
