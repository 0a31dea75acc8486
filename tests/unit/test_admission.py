"""Places for bulk streams: taken in turn, and with less memory each when there are many."""

from __future__ import annotations

import contextlib

import pytest

from fedlink.batches import BATCH_CHUNKS
from fedlink.errors import FedlinkError, Reason
from fedserver.runtime.access import Caller
from fedserver.services.admission import Admission, BulkLimits
from fedserver.settings import ServerSettings


class Ground:
    """An admission with a clock in the test's hand, and who holds a place."""

    def __init__(self, **limits: int) -> None:
        self.now = 0.0
        self.admission = Admission(BulkLimits(**limits), clock=lambda: self.now)
        self.held: dict[str, contextlib.ExitStack] = {}

    def come(self, name: str) -> float:
        """Ask for a place; answers the seconds after which to ask again, 0 if there was one."""
        stack = contextlib.ExitStack()
        try:
            stack.enter_context(self.admission.place(Caller(name, operator=False)))
        except FedlinkError as e:
            return e.retry_after or 0.0 if e.reason is Reason.BUSY else -1.0
        self.held[name] = stack
        return 0.0

    def go(self, name: str) -> None:
        """Give the place back."""
        self.held.pop(name).close()


def test_nobody_keeps_a_place_by_asking_again_at_once() -> None:
    ground = Ground(streams=2, crowd=1)
    queue = list("abcde")
    for name in queue:
        ground.come(name)
    assert set(ground.held) == {"a", "b"}
    served = []
    for _ in range(12):
        # One whose stream has ended has more to move and is the first to ask; the others ask when they were told to.
        first = next(iter(ground.held))
        ground.go(first)
        ground.come(first)
        ground.now += 0.7
        served += [name for name in reversed(queue) if name not in ground.held and not ground.come(name)]
    assert served[:9] == list("cdeabcdea")


def test_who_does_not_come_back_loses_its_turn() -> None:
    ground = Ground(streams=1, crowd=1)
    ground.come("a")
    pause = ground.come("b")
    ground.go("a")
    assert ground.come("c") > pause
    ground.now += 1.5 * pause
    assert ground.come("c")
    ground.now += 10
    assert not ground.come("c")


def test_many_share_the_memory_of_few() -> None:
    ground = Ground(streams=2, crowd=3)
    batches = []
    for name in "abcdef":
        assert not ground.come(name)
        batches.append(ground.admission.batch())
    assert ground.come("g")
    assert batches == [BATCH_CHUNKS] * 2 + [1] * 4
    for name in "cdef":
        ground.go(name)
    assert ground.admission.batch() == BATCH_CHUNKS


@pytest.mark.parametrize("others", [0, 2])
def test_one_caller_has_at_most_its_share(others: int) -> None:
    ground = Ground(streams=4, crowd=1, streams_per_caller=2)
    for name in range(others):
        ground.come(str(name))
    with ground.admission.place(Caller("a", operator=False)), ground.admission.place(Caller("a", operator=False)):
        assert ground.come("a")
        # It is not waited for: what it waits for is its own.
        assert bool(ground.come("b")) is bool(others)


def test_the_settings_say_how_much_and_how_long() -> None:
    limits = BulkLimits.of(ServerSettings(bulk_streams=6, transfer_stall_after=300))
    assert (limits.streams, limits.streams_per_caller, limits.stall) == (6, 3, 300.0)
