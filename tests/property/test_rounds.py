"""The round machine under any history of events, with a restart at any moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

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
from fedserver.runtime import outlook, records
from fedserver.runtime.board import OpenTask
from fedserver.store.queries import runs as run_queries
from fedserver.store.queries import tasks as task_queries
from tests.support.effort import effort
from tests.support.ledger import Ledger, ledger

Draw = Callable[[st.SearchStrategy[Any]], Any]
SITES = ("ada", "bob", "carl", "dora")
OVER = (Phase.COMMITTED, Phase.FAILED)
FORWARD = {
    (Phase.SELECT, Phase.COLLECT),
    (Phase.SELECT, Phase.FAILED),
    (Phase.COLLECT, Phase.AGGREGATE),
    (Phase.COLLECT, Phase.FAILED),
    (Phase.AGGREGATE, Phase.COMMITTED),
    (Phase.AGGREGATE, Phase.FAILED),
}
# What the driver tells; the other states are the machine's and the board's own.
TOLD = [
    TaskState.RUNNING,
    TaskState.AWAY,
    TaskState.CHECKING,
    TaskState.ACCEPTED,
    TaskState.ACCEPTED,
    TaskState.REFUSED,
    TaskState.FAILED,
]
NOISE = ["some_are_there", "any_task", "tick", "close", "aggregation", "update_is_lost", "repeat", "restart"]
LIKELY = {
    Phase.SELECT: ["everybody_is_there"] * 6 + ["too_few_are_there"] + NOISE,
    Phase.COLLECT: ["open_task"] * 14 + ["any_task"] * 2 + ["deadline_comes"] + NOISE,
    Phase.AGGREGATE: ["aggregation"] * 3 + ["update_is_lost"] * 2 + NOISE,
    Phase.COMMITTED: ["open_round"] * 6 + NOISE,
    Phase.FAILED: ["open_round"] * 6 + NOISE,
}
"""What happens in a phase, by the names of methods; the oftener named, the likelier."""


@st.composite
def policies(draw: st.DrawFn) -> Cohort:
    """Any consistent policy that four sites can meet."""
    values: dict[str, Any] = {"select": draw(st.sampled_from(["all", "all", "count", "fraction"]))}
    least = draw(st.integers(1, 3))
    if values["select"] == "count":
        values["count"] = draw(st.integers(least, 4))
    if values["select"] == "fraction":
        values["fraction"] = draw(st.floats(0.5, 1.0))
    if draw(st.sampled_from([True, True, False])):
        values["target"] = draw(st.integers(least, 4))
    if draw(st.booleans()):
        values["quorum"], values["min_clients"] = least, draw(st.integers(1, 4))
    else:
        values["min_clients"] = least
    values["deadline"] = draw(st.sampled_from([None, 10.0, 60.0]))
    values["start_deadline"] = draw(st.sampled_from([None, 20.0]))
    values["task_retries"] = draw(st.integers(0, 2))
    return Cohort(**values)


class Rounds(RuleBasedStateMachine):
    """Attempts at rounds of one run, and what an onlooker knows of them from the events alone."""

    def __init__(self, book: Ledger) -> None:
        super().__init__()
        self.book = book
        self.now = 1000.0
        self.number = self.attempt = 0

    # --- The driver's part: what is written for which action

    @initialize(policy=policies(), seed=st.integers(0, 9))
    def begin(self, policy: Cohort, seed: int) -> None:
        self.policy, self.seed = policy, seed
        self.run = self.book.add_run(policy, seed=seed)
        self.open_round()

    def open_round(self, _: Draw | None = None) -> None:
        if self.number == 0 or self.round.phase is Phase.COMMITTED:
            self.number += 1
        start_by = self.now + self.policy.start_deadline if self.policy.start_deadline else None
        self.attempt = self.book.do(lambda c: records.open_round(c, self.run.id, self.number, start_by))
        opened = Round(self.run.name, self.number, self.attempt, self.policy, self.seed)
        self.round = replace(opened, deadline_at=start_by)
        self.history: list[Event] = []
        self.open: dict[str, OpenTask] = {}
        # What the onlooker knows: the last word on each site's newest task, and its attempts.
        self.heard: dict[str, TaskState] = {}
        self.attempts: dict[str, int] = {}

    def write(self, event: Event, after: Round, actions: list[Any]) -> None:
        """What `fedserver.runtime.driver` does."""

        def work(c: Any) -> None:
            if isinstance(event, TaskChanged) and event.state.final and event.client in self.open:
                task = self.open.pop(event.client)
                records.end_task(c, task, event.state, {})
            if isinstance(event, UpdateLost) and after.tasks != self.round.tasks:
                found = task_queries.round_tasks(c, self.run.id, self.number, self.attempt)
                lost = [row for row in found if row.client == event.client][-1]
                self.open[lost.client] = OpenTask(records.reopen_task(c, lost), self.run)
            if after.phase is not self.round.phase:
                records.save_round(c, self.run.id, after)
            for action in actions:
                match action:
                    case IssueTasks(clients=clients):
                        rows = records.issue_train(c, self.run, after, clients, 1)
                    case Reissue(client=client, attempt=attempt):
                        rows = records.issue_train(c, self.run, after, [client], attempt)
                    case Aggregate() | Fail():
                        ids = [t.row.id for t in self.open.values()]
                        records.close_tasks(c, self.run.id, after, ids, kind="closed", data={})
                        self.open, rows = {}, []
                self.open |= {row.client: OpenTask(row, self.run) for row in rows}

        if actions or isinstance(event, TaskChanged) or after != self.round:
            self.book.do(work)

    # --- What may happen, in any order

    @rule(data=st.data())
    def happen(self, data: st.DataObject) -> None:
        """One rule and no more, so that what leads somewhere is as frequent as it should be."""
        name = data.draw(st.sampled_from(LIKELY[self.round.phase]))
        getattr(self, name)(data.draw)

    def everybody_is_there(self, _: Draw) -> None:
        self.tell(SitesChanged(frozenset(SITES), self.now))

    def some_are_there(self, draw: Draw) -> None:
        returning = draw(st.frozensets(st.just("zoe")))
        self.tell(SitesChanged(draw(st.frozensets(st.sampled_from(SITES))), self.now, returning, "zoe is away"))

    def too_few_are_there(self, draw: Draw) -> None:
        self.now += draw(st.sampled_from([0.0, 19.9, 20.0]))
        self.tell(SitesChanged(frozenset(), self.now, absent="all are away"))

    def open_task(self, draw: Draw) -> None:
        """The news that a round waits for."""
        client = draw(st.sampled_from(sorted(c for c, s in self.heard.items() if not s.final)))
        self.tell(TaskChanged(client, draw(st.sampled_from(TOLD)), self.now, retryable=draw(st.booleans())))

    def any_task(self, draw: Draw) -> None:
        client = draw(st.sampled_from([*SITES, "mallory"]))
        self.tell(TaskChanged(client, draw(st.sampled_from(TOLD)), self.now, retryable=draw(st.booleans())))

    def tick(self, draw: Draw) -> None:
        self.now += draw(st.sampled_from([0.0, 0.1, 5.0, 60.0]))
        self.tell(Tick(self.now))

    def deadline_comes(self, draw: Draw) -> None:
        if self.round.deadline_at is not None:
            self.now = max(self.now, self.round.deadline_at - draw(st.sampled_from([0.0, 0.001])))
        self.tell(Tick(self.now))

    def close(self, _: Draw) -> None:
        self.tell(CloseRequested(self.now))

    def aggregation(self, draw: Draw) -> None:
        self.tell(draw(st.sampled_from([Aggregated(), AggregationFailed("the disk is gone")])))

    def update_is_lost(self, draw: Draw) -> None:
        self.tell(UpdateLost(draw(st.sampled_from(SITES)), self.now + draw(st.sampled_from([0.0, 30.0]))))

    def repeat(self, draw: Draw) -> None:
        """An event of before once more, out of order."""
        self.tell(draw(st.sampled_from(self.history or [Tick(self.now)])))

    def restart(self, draw: Draw) -> None:
        """The server dies and comes back; what it finds is what it had."""
        self.now += draw(st.sampled_from([0.0, 30.0, 1e6]))
        found = self.book.do(lambda c: run_queries.newest_round(c, self.run.id))
        assert found is not None
        tasks = self.book.do(lambda c: task_queries.round_tasks(c, self.run.id, found.number, found.attempt))
        term = 30.0
        again = outlook.restored(self.run, found, tasks, not_before=self.now + term)
        before = self.round
        assert (again.run, again.number, again.attempt) == (before.run, before.number, before.attempt)
        assert (again.policy, again.seed, again.phase) == (before.policy, before.seed, before.phase)
        assert again.reason == before.reason
        # A site gets a term to come back in; so nobody is away, and no deadline is over.
        expected = {c: t if t.state.final else Entry(TaskState.RUNNING, t.attempt) for c, t in before.tasks.items()}
        assert again.tasks == expected
        assert (again.deadline_at is None) == (before.deadline_at is None)
        if before.deadline_at is not None:
            assert again.deadline_at == max(before.deadline_at, self.now + term)
        self.round = again
        self.heard = {c: s if s.final else TaskState.RUNNING for c, s in self.heard.items()}

    # --- What must hold

    def tell(self, event: Event) -> None:
        before = self.round
        tasks_before = dict(before.tasks)
        after, actions = step(before, event)
        assert before.tasks == tasks_before, "a step changed its argument"
        assert step(before, event) == (after, actions), "a step depends on something else"
        self.history.append(event)
        self.look(before, event, after, actions)
        self.write(event, after, actions)
        self.round = after
        # A repeat changes nothing. Only a failure that is tried again cannot be told from the failure of the next
        # attempt; the board tells each attempt's end once, by its token.
        if not any(isinstance(a, Reissue) for a in actions):
            assert step(after, event) == (after, [])
        self.explained()

    def look(self, before: Round, event: Event, after: Round, actions: list[Any]) -> None:
        moved = (before.phase, after.phase)
        if isinstance(event, UpdateLost) and before.phase in (Phase.COLLECT, Phase.AGGREGATE):
            self.look_at_loss(before, event, after, actions)
            return
        # What may be added up before the round closes is added up first when it has.
        assert after.accepted[: len(before.first)] == before.first
        assert moved[0] is moved[1] or moved in FORWARD
        if before.phase in OVER:
            assert (after, actions) == (before, [])
        for client, entry in before.tasks.items():
            if entry.state.final:
                assert after.tasks[client] == entry
        if before.tasks:
            assert set(after.tasks) == set(before.tasks)
        assert (after.run, after.number, after.attempt) == (before.run, before.number, before.attempt)

        if moved == (Phase.SELECT, Phase.COLLECT):
            assert isinstance(event, SitesChanged)
            self.look_at_cohort(event, after, actions)
            return
        if before.phase is Phase.SELECT:
            few = isinstance(event, SitesChanged) and len(event.eligible) < needed(before)
            if few and before.deadline_at is not None and event.now >= before.deadline_at:
                assert actions == [Fail(after.reason, final=True)]
                assert event.absent in after.reason
                assert after.phase is Phase.FAILED
                return
            assert (after, actions) == (before, [])
            assert few or not isinstance(event, SitesChanged) or event.returning
            return
        if before.phase is Phase.COLLECT:
            self.look_at_collection(event, after, actions)
        if before.phase is Phase.AGGREGATE:
            assert (after.phase is Phase.COMMITTED) == (event == Aggregated())
            failed = isinstance(event, AggregationFailed)
            assert actions == ([Fail("the disk is gone")] if failed else [])
            assert (after.phase is Phase.FAILED) == failed

    def look_at_loss(self, before: Round, event: UpdateLost, after: Round, actions: list[Any]) -> None:
        """The one way back: a site whose update counted is asked for it again, and nobody else."""
        if event.client not in before.accepted:
            assert (after, actions) == (before, [])
            return
        assert actions == []
        assert after.phase is Phase.COLLECT
        assert after.tasks == {**before.tasks, event.client: Entry(TaskState.PENDING, self.attempts[event.client])}
        assert (after.deadline_at is None) == (before.deadline_at is None)
        if before.deadline_at is not None:
            assert after.deadline_at == max(before.deadline_at, event.not_before)
        self.heard[event.client] = TaskState.PENDING

    def look_at_cohort(self, event: SitesChanged, after: Round, actions: list[Any]) -> None:
        policy = self.policy
        cohort = tuple(sorted(after.tasks))
        assert actions == [IssueTasks(cohort)]
        assert set(cohort) <= event.eligible
        assert not event.returning
        assert len(event.eligible) >= policy.min_clients
        assert len(cohort) == cohort_size(len(event.eligible), policy)
        # It could not begin unless it could end well.
        assert len(cohort) >= policy.least
        if policy.select != "count":
            assert len(cohort) >= (policy.target or 0)
        assert set(after.tasks.values()) == {Entry(TaskState.PENDING, 1)}
        assert after.deadline_at == (event.now + policy.deadline if policy.deadline else None)
        self.heard = dict.fromkeys(cohort, TaskState.PENDING)
        self.attempts = dict.fromkeys(cohort, 1)

    def look_at_collection(self, event: Event, after: Round, actions: list[Any]) -> None:
        policy = self.policy
        expected: list[Any] = []
        if isinstance(event, TaskChanged) and event.client in self.heard and not self.heard[event.client].final:
            client = event.client
            more = self.attempts[client] < policy.task_retries + 1
            if event.state is TaskState.FAILED and event.retryable and more:
                self.attempts[client] += 1
                self.heard[client] = TaskState.PENDING
                expected = [Reissue(client, self.attempts[client])]
            else:
                self.heard[client] = event.state

        states = list(self.heard.values())
        accepted = sorted(c for c, s in self.heard.items() if s is TaskState.ACCEPTED)
        awaited = sum(s in (TaskState.PENDING, TaskState.RUNNING, TaskState.CHECKING) for s in states)
        possible = len(accepted) + awaited + states.count(TaskState.AWAY)
        enough = len(accepted) >= policy.least
        deadline = self.round.deadline_at
        is_due = isinstance(event, Tick) and deadline is not None and event.now >= deadline
        reached = policy.target is not None and len(accepted) >= policy.target
        if enough and (reached or is_due or awaited == 0 or isinstance(event, CloseRequested)):
            assert after.phase is Phase.AGGREGATE
            expected = [Aggregate(tuple(accepted))]
            assert policy.target is None or len(accepted) <= policy.target
        elif is_due or possible < policy.least:
            assert after.phase is Phase.FAILED
            assert after.reason
            expected = [Fail(after.reason)]
        else:
            assert after.phase is Phase.COLLECT
            assert awaited or TaskState.AWAY in states, "nothing could end this"
        assert actions == expected
        if after.phase is not Phase.COLLECT:
            self.heard = {c: s if s.final else TaskState.CLOSED for c, s in self.heard.items()}
        assert {c: (t.state, t.attempt) for c, t in after.tasks.items()} == {
            c: (s, self.attempts[c]) for c, s in self.heard.items()
        }
        assert max(t.attempt for t in after.tasks.values()) <= policy.task_retries + 1

    def explained(self) -> None:
        current = self.round
        for state in ("active", "paused", "finishing"):
            for doing in ({}, {c: Doing("computing", 3, 10, 2.0, 1.0) for c in current.tasks}):
                view = RunView(
                    state=state, workload="w", round=current, now=self.now, eligible=frozenset("ab"), doing=doing
                )
                text = explain(view)
                assert bool(text) is (current.phase not in OVER)
                assert "\n" not in text
                if current.phase is not Phase.COLLECT:
                    continue
                for client, entry in current.tasks.items():
                    assert (client in text) is not entry.state.final
                if current.deadline_at is None and not current.count(
                    TaskState.PENDING, TaskState.RUNNING, TaskState.CHECKING
                ):
                    assert "only their return or an operator ends it" in text


@pytest.fixture(scope="module")
def book():
    with ledger() as made:
        yield made


def test_any_history_of_a_round_keeps_its_promises(book: Ledger) -> None:
    run_state_machine_as_test(lambda: Rounds(book), settings=effort(35, 50))
