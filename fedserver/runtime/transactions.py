"""What is written when the round machine asks for something: one transaction for each of its actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection

from fedserver.rounds.model import Action, Aggregate, Fail, IssueTasks, Reissue, Round
from fedserver.runtime import records
from fedserver.store.rows import RunRow, TaskRow

Work = Callable[[Connection], Any]
"""Part of a transaction. It runs on another thread, so it holds what it needs."""


def verdict_on(action: Fail, failed: Round, failures: int) -> str:
    """Why a round that fails takes the run along; empty if it is tried again.

    Args:
        action: what the machine says of the round.
        failed: the round.
        failures: how often in a row rounds have failed, this time included.
    """
    if action.final:
        return f"round {failed.number} could not start: {action.reason}"
    if failures >= failed.policy.round_attempts:
        return f"round {failed.number} failed {failures} times, last because {action.reason}"
    return ""


def transaction(
    action: Action,
    run: RunRow,
    after: Round,
    open_tasks: Sequence[TaskRow],
    *,
    evaluators: Sequence[str],
    verdict: str,
    issued: list[TaskRow],
) -> Work:
    """What an action writes.

    Args:
        action: the action.
        run: the run, as it is before.
        after: the round after the transition.
        open_tasks: the run's.
        evaluators: who measures the starting version as the first round begins.
        verdict: of `verdict_on`, for a round that fails.
        issued: where the rows of new tasks go.
    """
    train = [row.id for row in open_tasks if row.kind == "train"]
    match action:
        case IssueTasks(clients=clients):

            def issue(c: Connection) -> None:
                issued.extend(records.issue_train(c, run, after, clients, 1))
                issued.extend(records.issue_evaluation(c, run, 0, evaluators, []))

            return issue
        case Reissue(client=client, attempt=attempt):
            return lambda c: issued.extend(records.issue_train(c, run, after, [client], attempt))
        case Aggregate(clients=clients):
            closed = {"clients": list(clients)}
            return lambda c: records.close_tasks(c, run.id, after, train, kind="round_closed", data=closed)
        case Fail(reason=reason):
            others = [row.id for row in open_tasks if row.kind != "train"]

            def fail(c: Connection) -> None:
                records.close_tasks(c, run.id, after, train, kind="round_failed", data={"reason": reason})
                if verdict:
                    records.end_run(c, run.id, after, others, state="failed", reason=verdict)

            return fail
