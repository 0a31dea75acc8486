"""Where a training is in its loops, and how it comes back there: the other half of `Context`.

A checkpoint is taken between two steps. It holds, for each loop under way from the outermost
in, which were begun before it in the same step of the loop around it, and its next step.
A job that goes on runs the user's code from its start again; loops that were over yield
nothing, those on the way to the place begin at their step, and where the innermost one
begins everything is brought back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from fedclient.trainer.aliases import Change, Snapshot, change, share, shared
from fedclient.trainer.checkpoint import Checkpoints, CheckpointUnusable
from fedclient.trainer.kept import Kept, give_random, kept, take_random
from fedclient.trainer.loop import Loop
from fedclient.trainer.memory import is_out_of_memory
from fedclient.trainer.nested import CannotHoldError, Flat, flatten
from fedclient.trainer.saved import Saved

_OTHER_LOOPS = "its loops over ctx.steps and ctx.batches are not those of the checkpoint"


class Job(Protocol):
    """What the course asks of the job's context."""

    @property
    def step(self) -> int:
        """Steps finished so far."""
        ...

    def alive(self) -> None:
        """Say that the job goes on; raises if it shall not."""
        ...

    def take_counts(self) -> Mapping[str, Any]:
        """What has been counted and logged."""
        ...

    def give_counts(self, counts: Mapping[str, Any]) -> None:
        """Take up what `take_counts` gave."""
        ...


