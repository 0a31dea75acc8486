"""One loop of a training under way: where it is, and what is held while it lasts."""

from __future__ import annotations

from typing import Any

from fedclient.trainer.aliases import NO_CHANGE, Change, Snapshot
from fedclient.trainer.kept import Kept


class Loop:
    """A loop under way; the outermost one stands for the job itself.

    Attributes:
        before: kind and size of the loops begun before it in the same pass of the loop around it.
        kind: steps or batches.
        size: passes it makes, if that is known.
        step: the pass under way.
        epoch: for batches: how often the data were gone through.
        batch: for batches: the batch of this epoch under way.
    """

    def __init__(self, before: list[Any], kind: str, size: int | None) -> None:
        self.before = before
        self.kind = kind
        self.size = size
        self.step = self.epoch = self.batch = 0
        self.begun: list[Any] = []
        """Kind and size of the loops begun in the pass under way."""
        self.kept: dict[str, Kept] = {}
        """What was named to be kept in the pass under way."""
        self.made: list[Kept] = []
        """Generators handed out in the pass under way."""
        self.epoch_random: Any = None
        """The random state in which the epoch began."""
        self.resumes = False
        """Whether everything is to be brought back where it begins."""
        self.nests = False
        """Whether there have been loops in its passes."""
        self.earlier: list[Change] = []
        """What the loops begun before it have changed of what lies where."""
        self.over: list[Change] = []
        """What the loops begun in the pass under way have changed, once they are over."""
        self.passed: Change | None = NO_CHANGE
        """What its passes have changed until the one under way; None if that is not known."""
        self.snapshot: Snapshot | None = None
        """What lay where when it began, if there are checkpoints."""

    def turn(self) -> None:
        """Begin a pass: what the last one made is out of reach.

        Raises:
            RuntimeError: the last pass named something to be kept that cannot be brought back.
        """
        if self.kept and not self.begun:
            names = ", ".join(self.kept)
            raise RuntimeError(f"ctx.keep({names}=...) was called inside of the loop; call it before the loop begins")
        self.begun.clear()
        self.over.clear()
        self.kept.clear()
        self.made.clear()

    def change(self) -> Change:
        """What has changed since it began of what lies where."""
        return self.snapshot.change() if self.snapshot else NO_CHANGE

    def place(self) -> list[Any]:
        """Where it is."""
        return [self.before, self.kind, self.size, self.step, self.epoch, self.batch]
