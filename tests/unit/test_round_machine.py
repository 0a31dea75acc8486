"""The round machine: by hand where a rule has a name, by random histories for the rest."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fedlink.run_file import Cohort
from fedserver.rounds.explain import Doing, RunView, explain
from fedserver.rounds.machine import step
from fedserver.rounds.model import (
    Aggregate,
    Aggregated,
    AggregationFailed,
    CloseRequested,
    Entry,
    Event,
    Fail,
    IssueTasks,
    Phase,
    Reissue,
    Round,
    SitesChanged,
    TaskChanged,
    TaskState,
    Tick,
    UpdateLost,
)
from fedserver.rounds.phases.select import needed
from fedserver.rounds.selection import cohort_size

SITES = ("a", "b", "c", "d")


def opened(policy: Cohort, sites=SITES) -> Round:
    current, actions = step(Round("r", 1, 1, policy, seed=7), SitesChanged(frozenset(sites), now=100.0))
    assert current.phase is Phase.COLLECT
    assert actions == [IssueTasks(tuple(sorted(current.tasks)))]
    return current


def told(current: Round, *events: Event) -> tuple[Round, list]:
    done = []
    for event in events:
        current, actions = step(current, event)
        done += actions
    return current, done


def accepted(*clients: str) -> list[TaskChanged]:
    return [TaskChanged(c, TaskState.ACCEPTED, 101.0) for c in clients]


def test_it_waits_for_enough_sites():
    waiting = Round("r", 1, 1, Cohort(min_clients=3), seed=0)
    assert step(waiting, SitesChanged(frozenset("ab"), 1.0)) == (waiting, [])
    assert step(waiting, SitesChanged(frozenset("abc"), 1.0))[0].phase is Phase.COLLECT


def test_it_closes_when_everybody_has_answered_and_adds_up_in_name_order():
    current, actions = told(opened(Cohort()), *accepted("d", "b", "a", "c"))
    assert current.phase is Phase.AGGREGATE
    assert actions == [Aggregate(("a", "b", "c", "d"))]
    assert step(current, Aggregated())[0].phase is Phase.COMMITTED


def test_it_closes_at_its_target_and_the_rest_is_closed():
    current, actions = told(opened(Cohort(target=2)), *accepted("c", "a"))
    assert actions == [Aggregate(("a", "c"))]
    assert {c: t.state for c, t in current.tasks.items()}["b"] is TaskState.CLOSED
    # What comes afterwards changes nothing.
    assert told(current, *accepted("b")) == (current, [])


def test_an_away_site_is_not_waited_for_but_may_come_back_while_the_round_is_open():
    policy = Cohort(min_clients=2, quorum=3)
    current, actions = told(opened(policy, "abc"), *accepted("a", "b"), TaskChanged("c", TaskState.AWAY, 102.0))
    assert (current.phase, actions) == (Phase.COLLECT, [])
    current, actions = told(current, TaskChanged("c", TaskState.RUNNING, 110.0), *accepted("c"))
    assert actions == [Aggregate(("a", "b", "c"))]
    without = told(opened(Cohort()), *accepted("a", "b", "c"), TaskChanged("d", TaskState.AWAY, 102.0))
    assert without[1] == [Aggregate(("a", "b", "c"))]


def test_checking_counts_to_no_quorum_and_is_waited_for():
    current, actions = told(opened(Cohort(), "ab"), *accepted("a"), TaskChanged("b", TaskState.CHECKING, 102.0))
    assert (current.phase, actions) == (Phase.COLLECT, [])
    late, actions = step(current, Tick(1e9))
    assert (late, actions) == (current, [])


@pytest.mark.parametrize(("arrived", "closes"), [("ab", True), ("a", False)])
def test_the_deadline_needs_the_quorum(arrived: str, closes: bool):
    current = opened(Cohort(min_clients=2, deadline=10.0))
    assert current.deadline_at == 110.0
    current, actions = told(current, *accepted(*arrived), Tick(109.9))
    assert actions == []
    current, actions = step(current, Tick(110.0))
    assert current.phase is (Phase.AGGREGATE if closes else Phase.FAILED)
    assert isinstance(actions[0], Aggregate if closes else Fail)


def test_a_failure_that_may_pass_is_tried_again_so_often():
    current = opened(Cohort(task_retries=1), "ab")
    failed = TaskChanged("a", TaskState.FAILED, 101.0, retryable=True)
    current, actions = step(current, failed)
    assert actions == [Reissue("a", 2)]
    assert current.tasks["a"] == Entry(TaskState.PENDING, 2)
    current, actions = told(current, failed)
    assert isinstance(actions[0], Fail)  # min_clients 2 can no longer be reached


def test_it_fails_at_once_when_the_quorum_is_out_of_reach():
    current, actions = told(opened(Cohort(min_clients=2), "ab"), TaskChanged("a", TaskState.REFUSED, 101.0))
    assert current.phase is Phase.FAILED
    assert "at least 2" in current.reason
    assert actions == [Fail(current.reason)]


def test_an_operator_can_close_it_with_a_quorum_only():
    current = opened(Cohort(min_clients=2))
    assert told(current, *accepted("a"), CloseRequested(105.0))[1] == []
    assert told(current, *accepted("a", "b"), CloseRequested(105.0))[1] == [Aggregate(("a", "b"))]


def test_a_failed_aggregation_fails_the_round():
    current, _ = told(opened(Cohort()), *accepted(*SITES))
    current, actions = step(current, AggregationFailed("the disk is gone"))
    assert (current.phase, actions) == (Phase.FAILED, [Fail("the disk is gone")])


states = st.sampled_from([s for s in TaskState if s not in (TaskState.CLOSED, TaskState.SUPERSEDED)])
events = st.one_of(
    st.builds(SitesChanged, st.frozensets(st.sampled_from(SITES)), st.just(100.0)),
    st.builds(TaskChanged, st.sampled_from(SITES), states, st.just(100.0), retryable=st.booleans()),
    st.builds(Tick, st.floats(0, 300)),
    st.just(CloseRequested(100.0)),
    st.just(Aggregated()),
    st.just(AggregationFailed("no")),
)
policies = st.builds(
    Cohort,
    min_clients=st.integers(1, 3),
    quorum=st.one_of(st.none(), st.integers(1, 3)),
    target=st.one_of(st.none(), st.integers(3, 4)),
    deadline=st.one_of(st.none(), st.just(50.0)),
    task_retries=st.integers(0, 2),
)


@given(policies, st.lists(events, max_size=40))
@settings(max_examples=400, deadline=None)
def test_any_history_keeps_the_promises(policy: Cohort, history: list[Event]):
    current = Round("r", 1, 1, policy, seed=3)
    ever_accepted: set[str] = set()
    aggregated = failed = issued = 0
    for event in history:
        before = current
        current, actions = step(current, event)
        assert list(Phase).index(current.phase) >= list(Phase).index(before.phase)
        for client, entry in before.tasks.items():
            if entry.state.final:
                assert current.tasks[client] == entry
        for action in actions:
            match action:
                case IssueTasks(clients=clients):
                    issued += 1
                    assert set(clients) == set(current.tasks)
                    assert len(clients) >= policy.least
                case Aggregate(clients=clients):
                    aggregated += 1
                    assert clients == current.accepted
                    assert list(clients) == sorted(set(clients))
                    assert len(clients) >= policy.least
                case Fail(reason=reason):
                    failed += 1
                    assert reason
                case Reissue(attempt=attempt):
                    assert attempt <= policy.task_retries + 1
        now_accepted = set(current.accepted)
        # An accepted update counts for good.
        assert ever_accepted <= now_accepted
        ever_accepted = now_accepted
        if current.phase in (Phase.SELECT, Phase.COLLECT):
            assert explain(RunView(state="active", workload="w", round=current, now=100.0))
        if current.phase in (Phase.AGGREGATE, Phase.COMMITTED, Phase.FAILED) and current.tasks:
            assert all(t.state.final for t in current.tasks.values())
    assert issued <= 1
    assert aggregated <= 1
    assert failed <= 1


@given(policies, st.permutations(SITES))
@settings(deadline=None)
def test_the_order_of_arrival_does_not_matter(policy: Cohort, order: list[str]):
    current, actions = told(opened(policy), *accepted(*order))
    wanted = policy.target or len(SITES)
    assert actions == [Aggregate(tuple(sorted(order[:wanted])))]
    assert current.phase is Phase.AGGREGATE


@given(st.integers(1, 200), st.floats(0.001, 1), st.integers(1, 5))
@settings(deadline=None)
def test_it_waits_for_the_least_number_of_sites_whose_share_reaches_the_quorum(quorum: int, share: float, least: int):
    policy = Cohort(select="fraction", fraction=share, min_clients=least, quorum=quorum)
    sites = needed(Round("r", 1, 1, policy, seed=0))
    assert sites >= least
    assert cohort_size(sites, policy) >= quorum
    assert sites in (least, quorum) or cohort_size(sites - 1, policy) < quorum


def test_a_quorum_beyond_all_sites_costs_no_time():
    policy = Cohort(select="fraction", fraction=1e-9, quorum=1 << 29)
    assert needed(Round("r", 1, 1, policy, seed=0)) > 1 << 58


def test_explanations_name_who_and_what_ends_it():
    current, _ = told(opened(Cohort(min_clients=4)), *accepted("a"), TaskChanged("b", TaskState.AWAY, 101.0))
    current, _ = told(current, TaskChanged("c", TaskState.RUNNING, 101.0))
    doing = {"b": Doing(seconds=40), "c": Doing("computing", 30, 100, 12)}
    text = explain(RunView(state="active", workload="w", round=current, now=101.0, doing=doing))
    assert "1 of 4 updates" in text
    assert "b (away for 40 s)" in text
    assert "c (computing 30 of 100, 12 s)" in text
    assert "d (has not fetched its task)" in text
    again, _ = told(current, TaskChanged("c", TaskState.FAILED, 102.0, retryable=True))
    doing["c"] = Doing(held_back=4)
    text = explain(RunView(state="active", workload="w", round=again, now=102.0, doing=doing))
    assert "c (failed; its next attempt begins in 4 s)" in text
    waiting = Round("r", 1, 1, Cohort(min_clients=3), seed=0)
    refusals = {"z": "does not offer workload 'w'"}
    view = RunView(state="active", workload="w", round=waiting, now=0, eligible=frozenset("a"), refusals=refusals)
    assert "2 more sites" in explain(view)
    assert "z does not offer" in explain(view)
    ready = RunView(state="active", workload="w", round=waiting, now=0, eligible=frozenset("abc"))
    assert explain(ready) == "round 1 is about to start with a, b, c"
    assert "paused" in explain(RunView(state="paused", workload="w", round=waiting, now=0))


def test_an_update_that_is_lost_while_it_is_added_up_is_collected_again():
    closed, actions = told(opened(Cohort(deadline=50.0)), *accepted(*SITES))
    assert (closed.phase, actions) == (Phase.AGGREGATE, [Aggregate(SITES)])
    assert step(closed, UpdateLost("e", 900.0)) == (closed, [])
    again, actions = step(closed, UpdateLost("b", 900.0))
    assert (again.phase, actions, again.accepted) == (Phase.COLLECT, [], ("a", "c", "d"))
    # The deadline was at 150; its site gets a term.
    assert again.deadline_at == 900.0
    assert step(again, Tick(899.0))[0].phase is Phase.COLLECT
    done, actions = told(again, *accepted("b"))
    assert (done.phase, actions) == (Phase.AGGREGATE, [Aggregate(SITES)])
    without, actions = step(again, Tick(901.0))
    assert (without.phase, actions) == (Phase.AGGREGATE, [Aggregate(("a", "c", "d"))])


def test_an_update_that_is_lost_while_others_are_out_is_collected_again():
    some, _ = told(opened(Cohort(deadline=50.0)), *accepted("a", "b", "d"))
    assert step(some, UpdateLost("c", 900.0)) == (some, [])
    again, actions = step(some, UpdateLost("b", 900.0))
    assert (again.phase, actions, again.accepted, again.deadline_at) == (Phase.COLLECT, [], ("a", "d"), 900.0)
    done, actions = told(again, *accepted("c", "b"))
    assert (done.phase, actions) == (Phase.AGGREGATE, [Aggregate(SITES)])


def test_who_comes_first_whatever_becomes_of_the_others():
    current = opened(Cohort(min_clients=1, task_retries=1))
    assert current.first == ()
    current, _ = told(current, *accepted("c", "b"))
    assert current.first == ()
    # A failure that may pass is tried again; that of the second attempt is final.
    current, _ = told(current, TaskChanged("a", TaskState.FAILED, 101.0, retryable=True))
    assert current.first == ()
    again, _ = told(current, TaskChanged("a", TaskState.FAILED, 102.0, retryable=True))
    assert again.first == ("b", "c")
    assert told(current, *accepted("a"))[0].first == ("a", "b", "c")
    refused, _ = told(current, TaskChanged("a", TaskState.REFUSED, 102.0))
    assert refused.first == ("b", "c")
    # Who is away may come back.
    away, _ = told(current, TaskChanged("a", TaskState.AWAY, 102.0))
    assert away.first == ()


def test_what_is_wrong_with_the_server_is_told_beside_what_a_run_waits_for():
    view = RunView("active", "w", opened(Cohort()), 101.0, obstacle="the disk is full")
    assert explain(view).endswith("; the disk is full")
    assert "disk" not in explain(RunView("completed", "w", None, 101.0, obstacle="the disk is full"))