class Course:
    """The loops of one job.

    Args:
        job: its context.
        checkpoints: where it is saved and gone on from; None: nowhere.
    """

    def __init__(self, job: Job, checkpoints: Checkpoints | None = None) -> None:
        self._job = job
        self._checkpoints = checkpoints
        self._loops = [Loop([], "job", None)]
        self._lasting: list[Iterable[Any]] = []
        saved = checkpoints.saved if checkpoints else None
        self._ahead: list[list[Any]] = saved.part("places") if saved else []

    @property
    def resuming(self) -> bool:
        """Whether the job has not yet come to the place where its checkpoint was taken."""
        return bool(self._ahead)

    @property
    def depth(self) -> int:
        """How many loops are under way, one in another."""
        return len(self._loops) - 1

    @property
    def around(self) -> list[tuple[int, int | None]]:
        """Of the loops around the one that begins: the pass under way, and the passes in all if that is known."""
        return [(outer.step, outer.size) for outer in self._loops[1:-1]]

    def keep(self, name: str, thing: Any) -> None:
        """Hold a thing in checkpoints from now on, until the pass of the loop under way is over.

        Raises:
            TypeError: its state cannot be held.
        """
        found = kept(name, thing)
        flatten(found.take(), _label(name))
        self._loops[-1].kept[name] = found

    def handed_out(self, generator: Any) -> None:
        """Hold a generator that the job was given."""
        if self._checkpoints:
            self._loops[-1].made.append(kept("generator", generator))

    @contextmanager
    def loop(self, kind: str, size: int | None) -> Iterator[Loop | None]:
        """Begin a loop; None if it was over when the checkpoint was taken.

        Raises:
            CheckpointUnusable: the job has other loops now.
        """
        outer = self._loops[-1]
        loop = Loop(list(outer.begun), kind, size)
        loop.earlier = list(outer.over)
        outer.begun.append([kind, size])
        if self._ahead:
            before, *there, loop.step, loop.epoch, loop.batch = self._ahead[len(self._loops) - 1]
            if [*before, there][: len(outer.begun)] != outer.begun:
                raise CheckpointUnusable(_OTHER_LOOPS)
            if len(loop.before) < len(before):
                outer.over.append(self._change(len(self._loops), len(loop.before)))
                yield None
                return
            loop.resumes = len(self._loops) == len(self._ahead)
        outer.nests = True
        if self._checkpoints:
            loop.snapshot = Snapshot(self._roots())
        self._loops.append(loop)
        try:
            yield loop
        finally:
            if loop in self._loops:
                del self._loops[self._loops.index(loop) :]
            outer.over.append(loop.change())

    def begin_steps(self, loop: Loop) -> None:
        """Bring everything back if this is the place, or what lies where if it is on the way there."""
        if loop.resumes:
            self._restore(loop)
        elif self._ahead:
            loop.nests = True
            self._change(len(self._loops) - 1, -1)

    def begin_epoch(self, loop: Loop, data: Iterable[Any]) -> Iterator[Any]:
        """Go through the data (again), from where the checkpoint was taken if this is the place.

        Raises:
            CheckpointUnusable: there are fewer data now.
        """
        self._check_workers(data)
        if not loop.resumes:
            loop.epoch_random = self._take_random() if self._checkpoints else None
            return iter(data)
        # The same draws give the same order again; what has been used already is passed over.
        assert self._checkpoints is not None
        assert self._checkpoints.saved is not None
        loop.epoch_random = self._checkpoints.saved.part("epoch")
        self._give_random(loop.epoch_random)
        batches: Iterator[Any] = iter(data)
        for _ in range(loop.batch):
            self._job.alive()
            if next(batches, self) is self:
                raise CheckpointUnusable("there are fewer batches than there were")
        loop.made.clear()
        self._restore(loop)
        return batches

    def turn(self, loop: Loop) -> None:
        """Between two steps: write a checkpoint if it is time.

        Raises:
            CheckpointUnusable: the loop that the checkpoint was taken in has not come.
        """
        if self._loops[-1] is not loop:
            self._give_up(loop)
        if self._ahead and loop.step != self._ahead[self._loops.index(loop) - 1][3]:
            raise CheckpointUnusable(_OTHER_LOOPS)
        loop.turn()
        if loop.step:
            # To know it costs time, so only where there will be need of it.
            loop.passed = loop.change() if loop.nests and loop.kind == "steps" else None
        due = self._checkpoints is not None and not self._ahead and self._checkpoints.due()
        # At a loop's end there is no next step.
        if due and self._job.step and loop.step != loop.size and self._is_way_back():
            self._save(loop)

    def _is_way_back(self) -> bool:
        # Inside a pass over a batch there is none to that batch.
        return all(outer.kind != "batches" and outer.passed is not None for outer in self._loops[:-1])

    def _save(self, loop: Loop) -> None:
        assert self._checkpoints is not None
        self._checkpoints.write(lambda: self._parts(loop))

    def _parts(self, loop: Loop) -> dict[str, Flat]:
        parts: dict[str, Any] = {
            "places": [inner.place() for inner in self._loops[1:]],
            "changes": [[*inner.earlier, inner.passed] for inner in self._loops[1:-1]]
            + [[*loop.earlier, loop.change()]],
            "counts": self._job.take_counts(),
            "random": self._take_random(),
        }
        if loop.kind == "batches":
            parts["epoch"] = loop.epoch_random
        flat = {name: flatten(value, name) for name, value in parts.items()}
        return flat | {part: _taken(name, thing) for part, (name, thing) in self._kept().items()}

    def _restore(self, loop: Loop) -> None:
        checkpoints = self._checkpoints
        assert checkpoints is not None
        assert checkpoints.saved is not None
        last = self._change(len(self._loops) - 1, -1)
        with _going_on():
            self._restore_from(checkpoints.saved, checkpoints, last)
        checkpoints.close()
        loop.resumes = False
        self._ahead = []

    def _change(self, depth: int, number: int) -> Change:
        """Change what lies where, as a loop did that is not gone through again, or the passes of one."""
        assert self._checkpoints is not None
        assert self._checkpoints.saved is not None
        with _going_on():
            what: Change = self._checkpoints.saved.part("changes")[depth - 1][number]
            change(self._roots(), what)
        return what

    def _restore_from(self, saved: Saved, checkpoints: Checkpoints, last: Change) -> None:
        things = self._kept()
        if things.keys() != {name for name in saved.names if name.startswith("kept/")}:
            raise CheckpointUnusable("ctx.keep was not called with the names of the checkpoint")
        checkpoints.restore(saved)
        for part, (name, thing) in things.items():
            thing.give(saved.part(part))
            if not saved.is_same(part, flatten(thing.take(), name)):
                raise CheckpointUnusable(f"{_label(name)}: load_state_dict did not bring back what state_dict gave")
        _, pairs = last
        share(self._roots(), pairs)
        if shared(self._roots()) != pairs:
            raise CheckpointUnusable("arrays that were one could not be brought back as one")
        self._give_random(saved.part("random"))
        if not saved.is_same("random", flatten(self._take_random(), "random")):
            raise CheckpointUnusable("the random state could not be brought back")
        self._job.give_counts(saved.part("counts"))

    def _give_up(self, loop: Loop) -> None:
        """Two loops run into each other: there is no one place to come back to."""
        if self._ahead:
            raise CheckpointUnusable(_OTHER_LOOPS)
        if loop in self._loops:
            del self._loops[self._loops.index(loop) + 1 :]
        if self._checkpoints:
            self._checkpoints.give_up("two loops over ctx.steps or ctx.batches run into each other")
            self._checkpoints = None

    def _check_workers(self, data: Iterable[Any]) -> None:
        """Save no more once workers that live on begin an epoch: they hold random states of their own."""
        if self._checkpoints is None or not getattr(data, "persistent_workers", False):
            return
        if any(data is earlier for earlier in self._lasting):
            self._checkpoints.stop("a DataLoader with persistent_workers=True began another epoch")
            self._checkpoints = None
        else:
            self._lasting.append(data)

    def _roots(self) -> dict[str, Any]:
        """What is brought back in place, and what the user's code may hold parts of besides."""
        assert self._checkpoints is not None
        kept = {part: thing.root for part, (_, thing) in self._kept().items() if thing.root is not None}
        return self._checkpoints.model_root() | kept

    def _kept(self) -> dict[str, tuple[str, Kept]]:
        return {
            f"kept/{depth}/{name}": (name, thing)
            for depth, loop in enumerate(self._loops)
            for name, thing in loop.kept.items()
            if not thing.random
        }

    def _generators(self) -> dict[str, Kept]:
        found: dict[str, Kept] = {}
        for depth, loop in enumerate(self._loops):
            found |= {f"{depth}/{number}": made for number, made in enumerate(loop.made)}
            found |= {f"{depth}/{name}": thing for name, thing in loop.kept.items() if thing.random}
        return found

    def _take_random(self) -> dict[str, Any]:
        assert self._checkpoints is not None
        own = {name: generator.take() for name, generator in self._generators().items()}
        return {"global": take_random(self._checkpoints.device), "own": own}

    def _give_random(self, state: Mapping[str, Any]) -> None:
        assert self._checkpoints is not None
        own = self._generators()
        if own.keys() != state["own"].keys():
            raise CheckpointUnusable("it has other generators than the checkpoint")
        give_random(state["global"], self._checkpoints.device)
        for name, generator in own.items():
            generator.give(state["own"][name])


@contextmanager
def _going_on() -> Iterator[None]:
    try:
        yield
    except Exception as e:
        if is_out_of_memory(e):
            raise
        raise CheckpointUnusable(f"it cannot be gone on from: {type(e).__name__}: {e}") from e


def _label(name: str) -> str:
    return f"ctx.keep({name}=...): its state"


def _taken(name: str, thing: Kept) -> Flat:
    try:
        state = thing.take()
    except Exception as e:  # it is the user's code, and may raise anything
        raise CannotHoldError(f"{_label(name)} could not be taken: {type(e).__name__}") from e
    return flatten(state, _label(name))
