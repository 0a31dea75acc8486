"""COLLECT: tasks are out; close as soon as nothing better can be had, or at the deadline."""

from __future__ import annotations

from dataclasses import replace

from fedserver.rounds.model import (
    Action,
    Aggregate,
    CloseRequested,
    Entry,
    Event,
    Fail,
    Phase,
    Reissue,
    Round,
    TaskChanged,
    TaskState,
    Tick,
    UpdateLost,
)
from fedserver.rounds.wording import listed

_LOST = (TaskState.REFUSED, TaskState.FAILED)


def step(current: Round, event: Event) -> tuple[Round, list[Action]]:
    """Follow the tasks and the clock."""
    actions: list[Action] = []
    match event:
        case TaskChanged():
            before = current.tasks.get(event.client)
            current, actions = _follow(current, event)
            if before and before.state.waited_for and event.state.waited_for:
                # Nothing that could end the round has changed; all of a thousand sites begin at once.
                return current, actions
        case UpdateLost() if event.client in current.accepted:
            return current.reopened(event), []
        case CloseRequested() if len(current.accepted) >= current.policy.least:
            return _close(current)
        case Tick(now=now) if current.deadline_at is not None and now >= current.deadline_at:
            return _at_deadline(current)
    if actions:
        return current, actions
    return _close_if_done(current)


def _follow(current: Round, event: TaskChanged) -> tuple[Round, list[Action]]:
    entry = current.tasks.get(event.client)
    if entry is None or entry.state.final:
        return current, []
    if event.state is TaskState.FAILED and event.retryable and entry.attempt <= current.policy.task_retries:
        again = Entry(TaskState.PENDING, entry.attempt + 1)
        return current.with_task(event.client, again), [Reissue(event.client, again.attempt)]
    return current.with_task(event.client, replace(entry, state=event.state)), []


def _close_if_done(current: Round) -> tuple[Round, list[Action]]:
    policy, accepted = current.policy, len(current.accepted)
    if policy.target and accepted >= policy.target:
        return _close(current)
    waiting = sum(t.state.waited_for for t in current.tasks.values())
    if not waiting and accepted >= policy.least:
        return _close(current)
    possible = accepted + waiting + current.count(TaskState.AWAY)
    if possible < policy.least:
        lost = [f"{c} ({t.state})" for c, t in sorted(current.tasks.items()) if t.state in _LOST]
        return _fail(
            current,
            f"{accepted} of at least {policy.least} updates were accepted and only {possible - accepted} more could "
            f"come: {len(lost)} of {len(current.tasks)} tasks failed or were refused, of {listed(lost)}; "
            f"`fedserver round show {current.run} {current.number} --attempt {current.attempt}` says why",
        )
    return current, []


def _at_deadline(current: Round) -> tuple[Round, list[Action]]:
    accepted, least = len(current.accepted), current.policy.least
    if accepted >= least:
        return _close(current)
    return _fail(current, f"{accepted} of at least {least} updates had arrived at the deadline")


def _close(current: Round) -> tuple[Round, list[Action]]:
    return replace(_closed(current), phase=Phase.AGGREGATE), [Aggregate(current.accepted)]


def _fail(current: Round, reason: str) -> tuple[Round, list[Action]]:
    return replace(_closed(current), phase=Phase.FAILED, reason=reason), [Fail(reason)]


def _closed(current: Round) -> Round:
    tasks = {client: t if t.state.final else replace(t, state=TaskState.CLOSED) for client, t in current.tasks.items()}
    return replace(current, tasks=tasks)
