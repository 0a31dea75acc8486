"""Why a run waits: in every phase whom for, since when, doing what, how far, and what will end it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedlink.run_file import Cohort
from fedserver.rounds.explain import Doing, RunView, Wait, account, explain, span
from fedserver.rounds.model import Entry, Phase, Round, TaskState


def round_of(phase: Phase, policy: Cohort | None = None, deadline_at: float | None = None, **tasks: TaskState) -> Round:
    entries = {client: Entry(state) for client, state in tasks.items()}
    return Round("r", 3, 1, policy or Cohort(), seed=0, phase=phase, tasks=entries, deadline_at=deadline_at)


def seen(current: Round | None, **known: Any) -> RunView:
    return RunView(**{"state": "active", "workload": "w", "round": current, "now": 1000.0, **known})


def who(wait: Wait) -> list[tuple[str, str]]:
    return [(w.client, w.state) for w in wait.clients]


SELECT = round_of(Phase.SELECT, Cohort(min_clients=3))
COLLECT = round_of(
    Phase.COLLECT,
    Cohort(min_clients=2, quorum=2),
    ada=TaskState.ACCEPTED,
    bob=TaskState.RUNNING,
    carl=TaskState.PENDING,
    dora=TaskState.CHECKING,
    eve=TaskState.AWAY,
)
DOING = {
    "bob": Doing("computing", 40, 100, 75),
    "carl": Doing(seconds=9),
    "dora": Doing("uploading", 5, 5, 2),
    "eve": Doing("computing", 3, 100, 312),
}


def test_a_round_that_collects_names_each_site_and_its_deadline():
    wait = account(seen(replace(COLLECT, deadline_at=1088.0), doing=DOING))
    assert wait.sentence == (
        "round 3 has 1 of 5 updates and waits for bob (computing 40 of 100, 75 s), "
        "carl (has not fetched its task for 9 s), dora (its update is being checked for 2 s), eve (away for 312 s); "
        "it closes at the latest in 88 s, and fails with fewer than 2 updates"
    )
    assert who(wait) == [("bob", "running"), ("carl", "pending"), ("dora", "checking"), ("eve", "away")]
    assert [w.doing for w in wait.clients] == [DOING[c] for c in ("bob", "carl", "dora", "eve")]
    assert not wait.endless


def test_bytes_are_told_in_megabytes():
    view = seen(
        round_of(Phase.COLLECT, bob=TaskState.RUNNING), doing={"bob": Doing("uploading", 41_900_000, 210_000_000, 7)}
    )
    assert "bob (uploading 41.9 of 210.0 MB, 7 s)" in explain(view)


def test_a_failed_task_says_when_its_next_attempt_begins():
    view = seen(round_of(Phase.COLLECT, bob=TaskState.PENDING), doing={"bob": Doing(held_back=4.2)})
    assert "bob (failed; its next attempt begins in 4 s)" in explain(view)


def test_without_a_deadline_it_says_what_closes_the_round():
    assert explain(seen(COLLECT, doing=DOING)).endswith("; it closes when nobody is left who answers")
    target = replace(COLLECT, policy=Cohort(target=4))
    assert explain(seen(target)).endswith("; it closes when it has 4 updates or nobody is left who answers")


def test_a_wait_that_only_a_return_or_an_operator_ends_is_told_apart():
    current = round_of(Phase.COLLECT, Cohort(min_clients=2), ada=TaskState.ACCEPTED, eve=TaskState.AWAY)
    wait = account(seen(current, doing={"eve": Doing(seconds=7300)}))
    assert wait.sentence == (
        "round 3 has 1 of 2 updates and waits for eve (away for 2 h); "
        "it needs 2 and has no deadline, so only their return or an operator ends it"
    )
    assert wait.endless
    assert not account(seen(replace(current, deadline_at=1010.0))).endless


def test_a_round_that_has_too_few_sites_names_those_that_are_not_there():
    view = seen(
        SELECT,
        eligible=frozenset({"ada"}),
        away={"bob": 20.0, "eve": 312.0},
        returning=frozenset({"bob"}),
        refusals={"zoe": "does not offer workload 'w'"},
    )
    wait = account(view)
    assert wait.sentence == (
        "round 3 waits for 2 more sites that offer workload 'w' (connected: ada); it starts as soon as they connect, "
        "and only that or an operator ends the wait; not connected: bob (connected when the server stopped), "
        "eve (away for 312 s); not counted: zoe does not offer workload 'w'"
    )
    assert who(wait) == [("bob", "returning"), ("eve", "away")]
    assert wait.endless


def test_a_site_that_works_for_another_run_is_not_taken_for_idle():
    doing = {**DOING, "carl": Doing(seconds=9, busy_with="run first")}
    sentence = explain(seen(COLLECT, doing=doing))
    assert "carl (busy with run first; this task waits for 9 s)" in sentence


def test_one_site_is_missing():
    sentence = explain(seen(replace(SELECT, deadline_at=1030.0), eligible=frozenset("ab")))
    assert (
        "waits for 1 more site that offers workload 'w' (connected: a, b); it starts as soon as it connects" in sentence
    )
    assert "; if it does not, the run fails in 30 s" in sentence


def test_a_round_with_a_start_deadline_says_when_the_run_fails():
    wait = account(seen(replace(SELECT, deadline_at=1030.0)))
    assert "waits for 3 more sites" in wait.sentence
    assert "; if they do not, the run fails in 30 s" in wait.sentence
    assert not wait.endless


def test_a_round_that_waits_for_sites_to_come_back_after_a_restart():
    view = seen(
        SELECT,
        eligible=frozenset("abc"),
        away={"d": 60.0, "e": 9000.0},
        returning=frozenset("d"),
        grace_left=12.0,
    )
    wait = account(view)
    assert wait.sentence == (
        "round 3 has 3 sites (a, b, c) and waits for d, connected when the server stopped, to come back; "
        "it starts without them in 12 s"
    )
    assert who(wait) == [("d", "returning")]
    assert not wait.endless
    ready = seen(SELECT, eligible=frozenset("abc"), away={"e": 9000.0})
    assert explain(ready) == "round 3 is about to start with a, b, c"


def test_an_aggregation_says_of_what_and_for_how_long():
    current = round_of(Phase.AGGREGATE, ada=TaskState.ACCEPTED, bob=TaskState.ACCEPTED, eve=TaskState.CLOSED)
    assert explain(seen(current, aggregating=12.3)) == (
        "round 3 is being aggregated from 2 updates (ada, bob), for 12 s now; the run goes on when that is done"
    )


def test_the_evaluation_that_a_run_ends_with():
    view = seen(
        None,
        state="finishing",
        evaluation={"ada": TaskState.RUNNING, "eve": TaskState.AWAY},
        evaluation_seconds_left=500.0,
        doing={"ada": Doing("computing", 1, 10, 5), "eve": Doing(seconds=40)},
    )
    wait = account(view)
    assert wait.sentence == (
        "waits for the evaluation of the newest version by ada (computing 1 of 10, 5 s), eve (away for 40 s); "
        "it goes on without them in 500 s"
    )
    assert who(wait) == [("ada", "running"), ("eve", "away")]


@pytest.mark.parametrize("current", [None, SELECT])
def test_a_paused_run_waits_for_an_operator(current: Round | None):
    wait = account(seen(current, state="paused", eligible=frozenset("abc")))
    assert wait.sentence == ("paused by an operator: only `fedserver run resume` or `fedserver run stop` ends that")
    assert wait.endless


def test_a_paused_run_with_an_open_round_says_both():
    for current in (replace(COLLECT, deadline_at=1088.0), round_of(Phase.AGGREGATE, ada=TaskState.ACCEPTED)):
        running, paused = explain(seen(current)), explain(seen(current, state="paused"))
        assert paused == f"{running}; the run is paused: no further round begins until `fedserver run resume`"


def test_a_draining_server_is_said_to_be_the_reason():
    assert explain(seen(SELECT, draining=True, eligible=frozenset("abc"))).startswith("the server is draining: nothing")
    assert "; the server is draining: no task is handed out" in explain(seen(COLLECT, draining=True))


def test_a_run_that_has_ended_says_so_and_why():
    view = seen(None, state="failed", reason="round 1 failed 3 times")
    assert explain(view) == "it has ended (failed): round 1 failed 3 times"


def test_a_run_between_two_steps_waits_for_nothing():
    assert account(seen(None)) == Wait()
    assert account(seen(round_of(Phase.COMMITTED))) == Wait()


def test_a_thousand_sites_make_no_endless_sentence():
    tasks = {f"site{i:04}": TaskState.RUNNING for i in range(1000)}
    wait = account(seen(round_of(Phase.COLLECT, **tasks)))
    assert len(wait.sentence) < 1000
    assert "and 980 more" in wait.sentence
    assert len(wait.clients) == 1000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (0.4, "0 s"), (599, "599 s"), (600, "10 min"), (7199, "120 min"), (7200, "2 h"), (1e6, "12 d")],
)
def test_lengths_of_time(seconds: float, text: str):
    assert span(seconds) == text
