"""SELECT: wait until enough sites are there, then draw the cohort and write its tasks."""

from __future__ import annotations

import math
from dataclasses import replace

from fedserver.rounds.model import Action, Entry, Event, Fail, IssueTasks, Phase, Round, SitesChanged
from fedserver.rounds.selection import cohort_size, draw


def step(current: Round, event: Event) -> tuple[Round, list[Action]]:
    """Leave the phase when enough eligible sites are connected, or fail when they are not by the deadline.

    Sites that lost the server when it stopped are waited for as long as they have time to come back: otherwise the
    first ones to reconnect would be the cohort.
    """
    if not isinstance(event, SitesChanged):
        return current, []
    if len(event.eligible) < needed(current):
        return _at_deadline(current, event)
    if event.returning:
        return current, []
    cohort = draw(event.eligible, current.policy, seed=(current.seed, current.number, current.attempt))
    deadline = event.now + current.policy.deadline if current.policy.deadline else None
    opened = replace(current, phase=Phase.COLLECT, tasks=dict.fromkeys(cohort, Entry()), deadline_at=deadline)
    return opened, [IssueTasks(cohort)]


def _at_deadline(current: Round, event: SitesChanged) -> tuple[Round, list[Action]]:
    if current.deadline_at is None or event.now < current.deadline_at:
        return current, []
    names = f" ({', '.join(sorted(event.eligible))})" if event.eligible else ""
    reason = f"{len(event.eligible)} of {needed(current)} sites{names} were there when its start_deadline was over"
    if event.absent:
        reason += f"; {event.absent}"
    return replace(current, phase=Phase.FAILED, reason=reason), [Fail(reason, final=True)]


def needed(current: Round) -> int:
    """Sites that must be connected: `min_clients`, and enough that the cohort drawn can reach the quorum and target."""
    policy = current.policy
    wanted = max(policy.least, policy.target or 0)
    sites = max(policy.min_clients, policy.count or 0, wanted)
    if policy.select == "fraction" and policy.fraction:
        # The least n whose share, rounded up, is `wanted`; a step aside for what floating point rounds.
        sites = max(sites, math.floor((wanted - 1) / policy.fraction))
        while cohort_size(sites, policy) < wanted:
            sites += 1
    return sites
