"""Failpoints: named places where a test ends this process as a crash would.

    FEDLINK_FAILPOINTS="upload.marked@7,commit.stored@1"     SIGKILL at the 7th, or the 1st, passage
    FEDLINK_FAILPOINTS_LOG=FILE                              a line "NAME COUNT" is appended before

The variables are read once, when the process starts; without them a passage costs one
look at a constant. Nothing on the network can reach this. docs/reliability.md lists what
stands at which place.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator

VARIABLE = "FEDLINK_FAILPOINTS"
"""Where to end, and at which passage."""
LOG_VARIABLE = "FEDLINK_FAILPOINTS_LOG"
"""The file that says what was reached."""


class Plan:
    """Where this process is to end.

    Args:
        text: `NAME@COUNT`, separated by commas; COUNT is the passage, from 1.
        log: file to append to, or empty.

    Raises:
        ValueError: the text is not of this form.
    """

    def __init__(self, text: str, log: str = "") -> None:
        parts = [entry.partition("@") for entry in text.split(",")]
        if any(not name or not count.isdigit() for name, _, count in parts):
            raise ValueError(f"{VARIABLE}={text!r} is not a list of NAME@COUNT")
        self._ends = {(name, int(count)) for name, _, count in parts}
        self._log = log
        # `next` on a count is one step of the interpreter: two threads never see the same number.
        self._passages: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))

    def pass_by(self, name: str) -> None:
        """Count a passage, and end the process if it is the one."""
        count = next(self._passages[name])
        if (name, count) in self._ends:
            if self._log:
                fd = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                os.write(fd, f"{name} {count}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)


def _ignore(_name: str) -> None:
    """Do nothing: no plan, no failpoints."""


reach: Callable[[str], None] = (
    Plan(os.environ[VARIABLE], os.environ.get(LOG_VARIABLE, "")).pass_by if os.environ.get(VARIABLE) else _ignore
)
"""Pass by a failpoint: `reach("upload.marked")`."""
