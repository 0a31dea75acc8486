"""The calibration of one run: what its first round waits for, where it gives settings as "auto"."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from fedlink.settings_schema import Schema
from fedserver.rounds.calibration import Measured, put_together, wanted
from fedserver.rounds.evaluation import over
from fedserver.rounds.model import TaskState
from fedserver.runtime.board import OpenTask, TaskBoard
from fedserver.runtime.sites import SiteRegistry
from fedserver.store.rows import RunRow, TaskRow

_SAID = 200


class Calibrating:
    """The deadline of a run's calibration; its tasks are on the board. Used with the driver's lock held."""

    def __init__(self, run: RunRow, board: TaskBoard, sites: SiteRegistry) -> None:
        self._run_id, self._spec = run.id, run.parsed
        self._board = board
        self._sites = sites
        self._deadline: float | None = None

    def opened(self) -> None:
        """Its tasks are there: written now, or before a restart, which gives it a full term."""
        self._deadline = time.time() + self._spec.calibration.deadline

    def closed(self) -> None:
        """It is recorded."""
        self._deadline = None

    @property
    def under_way(self) -> bool:
        """Whether sites are asked."""
        return self._deadline is not None

    @property
    def names(self) -> tuple[str, ...]:
        """The settings that the sites known have to measure."""
        return wanted(list(self._schemas().values()), self._spec.settings)

    @property
    def tasks(self) -> list[OpenTask]:
        """Those that are open."""
        return [t for t in self._board.of_run(self._run_id) if t.row.kind == "calibrate"]

    @property
    def states(self) -> Mapping[str, TaskState]:
        """Where the open ones stand, by client."""
        return {t.client: t.state for t in self.tasks}

    @property
    def seconds_left(self) -> float:
        """Until its deadline."""
        return (self._deadline or 0.0) - time.time()

    def over(self, now: float) -> bool:
        """Whether nobody is measuring any more, or the deadline is over; it may still have to go on (`needs_more`)."""
        return self._deadline is not None and over(self.states.values(), now, self._deadline)

    def needs_more(self, rows: Sequence[TaskRow], now: float) -> bool:
        """Whether it waits all the same.

        Before the deadline it waits for those that are away, if fewer have answered than a round needs; after it for
        the first answer, as long as anybody is measuring.

        Args:
            rows: every task of it.
            now: seconds since the epoch.
        """
        answered = {row.client for row in rows if row.state == TaskState.ACCEPTED}
        if now < (self._deadline or 0.0):
            return bool(self.tasks) and len(answered) < self._spec.cohort.least
        return not answered and any(state.waited_for for state in self.states.values())

    def result(self, rows: Sequence[TaskRow]) -> Measured:
        """What has been measured.

        Args:
            rows: every task of it.
        """
        found = {row.client: row.values for row in rows if row.state == TaskState.ACCEPTED}
        newest = {row.client: row for row in rows}
        missing = {client: _fate(row) for client, row in newest.items() if client not in found}
        return put_together(self.names, self._spec.calibration.own, self._schemas(), found, missing)

    def failure(self, measured: Measured) -> str:
        """Why the run ends, where nothing was found."""
        whys = "; ".join(f"{client}: {why}" for client, why in sorted(measured.missing.items()))
        return f"no site could measure {', '.join(self.names)} ({whys})"

    def _schemas(self) -> dict[str, Schema]:
        workload = self._spec.workload
        return {site.name: site.offers[workload].schema for site in self._sites.all() if workload in site.offers}


def _fate(row: TaskRow) -> str:
    if row.state == TaskState.FAILED:
        said = row.message.partition("\n")[0][:_SAID]
        return f"{row.reason}: {said}" if said else row.reason
    return "it gave no answer in time"
