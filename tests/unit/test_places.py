"""Which of several ranks hang, as their launcher judges by what they say."""

from __future__ import annotations

from fedclient.trainer.places import Places


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def two_ranks_in_a_job() -> tuple[Clock, Places]:
    clock = Clock()
    places = Places(clock)
    for rank in (0, 1):
        places.idle(rank)
        places.at(rank, 1, 0, 0)
    return clock, places


def test_one_that_does_not_come_and_says_nothing_hangs() -> None:
    clock, places = two_ranks_in_a_job()
    places.at(0, 1, 1, 4)
    clock.now = 9
    assert places.stalled(10) == ([], 4)
    clock.now = 11
    assert places.stalled(10) == ([1], 4)
    places.at(1, 1, 1, 4)
    assert places.stalled(10) == ([], 4)


def test_one_that_gives_signs_of_life_does_not() -> None:
    clock, places = two_ranks_in_a_job()
    places.at(1, 1, 1, 4)
    for _ in range(20):
        clock.now += 5
        places.alive(0)
        assert places.stalled(10)[0] == []
    clock.now += 11
    assert places.stalled(10)[0] == [0]


def test_idle_ones_wait_for_nobody_and_nobody_waits_for_them() -> None:
    clock, places = two_ranks_in_a_job()
    for rank in (0, 1):
        places.at(rank, 1, 7, 3)
    places.idle(1)
    clock.now = 100
    assert places.stalled(10)[0] == [], "the other one writes the update"
    places.idle(0)
    assert places.stalled(10)[0] == []


def test_one_that_is_left_in_an_earlier_job_is_behind() -> None:
    clock, places = two_ranks_in_a_job()
    for rank in (0, 1):
        places.at(rank, 1, 7, 3)
    places.idle(0)
    places.at(0, 2, 0, 0)
    clock.now = 11
    assert places.stalled(10)[0] == [1]
