"""SELECT: a round waits for its sites, for ever or until its start deadline, and for those that lost the server."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given, settings

from fedlink.run_file import Cohort
from fedserver.rounds.machine import step
from fedserver.rounds.model import Fail, IssueTasks, Phase, Round, SitesChanged, Tick
from fedserver.rounds.phases.select import needed

ROUND = Round("r", 1, 1, Cohort(min_clients=3, start_deadline=50.0), seed=0, deadline_at=150.0)


def here(sites: str, now: float, returning: str = "", absent: str = "") -> SitesChanged:
    return SitesChanged(frozenset(sites), now, frozenset(returning), absent)


def test_it_fails_for_good_when_its_sites_do_not_come_in_time():
    assert step(ROUND, here("ab", 149.9)) == (ROUND, [])
    failed, actions = step(ROUND, here("ab", 150.0, absent="not connected: c (away for 60 s)"))
    reason = "2 of 3 sites (a, b) were there when its start_deadline was over; not connected: c (away for 60 s)"
    assert (failed.phase, failed.reason) == (Phase.FAILED, reason)
    assert actions == [Fail(reason, final=True)]


def test_enough_sites_at_the_last_moment_are_enough():
    started, actions = step(ROUND, here("abc", 1e9))
    assert actions == [IssueTasks(("a", "b", "c"))]
    # From now on it has the deadline of its updates, here none.
    assert (started.phase, started.deadline_at) == (Phase.COLLECT, None)


def test_by_default_it_waits_for_ever():
    endless = replace(ROUND, deadline_at=None)
    for event in (here("ab", 1e12), Tick(1e12)):
        assert step(endless, event) == (endless, [])


def test_time_alone_fails_nothing_for_who_is_there_has_to_be_looked_at():
    assert step(ROUND, Tick(1e12)) == (ROUND, [])


def test_it_waits_for_sites_that_lost_the_server_and_draws_from_all():
    policy = Cohort(select="count", count=2, min_clients=2)
    current = Round("r", 1, 1, policy, seed=5)
    assert step(current, here("ab", 1.0, returning="cd")) == (current, [])
    assert step(current, here("abc", 2.0, returning="d")) == (current, [])
    restarted = step(current, here("abcd", 3.0))
    undisturbed = step(current, here("abcd", 0.0))
    assert restarted[1] == undisturbed[1] != []


@given(
    st.frozensets(st.sampled_from("abcdef")),
    st.frozensets(st.sampled_from("abcdef")),
    st.floats(0, 300),
    st.integers(1, 4),
)
@settings(deadline=None)
def test_it_starts_fails_or_waits_and_never_two_of_them(eligible, returning, now, least):
    current = replace(ROUND, policy=Cohort(min_clients=least, start_deadline=50.0))
    after, actions = step(current, SitesChanged(eligible, now, returning - eligible))
    enough = len(eligible) >= needed(current)
    if enough and not returning - eligible:
        assert actions == [IssueTasks(tuple(sorted(eligible)))]
    elif not enough and now >= 150.0:
        assert actions == [Fail(after.reason, final=True)]
        assert f"{len(eligible)} of {least} sites" in after.reason
    else:
        assert (after, actions) == (current, [])
