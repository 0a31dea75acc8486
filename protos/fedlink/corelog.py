"""What gRPC's core writes to stderr about handshakes, in a person's words.

The core ends a handshake before any code of ours runs, and says so only on stderr, in terms
of OpenSSL and as often as it is tried. While `handshakes_explained` is open, file descriptor
2 is read by a thread: a failed handshake goes to a function, every other line passes as it is (but for what
a stranger, or a proxy that refuses, can have written as often as he likes).
The function runs in another thread, for what it logs may itself come this way: were it the
reader, it would wait for ever for room in a full pipe that only it empties.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator

# Only at the beginning of a line of the core's own: a peer's words inside a line of ours must not hide that line.
_FAILED = re.compile(rb"[IWEF]\d{4} [^\]{]*\.cc:\d+\] Handshake failed with error ([A-Z_]+)(?:: ?(.*))?")
_CHATTER = re.compile(
    # The handshake goes on with the only certificate there is; the name in the line is the peer's choice.
    rb"[IWEF]\d{4} [^\]{]*\.cc:\d+\] No match found for server name"
    # Said again at every attempt, in five lines; the session says it once.
    rb"|[IWEF]\d{4} [^\]{]*\.cc:\d+\] HTTP proxy handshake with "
    rb"|=== Source Location Trace: ===|src/core/\S+:\d+\n|\n"
)
_PERIOD = 60.0
_CAUSES = (
    (b"certificate has expired", "its certificate has expired; it needs a new one"),
    (b"certificate is not yet valid", "its certificate is not valid yet; look at both clocks"),
    (b"unable to get local issuer certificate", "its certificate is not signed by a CA in tls.client_ca"),
    (b"self signed certificate", "its certificate is signed by itself, not by a CA in tls.client_ca"),
    (b"self-signed certificate", "its certificate is signed by itself, not by a CA in tls.client_ca"),
    (b"certificate signature failure", "its certificate is not signed by a CA in tls.client_ca"),
    (b"certificate purpose", "its certificate is not one for clients"),
    (b"CERTIFICATE_VERIFY_FAILED", "its certificate does not verify"),
    (b"PEER_DID_NOT_RETURN_A_CERTIFICATE", "it showed no certificate; tls.client_ca asks every site for one"),
    (b"ALERT", "it does not trust this server's certificate"),
    # What a refusal encrypted with keys that this side does not have yet looks like.
    (b"BAD_PACKET_LENGTH", "it broke off, most likely because it does not trust this server's certificate"),
    (b"WRONG_VERSION_NUMBER", "it does not speak TLS"),
    (b"HTTP_REQUEST", "it does not speak TLS"),
    (b"HTTPS_PROXY_REQUEST", "it does not speak TLS"),
)


def cause_of(line: bytes) -> str | None:
    """Why the handshake failed of which a line of the core tells; None if it tells of none."""
    found = _FAILED.match(line)
    if not found:
        return None
    said = found[2] or b""
    fallback = f"the handshake failed: {said.decode('utf-8', 'replace') or found[1].decode('ascii')}"
    return next((text for mark, text in _CAUSES if mark in said), fallback)


class Summary:
    """Says each cause at once, and after that how often it came again, once a minute.

    Args:
        say: gets the cause and how many connections it has refused since it was last said.
        clock: seconds.
    """

    def __init__(self, say: Callable[[str, int], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._said: dict[str, float] = {}
        self._count: dict[str, int] = {}

    def add(self, cause: str) -> None:
        """Note one refused connection."""
        now = self._clock()
        self._count[cause] = self._count.get(cause, 0) + 1
        if now - self._said.get(cause, -_PERIOD) >= _PERIOD:
            self._say(cause, self._count.pop(cause))
            self._said[cause] = now


@contextlib.contextmanager
def handshakes_explained(failed: Callable[[str], None]) -> Iterator[None]:
    """Read file descriptor 2 for as long as this is open. Python's own `sys.stderr` goes around it.

    Args:
        failed: gets why a handshake failed, as a server sees it; called in a thread of its own.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    reading, writing = os.pipe()
    before, sys.stderr = sys.stderr, os.fdopen(os.dup(terminal), "w", buffering=1, encoding="utf-8", errors="replace")
    os.dup2(writing, 2)
    os.close(writing)
    causes: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threads = [
        threading.Thread(target=_read, args=(reading, terminal, causes), name="corelog", daemon=True),
        threading.Thread(target=_tell, args=(causes, failed), name="corelog causes", daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        for thread in threads:
            thread.join()
        with contextlib.suppress(OSError):
            sys.stderr.close()
        sys.stderr = before
        os.close(terminal)


def _read(reading: int, terminal: int, causes: queue.SimpleQueue[str | None]) -> None:
    try:
        with os.fdopen(reading, "rb") as lines:
            for line in lines:
                cause = cause_of(line)
                if cause:
                    causes.put(cause)
                elif not _CHATTER.match(line):
                    _write(terminal, line)
    finally:
        causes.put(None)


def _write(terminal: int, line: bytes) -> None:
    # A disk that is full for a moment, or a reader that is gone, costs the line and nothing else.
    with contextlib.suppress(OSError):
        while line:
            line = line[os.write(terminal, line) :]


def _tell(causes: queue.SimpleQueue[str | None], failed: Callable[[str], None]) -> None:
    while (cause := causes.get()) is not None:
        # Whatever is wrong with telling it, the next one may go better.
        with contextlib.suppress(Exception):
            failed(cause)
