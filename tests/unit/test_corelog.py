"""What gRPC's core writes to stderr, told in a person's words, and everything else left as it is."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlink.corelog import Summary, cause_of, handshakes_explained

CORE = b"I1123 23:56:11.016871   22239 ssl_transport_security.cc:2563] Handshake failed with error "
SSL = CORE + b"SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"
EXPIRED = SSL + b"CERTIFICATE_VERIFY_FAILED: certificate has expired"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (EXPIRED, "its certificate has expired"),
        (SSL + b"CERTIFICATE_VERIFY_FAILED: certificate is not yet valid", "not valid yet"),
        (SSL + b"CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate", "not signed by a CA"),
        (SSL + b"CERTIFICATE_VERIFY_FAILED: self signed certificate in certificate chain", "signed by itself"),
        (SSL + b"CERTIFICATE_VERIFY_FAILED: self-signed certificate", "signed by itself"),
        (SSL + b"CERTIFICATE_VERIFY_FAILED: unsupported certificate purpose", "is not one for clients"),
        (SSL + b"CERTIFICATE_VERIFY_FAILED: something quite new", "does not verify"),
        (SSL + b"PEER_DID_NOT_RETURN_A_CERTIFICATE", "showed no certificate"),
        (SSL + b"TLSV1_ALERT_UNKNOWN_CA", "does not trust this server's certificate"),
        (SSL + b"WRONG_VERSION_NUMBER", "does not speak TLS"),
        (SSL + b"HTTP_REQUEST", "does not speak TLS"),
        (
            SSL + b"NO_SHARED_CIPHER",
            "the handshake failed: error:1000007d:SSL routines:OPENSSL_internal:NO_SHARED_CIPHER",
        ),
        (CORE + b"SSL_ERROR_SYSCALL", "the handshake failed: SSL_ERROR_SYSCALL"),
    ],
)
def test_causes(line: bytes, words: str) -> None:
    for end in (b"", b"\n"):
        assert words in (cause_of(line + end) or "")


def test_a_name_that_a_stranger_asks_for_is_not_passed_on() -> None:
    line = b"I1123 23:56:11.016871   22239 ssl_transport_security.cc:1] No match found for server name: a {b.\n"
    script = (
        "import os\nfrom fedlink.corelog import handshakes_explained\n"
        f"with handshakes_explained(print):\n    os.write(2, {line!r})\n    os.write(2, b'other\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stderr == b"other\n"


@given(st.binary())
def test_other_lines_have_no_cause(line: bytes) -> None:
    assert cause_of(line) is None


@pytest.mark.parametrize(
    "line",
    [
        b'{"event": "refused", "error": "no client \'Handshake failed with error SSL\'"}\n',
        b'{"event": "refused", "error": "I1123 ssl.cc:1] Handshake failed with error SSL_ERROR_SSL: "}\n',
        b"2026-11-23 [info] refused  error='Handshake failed with error SSL_ERROR_SSL: x'\n",
        b"E1123 23:56:11.016871 22239 other.cc:3] No match found for server name: Handshake failed\n",
        b'E1123 x {"a": ".cc:1] Handshake failed with error SSL_ERROR_SSL"}\n',
    ],
)
def test_a_peers_words_hide_no_line(line: bytes) -> None:
    assert cause_of(line) is None


def test_summary_says_a_cause_at_once_and_then_once_a_minute() -> None:
    clock, said = Clock(), []
    summary = Summary(lambda cause, n: said.append((clock.now - 1000, cause, n)), clock)
    for second in range(150):
        clock.now = 1000 + second
        summary.add("a")
        if second in (10, 11):
            summary.add("b")
    assert said == [(0, "a", 1), (10, "b", 1), (60, "a", 60), (120, "a", 60)]
    clock.now += 1000
    summary.add("b")
    assert said[-1][1:] == ("b", 2)


@given(st.lists(st.tuples(st.integers(0, 200), st.sampled_from("abc"))))
def test_summary_counts_every_connection_and_says_none_twice(steps: list[tuple[int, str]]) -> None:
    clock, said = Clock(), []
    summary = Summary(lambda cause, n: said.append((clock.now, cause, n)), clock)
    for wait, cause in steps:
        clock.now += wait
        summary.add(cause)
    clock.now += 60
    for cause in "abc":
        summary.add(cause)
    for cause in "abc":
        own = [(at, n) for at, c, n in said if c == cause]
        assert sum(n for _, n in own) == 1 + sum(c == cause for _, c in steps)
        assert all(later - earlier >= 60 for (earlier, _), (later, _) in itertools.pairwise(own))


def test_a_clock_that_begins_at_zero_delays_nothing() -> None:
    clock, said = Clock(), []
    clock.now = 0.0
    Summary(lambda cause, n: said.append(cause), clock).add("a")
    assert said == ["a"]


# --- File descriptor 2


def test_lines_pass_and_handshakes_are_told(capfd: pytest.CaptureFixture[str]) -> None:
    causes: list[str] = []
    before = sys.stderr
    with handshakes_explained(causes.append):
        os.write(2, b"one\n" + EXPIRED + b"\ntwo ")
        os.write(2, "ünfinished \x1b[31m\n".encode())
        subprocess.run([sys.executable, "-c", "import os; os.write(2, b'of a child\\n')"], check=True)
        print("around it", file=sys.stderr, flush=True)
        os.write(2, EXPIRED + b"\nno end of line")
    assert sys.stderr is before
    text = capfd.readouterr().err
    assert [line for line in text.splitlines() if line != "around it"] == [
        "one",
        "two ünfinished \x1b[31m",
        "of a child",
        "no end of line",
    ]
    assert text.count("around it\n") == 1
    assert causes == [cause_of(EXPIRED)] * 2
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "afterwards\n"


def test_every_byte_passes_in_order(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    data = b"".join(b"%d %s\n" % (n, b"x" * (n % 3000)) for n in range(1000)) + b"\xff\x00\r\n"
    with handshakes_explained(lambda _: None):
        for at in range(0, len(data), 5000):
            os.write(2, data[at : at + 5000])
    assert capfdbinary.readouterr().err == data


def test_what_the_function_writes_never_waits_for_itself() -> None:
    """More handshakes at once than the pipe holds, and each is logged the way of all logs."""
    code = f"""
