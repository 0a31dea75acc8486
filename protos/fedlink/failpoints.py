"""Failpoints: named places where a test ends this process as a crash would.

    FEDLINK_FAILPOINTS="upload.marked@7,version.stored@1"    SIGKILL at these passages, one after the other
    FEDLINK_FAILPOINTS_LOG=FILE                              a line "NAME@COUNT" is appended before each

A passage is counted from the start of its process. The log says how much of the plan has
happened, so one plan serves all the lives of a program, and of what it starts: the first
entry that is not in the log is the next to happen.

Programs look at the variables once, when they start; without them a passage costs one
look at a class attribute. Nothing on the network can reach this.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

VARIABLE = "FEDLINK_FAILPOINTS"
"""Where to end, and at which passage."""
LOG_VARIABLE = "FEDLINK_FAILPOINTS_LOG"
"""The file that says what was reached."""

SERVER: Mapping[str, str] = {
    "server.recovered": "what an earlier life left is swept, nothing is served yet",
    "run.created": "a run is recorded, nobody drives it yet",
    "calibration.issued": "tasks to measure settings are recorded, no site can see them",
    "calibration.closed": "what sites have measured is recorded, nothing in memory knows",
    "round.opened": "a round is recorded, its cohort is not drawn",
    "round.issued": "tasks are recorded, no site can see them",
    "round.reissued": "a further attempt is recorded, the site cannot see it",
    "round.closed": "a round takes no further update, its aggregation has not begun",
    "round.failed": "a round is recorded as failed, what follows is not decided",
    "task.given": "a poll has its task, the answer is not sent",
    "task.failed": "a site's failure is recorded, the answer is not sent",
    "blob.read": "some chunks of a blob were read to be sent",
    "upload.slot": "an upload has its place on the disk and no record",
    "upload.started": "an upload is recorded, the answer is not sent",
    "upload.written": "chunks are written, the mark has not moved",
    "upload.marked": "the mark has moved, nobody has been told",
    "upload.removed": "an upload is out of sight, its bytes are there",
    "update.checked": "an update was found good, which is not recorded",
    "update.judged": "a verdict is recorded, the answer is not sent",
    "fold.shard": "a shard of the next version is computed, not closed",
    "blob.listed": "a blob's chunk list is in place, the blob is not",
    "blob.placed": "a blob is in place and synced",
    "version.stored": "every blob of a version is stored, the version is not recorded",
    "version.committed": "a version is recorded, nothing in memory knows",
    "updates.forgotten": "the uploads of a round have no record any more, their bytes are there",
    "versions.retired": "old versions are recorded as gone, their blobs are there",
    "blob.unlinked": "a blob is deleted, its chunk list is there",
    "evaluation.closed": "the evaluation of a version is recorded",
    "run.ending": "a run is about to be recorded as ended",
}
"""Where a server may end, and how things stand there."""

CLIENT: Mapping[str, str] = {
    "client.registered": "the server knows the session, the daemon does not yet",
    "journal.fetched": "a task is written, the entry has no name yet",
    "task.kept": "a task is in the journal, no work has begun",
    "download.listed": "a chunk list is on the disk, no chunk is",
    "download.written": "chunks of a model are on the disk",
    "download.renamed": "a blob has its name, its list is still there",
    "model.fetched": "a model is laid out for the trainer",
    "update.ahead": "a file of an update is at the server, the result is not in the journal",
    "update.computed": "the trainer has finished, which is not in the journal",
    "journal.trained": "a result is written, the entry has no name yet",
    "update.encoded": "an update is hashed and has its manifest",
    "upload.sending": "some chunks of an update are on their way",
    "update.sent": "every byte of an update is at the server",
    "update.answered": "the verdict has come, it is not in the journal",
    "journal.completed": "the verdict is written, the entry has no name yet",
    "task.dropped": "a journal entry is gone, the task's files are there",
}
"""Where a daemon may end, and how things stand there."""

TRAINER: Mapping[str, str] = {
    "trainer.step": "a step is about to begin",
    "checkpoint.written": "a checkpoint is written, it has no name yet",
    "checkpoint.renamed": "a checkpoint has its name, the one before is gone",
    "trainer.wrote": "a file of the update is whole and told of, the next one is not",
    "trainer.update": "the update's files are written, the daemon has not been told",
}
"""Where a trainer may end, and how things stand there."""


class Plan:
    """Where this process is to end.

    Args:
        text: `NAME@COUNT`, separated by commas; COUNT is the passage, from 1.
        log: what has happened; the file need not exist.

    Raises:
        ValueError: the text is not of this form, or names no failpoint.
    """

    def __init__(self, text: str, log: Path) -> None:
        parts = [entry.partition("@") for entry in text.split(",")]
        known = {**SERVER, **CLIENT, **TRAINER}
        if any(name not in known or not count.isdigit() for name, _, count in parts):
            raise ValueError(f"{VARIABLE}={text!r} is not a list of NAME@COUNT, each NAME a failpoint")
        self._entries = [(name, int(count)) for name, _, count in parts]
        self._log = log
        # `next` on a count is one step of the interpreter: two threads never see the same number.
        self._passages: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))

    def pass_by(self, name: str) -> None:
        """Count a passage, and end the process if it is the one."""
        entry = name, next(self._passages[name])
        if entry in self._entries and self._next() == entry:
            fd = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(fd, f"{entry[0]}@{entry[1]}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def _next(self) -> tuple[str, int] | None:
        """The entry that is to happen next."""
        done = len(self._log.read_bytes().splitlines()) if self._log.exists() else 0
        return self._entries[done] if done < len(self._entries) else None


class _Armed:
    """The process's plan: one, as a process ends only once."""

    plan: Plan | None = None


def arm(environ: Mapping[str, str]) -> None:
    """Take the plan that the environment holds, if there is one; every program of ours does so first.

    Raises:
        ValueError: it holds something else, or no log goes with it.
    """
    text, log = environ.get(VARIABLE), environ.get(LOG_VARIABLE)
    if text and not log:
        raise ValueError(f"{VARIABLE} needs {LOG_VARIABLE}, the file that says what has happened")
    _Armed.plan = Plan(text, Path(log)) if text and log else None


def reach(name: str) -> None:
    """Pass by a failpoint."""
    if _Armed.plan is not None:
        _Armed.plan.pass_by(name)
