"""One run: feeds its round machine, and does what the machine asks for.

Every change goes through `lock`, so transitions are serial. A change is computed by the
pure machine, written in one transaction (`records`), and only then shown to sites and
watchers. A crash between any two lines leaves what the last transaction said, and
`start` goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection

from fedlink import log as logs
from fedlink.errors import FedlinkError, Reason
from fedlink.failpoints import reach
from fedlink.memory import peak_memory
from fedlink.run_file import RunSpec
from fedserver.rounds.evaluation import reached
from fedserver.rounds.explain import RunView, Wait, absentees, account
from fedserver.rounds.machine import step
from fedserver.rounds.model import (
    Action,
    Aggregate,
    Aggregated,
    AggregationFailed,
    CloseRequested,
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
from fedserver.runtime import outlook, records
from fedserver.runtime.aggregation import Aggregation
from fedserver.runtime.board import OpenTask
from fedserver.runtime.calibrating import Calibrating
from fedserver.runtime.early import EarlyFold
from fedserver.runtime.evaluations import Evaluations
from fedserver.runtime.lost_updates import LostUpdates
from fedserver.runtime.parts import Parts
from fedserver.runtime.tidying import Tidying
from fedserver.runtime.transactions import Work, transaction, verdict_on
from fedserver.runtime.versions import StoredVersion
from fedserver.runtime.whole import serial, whole
from fedserver.store.disk import is_disk
from fedserver.store.queries import runs as q
from fedserver.store.queries import tasks as task_queries
from fedserver.store.rows import RunRow, TaskRow

_NAMES = {IssueTasks: "issued", Reissue: "reissued", Aggregate: "closed", Fail: "failed"}


@contextlib.contextmanager
def _until_the_disk_does() -> Iterator[None]:
    """Pass over what the disk refuses now: `tick` takes it up, and a server that starts serves what needs no disk."""
    try:
        yield
    except FedlinkError as e:
        if not is_disk(e):
            raise


class RunDriver:
    """Drives one run that has not ended.

    Args:
        row: the run.
        parts: the rest of the server.
        ended: called with the run's id when it has ended.

    Attributes:
        tidying: deletes what the run does not need any more, also after its end.
        lock: held while a transition is computed, written and shown.
    """

    def __init__(self, row: RunRow, parts: Parts, ended: Callable[[int], None]) -> None:
        self.row = row
        self.round: Round | None = None
        self._parts = parts
        self._db = parts.database
        self._board = parts.board
        self._ended = ended
        self.lock = asyncio.Lock()
        self._aggregation = Aggregation(row.name, self._make_version, self._settle)
        self._lost = LostUpdates(row, parts, counts=self._counts, ask_again=self._ask_again)
        self._early = EarlyFold(row, parts, whole(self._lost.asked_again))
        self.tidying = Tidying(row, parts)
        self._evaluations = Evaluations(row, parts.board)
        self._calibrating = Calibrating(row, parts.board, parts.sites)
        self._failures = 0
        self._log = logs.get("rounds").bind(run=row.name)

    async def start(self, *, extended: bool = False) -> None:
        """Go on from what the database says; called once, also for a new run.

        Args:
            extended: the run had ended and was just given more rounds: it does the next one even if the version
                there is has reached the target.
        """
        async with self.lock:
            unfinished = await self._db.run(lambda c: task_queries.versions_in_evaluation(c, self.row.id))
            self._evaluations.restore(unfinished)
            asked = await self._db.run(lambda c: task_queries.calibration_tasks(c, self.row.id))
            if asked and self.row.calibration is None:
                self._calibrating.opened()
            found = await self._db.run(lambda c: q.newest_round(c, self.row.id))
            self._failures = await self._db.run(lambda c: q.failures_in_a_row(c, self.row.id))
            if found is None or found.phase in (Phase.COMMITTED, Phase.FAILED):
                with _until_the_disk_does():
                    await self._go_on(whatever_the_target=extended)
            else:
                number, attempt = found.number, found.attempt
                tasks = await self._db.run(lambda c: task_queries.round_tasks(c, self.row.id, number, attempt))
                # Sites that lost the server with it get a term to come back in.
                self.round = outlook.restored(self.row, found, tasks, not_before=time.time() + self._board.lease_term)
                if self.round.phase is Phase.AGGREGATE:
                    self._aggregation.begin(self.round)
        with _until_the_disk_does():
            await self.sites_changed()

    async def close(self) -> None:
        """Stop working; nothing that is committed is lost."""
        await self._aggregation.close()
        await self._early.close()
        await self.tidying.close()

    # --- What it is told

    @serial
    async def sites_changed(self) -> None:
        """Sites came, went or changed what they offer."""
        if self.round is not None and self.round.phase is Phase.SELECT:
            await self._try_select()

    @serial
    async def tick(self, now: float) -> None:
        """Time has passed; while the server drains, no deadline does."""
        await self._close_calibration(-math.inf if self._board.draining else now)
        if self.round is not None and self.round.phase is Phase.SELECT:
            if self.round.deadline_at is not None and now >= self.round.deadline_at:
                await self._try_select()
        elif not self._board.draining:
            await self._apply(Tick(now))
            if self.round is not None and self.round.phase is Phase.COLLECT:
                self._early.consider(self.row, self.round)
        await self._close_evaluations(-math.inf if self._board.draining else now)
        await self._resume()

    @serial
    async def task_changed(self, task: OpenTask, state: TaskState) -> None:
        """A task was fetched, left by its site, came back, or is being checked.

        What was true when it was said may not be any more when its turn comes: a task that is being
        checked stays that until its check has ended.
        """
        if task.check is None or state is TaskState.CHECKING:
            await self._move(task, state)

    @serial
    async def task_lapsed(self, task: OpenTask) -> None:
        """A task's term was over a moment ago; if it still is, its site is away."""
        if task.term_over(time.monotonic()):
            await self._move(task, TaskState.AWAY)

    @serial
    async def task_ended(
        self, task: OpenTask, state: TaskState, values: Mapping[str, Any], *, retryable: bool = False
    ) -> bool:
        """A task became final; `values` are columns of its record.

        Returns:
            Whether that was recorded; if not, its round had closed before.
        """
        if self._board.get(task.token) is not task:
            return False
        if task.row.kind == "train":
            event = TaskChanged(task.client, state, time.time(), retryable=retryable)
            await self._apply(event, lambda c: records.end_task(c, task, state, values))
            self._board.remove([task])
        else:
            again = task.row.kind == "calibrate" and retryable and task.row.attempt <= self._spec.cohort.task_retries
            await self._commit(lambda c: records.end_task(c, task, state, values))
            self._board.remove([task])
            if again:
                await self._ask_to_measure([task.client], task.row.attempt + 1)
            await self._close_calibration(time.time())
            await self._close_evaluations(time.time())
        return True

    @serial
    async def close_round(self) -> None:
        """Close the open round with what has arrived.

        Raises:
            FedlinkError: ROUND_NOT_FOUND, BELOW_QUORUM.
        """
        current = self.round
        if current is None or current.phase is not Phase.COLLECT:
            raise FedlinkError(Reason.ROUND_NOT_FOUND, f"run {self.row.name!r} collects no updates now")
        if len(current.accepted) < current.policy.least:
            have = f"{len(current.accepted)} updates and its quorum is {current.policy.least}"
            raise FedlinkError(Reason.BELOW_QUORUM, f"round {current.number} has {have}")
        await self._apply(CloseRequested(time.time()))

    @serial
    async def set_paused(self, *, paused: bool) -> None:
        """Open no further round, or go on.

        Raises:
            FedlinkError: RUN_STATE.
        """
        if self.row.state not in ("active", "paused"):
            raise FedlinkError(Reason.RUN_STATE, f"run {self.row.name!r} is {self.row.state}")
        wanted = "paused" if paused else "active"
        if self.row.state != wanted:
            renewed = self.round
            if renewed is not None and renewed.phase is Phase.SELECT and not paused:
                # Nobody could start it meanwhile, so the time to start it begins anew.
                renewed = replace(renewed, deadline_at=self._start_by())
            await self._set_state(wanted, "run_paused" if paused else "run_resumed", renewed)
            self.round = renewed
            await self._try_select()

    @serial
    async def stop(self) -> None:
        """End the run now, without a new version."""
        if self.row.state in q.LIVE_STATES:
            await self._end("stopped", "stopped by an operator")

    @serial
    async def set_rounds(self, rounds: int) -> None:
        """Change the number of rounds.

        Raises:
            FedlinkError: RUN_STATE if the run ended this instant.
        """
        if self.row.state not in q.LIVE_STATES:
            raise FedlinkError(Reason.RUN_STATE, f"run {self.row.name!r} has just ended; extend it once more")
        if rounds == self.row.rounds:
            return
        state = "active" if self.row.state == "finishing" and rounds > self.row.version else self.row.state

        def work(c: Connection) -> None:
            q.save_run(c, self.row.id, rounds=rounds, state=state)
            q.add_event(c, self.row.id, "run_extended", {"rounds": rounds}, time.time())

        await self._commit(work)
        unwanted = self.round
        if unwanted is not None and unwanted.phase is Phase.SELECT and unwanted.number > rounds:
            reason = "the run was given fewer rounds before it began"
            failed = replace(unwanted, phase=Phase.FAILED, reason=reason)
            await self._commit(lambda c: records.save_round(c, self.row.id, failed))
            self.round = None
        if self.round is None:
            await self._go_on()

    # --- The round; from here on `lock` is held

    async def _apply(self, event: Event, *also: Work) -> None:
        """Feed the machine; write what changed, and `also`, in one transaction; then act."""
        before = self.round
        after, actions = step(before, event) if before is not None else (None, [])
        works = list(also)
        issued: list[TaskRow] = []
        if before is not None and after is not None:
            if after.phase is not before.phase:
                works.append(lambda c: records.save_round(c, self.row.id, after))
            works += [self._record(action, after, issued) for action in actions]
        if works:
            await self._commit(*works)
            for action in actions:
                reach(f"round.{_NAMES[type(action)]}")
        self.round = after
        for row in issued:
            self._show(row)
        for action in actions:
            await self._follow_up(action)

    def _record(self, action: Action, after: Round, issued: list[TaskRow]) -> Work:
        tasks = [t.row for t in self._board.of_run(self.row.id)]
        verdict = verdict_on(action, after, self._failures + 1) if isinstance(action, Fail) else ""
        evaluators = self._evaluators() if self.row.version == 0 else []
        return transaction(action, self.row, after, tasks, evaluators=evaluators, verdict=verdict, issued=issued)

    def _show(self, row: TaskRow) -> None:
        self._board.add(self.row, [row])
        if row.kind == "evaluate":
            self._evaluations.opened(row.version)

    async def _follow_up(self, action: Action) -> None:
        if isinstance(action, Aggregate | Fail):
            self._board.remove([t for t in self._board.of_run(self.row.id) if t.row.kind == "train"])
        if isinstance(action, Aggregate):
            assert self.round is not None
            self._aggregation.begin(self.round)
        elif isinstance(action, Fail):
            await self._after_failure(action)

    async def _move(self, task: OpenTask, state: TaskState) -> None:
        if self._board.get(task.token) is task and task.state is not state:
            task.state = state
            if task.row.kind == "train":
                await self._apply(TaskChanged(task.client, state, time.time()))
            else:
                await self._close_calibration(time.time())
                await self._close_evaluations(time.time())

    async def _after_failure(self, action: Fail) -> None:
        failed = self.round
        assert failed is not None
        self._failures += 1
        self._log.warning("round failed", round=failed.number, attempt=failed.attempt, reason=action.reason)
        if self.row.state not in q.LIVE_STATES:
            await self._leave()
            return
        await self.tidying.drop_updates(failed)
        await self._open_round(failed.number)

    async def _try_select(self) -> None:
        if self.row.state == "active" and not self._board.draining and not self._calibrating.under_way:
            view = self._view()
            event = SitesChanged(view.eligible, view.now, view.returning, absentees(view))
            cohort = self._cohort(event) if self.row.calibration is None and self._calibrating.names else ()
            if cohort:
                await self._ask_to_measure(cohort, 1)
            else:
                await self._apply(event)

    # --- What is to be measured before the first round

    def _cohort(self, event: SitesChanged) -> tuple[str, ...]:
        """The sites that would begin the round now; none if it cannot begin."""
        assert self.round is not None
        after, _ = step(self.round, event)
        return tuple(after.tasks)

    async def _ask_to_measure(self, clients: Sequence[str], attempt: int) -> None:
        issued: list[TaskRow] = []
        run, names = self.row, self._calibrating.names
        await self._commit(lambda c: issued.extend(records.issue_calibration(c, run, clients, names, attempt)))
        reach("calibration.issued")
        self._board.add(self.row, issued)
        if attempt == 1:
            self._calibrating.opened()

    async def _close_calibration(self, now: float) -> None:
        """Go on with what has been measured, once nobody is waited for; without anything the run fails."""
        if not self._calibrating.over(now) or self.row.state not in q.LIVE_STATES:
            return
        rows = await self._db.run(lambda c: task_queries.calibration_tasks(c, self.row.id))
        if self._calibrating.needs_more(rows, now):
            return
        late, run = self._calibrating.tasks, self.row
        measured = self._calibrating.result(rows)
        if not measured.sites:
            await self._end("failed", self._calibrating.failure(measured))
            return
        await self._commit(lambda c: records.close_calibration(c, run, measured, [t.row.id for t in late]))
        reach("calibration.closed")
        self._board.remove(late)
        self._calibrating.closed()
        self._log.info("measured", **measured.settings, sites=sorted(measured.sites), missing=dict(measured.missing))
        if self.round is not None and self.round.phase is Phase.SELECT:
            # The time to find sites begins now.
            renewed = replace(self.round, deadline_at=self._start_by())
            await self._commit(lambda c: records.save_round(c, run.id, renewed))
            self.round = renewed
            await self._try_select()

    async def _open_round(self, number: int) -> None:
        self._early.drop()
        start_by = self._start_by()
        attempt = await self._db.run(lambda c: records.open_round(c, self.row.id, number, start_by))
        reach("round.opened")
        opened = Round(self.row.name, number, attempt, self._spec.cohort, self._spec.seed)
        self.round = replace(opened, deadline_at=start_by)
        await self._try_select()

    def _start_by(self) -> float | None:
        patience = self._spec.cohort.start_deadline
        return time.time() + patience if patience else None

    # --- The next version

    async def _make_version(self, current: Round) -> None:
        started = time.monotonic()
        tasks, base = await self._db.run(lambda c: records.aggregation_inputs(c, self.row, current))
        scratch = f"aggregate-{self.row.id}-{current.number}-{current.attempt}"
        sums = await self._early.taken()
        try:
            async with self._parts.versions.built(self.row, base, tasks, scratch, sums) as stored, self.lock:
                if self.round is current:
                    await self._commit_version(current, stored, tasks, time.monotonic() - started)
        finally:
            if sums is not None:
                await asyncio.to_thread(sums.drop)
        self.tidying.retire()

    def _counts(self, client: str, current: Round) -> bool:
        """Whether a client's update is one of those that this attempt at a round adds up."""
        now = self.round
        if now is None or now.phase not in (Phase.COLLECT, Phase.AGGREGATE):
            return False
        return (now.number, now.attempt) == (current.number, current.attempt) and client in now.accepted

    async def _ask_again(self, lost: TaskRow, current: Round) -> bool:
        """An update is gone: its site, which keeps it for that, sends it once more."""
        async with self.lock:
            if not self._counts(lost.client, current):
                return False
            self._early.drop()
            rows: list[TaskRow] = []
            term = time.time() + self._board.lease_term
            await self._apply(UpdateLost(lost.client, term), lambda c: rows.append(records.reopen_task(c, lost)))
            self._board.add(self.row, rows, fresh=False)
            return True

    async def _settle(self, current: Round, error: Exception) -> None:
        """Decide about a round whose version cannot be made: an update is asked for again, or the round fails."""
        if isinstance(error, FedlinkError):
            if await self._lost.asked_again(current, error):
                return
            reason = str(error)
        else:
            if self.round is current:  # otherwise the run was stopped, and its updates are gone
                self._log.error("aggregation failed", round=current.number, exc_info=error)
            reason = f"an error in the server ({type(error).__name__}); its log has the details"
        async with self.lock:
            if self.round is current:
                await self._apply(AggregationFailed(reason))

    async def _commit_version(
        self, current: Round, stored: StoredVersion, tasks: Sequence[TaskRow], seconds: float
    ) -> None:
        after, _ = step(current, Aggregated())
        number, run, memory = current.number, self.row, peak_memory()
        evaluators, stale = self._evaluators(), self._evaluations.stale(number)
        issued: list[TaskRow] = []

        def work(c: Connection) -> None:
            records.commit_version(c, run, after, stored, tasks=tasks, seconds=seconds, memory=memory)
            issued.extend(records.issue_evaluation(c, run, number, evaluators, [t.row.id for t in stale]))

        reach("version.stored")
        await self._commit(work)
        reach("version.committed")
        self.round, self._failures = after, 0
        self._log.info("committed", round=number, version=number, clients=len(tasks), seconds=round(seconds, 3))
        self._board.remove(stale)
        for row in issued:
            self._show(row)
        if not self._spec.retention.keep_updates:
            await self.tidying.drop_updates(current)
        await self._close_evaluations(time.time())
        await self._go_on()

    # --- What comes next

    async def _resume(self) -> None:
        """Take up a transition that an error (a full disk, a locked database) stopped half-way."""
        phase = self.round.phase if self.round is not None else None
        if self.round is not None and phase is Phase.AGGREGATE:
            self._aggregation.begin(self.round)
        elif phase in (None, Phase.COMMITTED, Phase.FAILED):
            await self._go_on()

    async def _go_on(self, *, whatever_the_target: bool = False) -> None:
        """Open the next round, wait for an evaluation, or end."""
        if self.row.state not in q.LIVE_STATES:
            return
        self.round = None
        last = self.row.version >= self.row.rounds
        if self._evaluations.pending(self.row.version) and (last or self._spec.stop):
            if last and self.row.state == "active":
                await self._set_state("finishing", "run_finishing")
        elif self._spec.stop and not whatever_the_target and await self._target_reached():
            await self._end("completed", f"{self._spec.evaluation.metric} reached {self._spec.stop.target}")
        elif last:
            await self._end("completed", "all rounds are done")
        else:
            await self._open_round(self.row.version + 1)

    async def _target_reached(self) -> bool:
        version = await self._db.run(lambda c: q.version(c, self.row.id, self.row.version))
        return version is not None and reached(self._spec, version.means)

    async def _close_evaluations(self, now: float) -> None:
        for version in self._evaluations.over(now):
            if self.row.state not in q.LIVE_STATES:
                return
            await self._close_evaluation(version)
            if self.round is None:
                await self._go_on()

    async def _close_evaluation(self, version: int) -> None:
        late, run = self._evaluations.tasks(version), self.row
        ids = [t.row.id for t in late]
        means: dict[str, float] = {}
        await self._commit(lambda c: means.update(records.close_evaluation(c, run, version, ids)))
        reach("evaluation.closed")
        self._board.remove(late)
        self._evaluations.closed(version)
        self.tidying.retire()
        self._log.info("evaluated", version=version, **{f"mean_{k}": round(v, 6) for k, v in means.items()})

    async def _end(self, state: str, reason: str) -> None:
        current, ids = self.round, [t.row.id for t in self._board.of_run(self.row.id)]
        reach("run.ending")
        await self._commit(lambda c: records.end_run(c, self.row.id, current, ids, state=state, reason=reason))
        await self._leave()

    async def _leave(self) -> None:
        """The record says that the run has ended: let go of everything."""
        self._board.remove(self._board.of_run(self.row.id))
        self._early.drop()
        current, self.round = self.round, None
        if current is not None:
            await self.tidying.drop_updates(current)
        self._log.info("ended", state=self.row.state, reason=self.row.reason)
        self.tidying.retire()
        self._ended(self.row.id)

    async def _set_state(self, state: str, kind: str, current: Round | None = None) -> None:
        def work(c: Connection) -> None:
            q.save_run(c, self.row.id, state=state)
            if current is not None:
                records.save_round(c, self.row.id, current)
            q.add_event(c, self.row.id, kind, {}, time.time())

        await self._commit(work)

    async def _commit(self, *works: Work) -> None:
        def work(c: Connection) -> RunRow:
            for each in works:
                each(c)
            return q.run_by_id(c, self.row.id)

        self.row = await self._db.run(work)
        self._parts.feed.notify(self.row.id)

    # --- Views

    @property
    def _spec(self) -> RunSpec:
        """The run file, with what has been measured."""
        return self.row.parsed

    def _evaluators(self) -> list[str]:
        """Who measures a version: also sites that are still on their way back after the server's restart."""
        late = outlook.returning(self.row.name, self._spec, self._parts.sites, "evaluate")
        return sorted([*outlook.eligible(self.row.name, self._spec, self._parts.sites, "evaluate")[0], *late])

    @property
    def aggregating(self) -> bool:
        """Whether the next version is being made; not while something is in its way that nobody knows the end of."""
        return not self._aggregation.obstacle and (self._ordered or self._aggregation.under_way)

    @property
    def _ordered(self) -> bool:
        return self.round is not None and self.round.phase is Phase.AGGREGATE

    @property
    def to_measure(self) -> tuple[str, ...]:
        """The settings that its sites are asked to measure."""
        return self._calibrating.names

    def waiting(self) -> str:
        """One sentence: what the run waits for; empty if for nothing."""
        return self.account().sentence

    def account(self) -> Wait:
        """What the run waits for, in its parts."""
        return account(self._view())

    def _view(self) -> RunView:
        return outlook.view(
            self.row,
            self._spec,
            self.round,
            sites=self._parts.sites,
            board=self._board,
            evaluations=self._evaluations,
            calibrating=self._calibrating,
            aggregating=self._aggregation.seconds,
            obstacle=self._parts.disk.trouble or (self._aggregation.obstacle if self._ordered else ""),
        )