import os, threading
from fedlink.corelog import handshakes_explained
line = {EXPIRED!r} + b"\\n"
def fail():
    for _ in range(3000):
        os.write(2, line)
with handshakes_explained(lambda cause: os.write(2, cause.encode() + b"\\n")):
    threads = [threading.Thread(target=fail) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    # What is told after the end of the context goes to the terminal as well.
    assert done.stderr == b"its certificate has expired; it needs a new one\n" * 12_000


def test_a_function_that_fails_stops_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    told: list[str] = []

    def fail(cause: str) -> None:
        told.append(cause)
        raise LookupError(cause)

    with handshakes_explained(fail):
        os.write(2, EXPIRED + b"\nmore\n" + EXPIRED + b"\n")
    assert capfd.readouterr().err == "more\n"
    assert len(told) == 2


def test_a_full_disk_costs_lines_and_nothing_else() -> None:
    """Neither the log nor the end of the process may depend on whether stderr takes what is written."""
    script = (
        "import os\nfrom fedlink import log\nfrom fedlink.corelog import handshakes_explained\n"
        "log.setup()\n"
        "with handshakes_explained(lambda cause: log.get('x').warning(cause)):\n"
        "    for n in range(3):\n"
        f"        os.write(2, b'line\\n' + {EXPIRED!r} + b'\\n')\n"
        "        log.get('x').info('said', n=n)\n"
        "print('ended')\n"
    )
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=full, timeout=60, check=True
        )
    assert done.stdout == b"ended\n"
