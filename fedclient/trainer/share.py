"""What a site gives in a round: the limits of a training, what of it was done, and what its result then weighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self


class LimitUncountedError(ValueError):
    """A limit cannot be kept, for the class does not show what it is of; the message says what to do."""


@dataclass(frozen=True)
class Limits:
    """What a training does at most; None: no limit."""

    steps: int | None = None
    epochs: int | None = None
    examples: int | None = None
    max_seconds: float | None = None

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Self:
        """From what is set of it."""
        return cls(**{name: value for name, value in table.items() if value is not None})


class Share:
    """The limits of one training, and how far it is.

    Args:
        asked: what the run asks of this site in a round.
        own: what the site gives at most.

    Attributes:
        examples: that were handed out, or that the class said it had used.
        epochs: passes over data that were finished.
        cut: which limit ended the training before its loops were over; empty: none.
    """

    def __init__(self, asked: Limits | None = None, own: Limits | None = None) -> None:
        self._limits = (("run", asked or Limits()), ("site", own or Limits()))
        self.examples = self.epochs = 0
        self.cut = ""
        self._planned: int | None = 0
        self._handed_out = self._untold = 0
        self._last: int | None = 0

    def tightest(self, name: Literal["steps", "epochs", "examples"]) -> int | None:
        """The lower one of the two limits of a name."""
        return min((n for _, limits in self._limits if (n := getattr(limits, name)) is not None), default=None)

    @property
    def max_seconds(self) -> float | None:
        """The shorter one of the two budgets of time."""
        return min((s for _, limits in self._limits if (s := limits.max_seconds) is not None), default=None)

    def plan(self, size: int | None, epoch: int | None, outer: Sequence[tuple[int, int | None]]) -> None:
        """A loop begins.

        Args:
            size: passes that it makes without limits; None if that is not known.
            epoch: passes of one of its epochs, if it has any.
            outer: of the loops around it: the pass under way, and the passes in all.
        """
        asked = self._limits[0][1].epochs
        if size is not None and epoch and asked is not None:
            size = min(size, asked * epoch)
        if any(step for step, _ in outer):
            return  # the first pass of the loops around it has spoken for the later ones
        for _, passes in outer:
            size = None if size is None or passes is None else size * passes
        self._planned = None if size is None or self._planned is None else self._planned + size

    def hand_out(self, batch: Any) -> None:
        """A batch is given to the class."""
        self._handed_out += 1
        self._last = rows_of(batch)
        if self._last is None:
            self._untold += 1
        self.examples += self._last or 0

    def saw(self, examples: int) -> None:
        """The class says how many examples it uses; that goes over what was counted of the last batch."""
        if self._last is None:
            self._untold -= 1
        self.examples += examples - (self._last or 0)
        self._last = 0

    def over(self, steps: int, seconds: float) -> bool:
        """Whether a limit is reached; the first time that it is notes which one."""
        for whose, limits in self._limits:
            done = {"steps": steps, "epochs": self.epochs, "examples": self.examples, "max_seconds": seconds}
            for name, value in done.items():
                limit = getattr(limits, name)
                if limit is not None and value >= limit:
                    self.cut = self.cut or f"{whose} {name}"
                    return True
        return False

    def check(self) -> None:
        """At the end of a training: see whether its limits could be kept.

        Raises:
            LimitUncountedError: there is one that nothing was counted for.
        """
        wrong = "epochs" if self.tightest("epochs") and not self._handed_out else ""
        if self.tightest("examples") and (self._untold or not self.examples):
            wrong = "examples"
        if wrong:
            raise LimitUncountedError(
                f"the limit {wrong!r} of [work] in the run file, or of [workload.NAME.share] in site.toml, cannot be "
                f"kept: this class does not show its {wrong}; let it loop over ctx.batches"
                + (" and call ctx.saw(n) in each pass" if wrong == "examples" else "")
                + ", or limit steps or max_seconds instead"
            )

    def weight(self, examples: int, steps: int, *, counted: bool) -> int:
        """What the result weighs.

        A training that did all that the run asked of the site weighs what its class says. One that was cut short of it,
        by the site's own limits or by time, weighs the same part of that as it did of the steps; but not if the
        class has counted what it used.

        Args:
            examples: what the class says.
            steps: that were done.
            counted: whether the class has set it inside of its loops.
        """
        if not self.cut or (self.cut.startswith("run") and self.cut != "run max_seconds"):
            return examples
        if counted:
            return examples
        planned = self._asked_steps(steps)
        if planned is None:
            return min(examples, self.examples) if self.examples else examples
        if steps >= planned:
            return examples
        return max(min(examples, 1), (2 * examples * steps + planned) // (2 * planned))

    def _asked_steps(self, steps: int) -> int | None:
        """Steps that the run asked for, of those that the class would have made."""
        asked = self._limits[0][1]
        known = [n for n in (self._planned, asked.steps) if n is not None]
        if asked.examples is not None and self.examples:
            known.append(-(-steps * asked.examples // self.examples))
        return min(known, default=None)

    def take(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "examples": self.examples,
            "epochs": self.epochs,
            "cut": self.cut,
            "planned": self._planned,
            "handed_out": self._handed_out,
            "untold": self._untold,
        }

    def give(self, state: Mapping[str, Any]) -> None:
        """Go on from what `take` gave."""
        self.examples, self.epochs, self.cut = state["examples"], state["epochs"], state["cut"]
        self._planned, self._handed_out, self._untold = state["planned"], state["handed_out"], state["untold"]
        self._last = 0


def rows_of(batch: Any) -> int | None:
    """How many examples a batch holds: the length of its first tensor or array; None if that cannot be told.

    A list without tensors counts its elements, a single number or text is one example.
    """
    if isinstance(batch, int | float | str):
        return 1
    shape = getattr(batch, "shape", None)
    if shape is not None:
        return int(shape[0]) if len(shape) else 1
    if isinstance(batch, Mapping):
        return rows_of(next(iter(batch.values()))) if batch else 0
    if isinstance(batch, list | tuple):
        first = batch[0] if batch else None
        return rows_of(first) if isinstance(first, Mapping) or hasattr(first, "shape") else len(batch)
    return None
