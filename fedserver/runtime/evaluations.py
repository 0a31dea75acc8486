"""The open evaluations of one run: which versions are being measured, by whom, until when."""

from __future__ import annotations

import time
from collections.abc import Mapping

from fedserver.rounds.evaluation import over
from fedserver.rounds.model import TaskState
from fedserver.runtime.board import OpenTask, TaskBoard
from fedserver.store.rows import RunRow


class Evaluations:
    """Deadlines of a run's open evaluations; their tasks are on the board. Used with the driver's lock held."""

    def __init__(self, run: RunRow, board: TaskBoard) -> None:
        self._run_id = run.id
        self._term = run.parsed.evaluation.deadline
        self._board = board
        self._deadlines: dict[int, float] = {}

    def restore(self, unfinished: list[int]) -> None:
        """Give evaluations that a restart interrupted a full term."""
        self._deadlines = dict.fromkeys(unfinished, time.time() + self._term)

    def opened(self, version: int) -> None:
        """The tasks of a version were written."""
        self._deadlines[version] = time.time() + self._term

    def closed(self, version: int) -> None:
        """The evaluation of a version is recorded."""
        self._deadlines.pop(version, None)

    def pending(self, version: int) -> bool:
        """Whether a version's evaluation is not over."""
        return version in self._deadlines

    def tasks(self, version: int) -> list[OpenTask]:
        """The open tasks of a version's evaluation."""
        return [t for t in self._board.of_run(self._run_id) if t.row.kind == "evaluate" and t.row.version == version]

    def states(self, version: int) -> Mapping[str, TaskState]:
        """Where the open tasks of a version's evaluation stand, by client."""
        return {t.client: t.state for t in self.tasks(version)}

    def stale(self, version: int) -> list[OpenTask]:
        """Tasks for versions before this one that no site has begun."""
        tasks = self._board.of_run(self._run_id)
        return [t for t in tasks if t.row.kind == "evaluate" and t.row.version < version and not t.fetched]

    def seconds_left(self, version: int) -> float:
        """Until the deadline of a version's evaluation."""
        return self._deadlines.get(version, 0.0) - time.time()

    def over(self, now: float) -> list[int]:
        """Versions whose evaluation is over and not yet recorded, in order."""
        return [v for v, end in sorted(self._deadlines.items()) if over(self.states(v).values(), now, end)]
