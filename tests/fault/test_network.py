"""Lines that break, fall silent, crawl and move, between a real server and real daemons: every round completes, its
weights are exact, and what had arrived is not sent again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.federation import Federation, until
from tests.support.lines import UPDATE, Pair, server_with_start

# One worker, so that the server is shared.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("network")]

MIB = 1 << 20
LOST = 5 * MIB
"""What a cut may cost: the chunk under way, and what gRPC had not handed over yet."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with server_with_start(Federation(tmp_path_factory.mktemp("network"))) as federation:
        yield federation


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Not to take longer; generously, for a busy machine."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def test_cut_at_any_byte(shared: Federation) -> None:
    with Pair(shared, "cut") as pair:
        # In the connection's preface, in its settings, in the first call, in the first answer.
        for number, n in enumerate((1, 24, 300), 1):
            pair.line.cut(after_bytes=n, towards="server", connection=number, end="fin" if number % 2 else "rst")
        pair.line.cut(after_bytes=0, towards="client", connection=4)
        pair.line.cut(after_bytes=20, towards="client", connection=5)
        # In chunks of the model, and late in every update.
        for n in (2 * MIB + 77, 9 * MIB + 1):
            pair.line.cut(after_bytes=n, towards="client")
        for n, end in ((9 * MIB, "rst"), (9 * MIB + 12345, "fin"), (8 * MIB - 1, "rst")):
            pair.line.cut(after_bytes=n, towards="server", end=end)
        pair.a.start()
        pair.b.start()
        pair.begin(3)
        pair.finished()
        # From scratch it were 26 MiB more.
        assert pair.line.carried["server"] < 3 * UPDATE + 3 * LOST
        assert pair.line.carried["client"] < 3 * UPDATE + 2 * LOST


def test_answers_that_are_lost(shared: Federation) -> None:
    with Pair(shared, "lost") as pair:
        a, line = pair.a, pair.line
        spool = shared.data_dir / "spool"
        uploads = set(spool.iterdir())

        def lose(method: str, happened: Callable[[], object]) -> None:
            """Let a call reach the server, and its answer nobody."""
            fault = line.stall(marker=method.encode(), towards="client").until_fired()
            until(happened, f"{method} to reach the server")
            a.hold()
            line.drop()
            fault.release()

        pair.begin(3)
        pair.b.start()
        a.hold()
        a.start()
        lose("RegisterClient", lambda: a.name in [c["name"] for c in shared.json("client", "list")])
        lose("PollTask", lambda: pair.state(1, a))
        calls: dict[str, Callable[[], object]] = {
            "StartUpload": lambda: set(spool.iterdir()) - uploads,
            # Its answer follows the last byte; nobody sees it leave.
            "WriteBlob": lambda: time.sleep(0.5) or True,
            "CompleteTask": lambda: pair.accepted(3, a),
        }
        for number, (method, happened) in enumerate(calls.items(), 1):
            a.until_training(number)
            line.drop()  # a connection names a method once
            a.release()
            lose(method, happened)
        a.release()
        pair.finished()


def test_half_open(shared: Federation) -> None:
    with Pair(shared, "half", patient=False) as pair:
        a, b, line = pair.a, pair.b, pair.line
        a.start()
        b.start()
        pair.begin(3)
        # In mid-upload: the old writer still waits at the server when the new one comes.
        line.half_open(after_bytes=4 * MIB, towards="server").until_fired()
        with at_most(40):
            pair.until_accepted(1, a)
        assert shared.server
        assert "A newer WriteBlob" in shared.server.text()

        # In mid-poll, and with a connection for uploads that was good a moment ago.
        b.until_training(2)
        b.hold()
        pair.until_accepted(2, a)
        b.until_training(2)
        assert line.drop("half_open")
        b.release()
        with at_most(40):
            pair.until_accepted(3, a)
        pair.finished()


def test_stalls_are_waited_out_or_given_up(shared: Federation) -> None:
    with Pair(shared, "stall", patient=False) as pair:
        a, b, line = pair.a, pair.b, pair.line
        line.stall(0.8, after_bytes=3 * MIB)
        b.hold()
        a.start()
        b.start()
        pair.begin(2)
        pair.until_accepted(1, a)
        assert a.daemon
        assert "Nothing moved" not in a.daemon.text()
        assert line.carried["server"] < UPDATE + MIB
        a.hold()
        b.release()
        a.until_training(2)
        until(lambda: len(line.live) == 1, "the connection for blobs to be given up")
        line.stall(10.0, after_bytes=4 * MIB)
        a.release()
        with at_most(40):
            pair.until_accepted(2, a)
        assert "Nothing moved for 2 seconds" in a.daemon.text()
        assert line.carried["server"] < 2 * UPDATE + LOST + MIB
        pair.finished()


def test_proxies_that_close_what_is_idle_old_or_long(shared: Federation) -> None:
    with Pair(shared, "proxy") as pair:
        for line in pair.lines.values():
            line.throttle(8e6)
            line.cut(idle=0.4, times=None, end="fin")
            line.cut(after_seconds=1.0, times=None, end="fin")
            line.cut(after_bytes=3 * MIB, times=None)
        pair.a.start()
        pair.b.start()
        pair.begin(1)
        pair.finished()
        for line in pair.lines.values():
            cuts = len([f for f in line.fired if f.towards_server > MIB])
            assert line.carried["server"] < UPDATE + cuts * LOST


def test_the_server_comes_back_elsewhere(shared: Federation) -> None:
    with Pair(shared, "move", patient=False) as pair:
        a, b = pair.a, pair.b
        b.hold()
        a.start()
        b.start()
        held = pair.line.stall(after_bytes=4 * MIB)
        pair.begin(2)
        held.until_fired()
        b.until_training(1)
        # Its machine vanishes: one site is sending to it, the other one computing.
        for line in pair.lines.values():
            assert line.drop("half_open")
        shared.kill_server()
        held.release()
        shared.start_server("--log-level", "debug", listen="127.0.0.2:0", max_poll_wait=1.0)
        for line in pair.lines.values():
            line.refuse(times=1)
            line.retarget(shared.address)
        b.release()
        with at_most(40):
            pair.until_accepted(1, a)
            pair.until_accepted(1, b)
        pair.finished()
