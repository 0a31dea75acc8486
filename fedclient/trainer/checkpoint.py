"""A job's checkpoint on disk: one safetensors file, so that an interrupted training goes on inside its round.

    DIRECTORY/checkpoint.safetensors    the last one, put in place of the one before
    DIRECTORY/checkpoint.part           the next one, being written
    DIRECTORY/checkpoint.unusable       one that could not be gone on from, until the next is written

Its tensors are the leaves of what is held (`fedclient.trainer.nested`), called PART.LEAF by
number; `state`, the JSON that says what they are; and `checks`, a CRC-32 of each. No pickle.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedclient.trainer.nested import CannotHoldError, Flat, Leaf, flatten
from fedclient.trainer.saved import WINDOW, Alive, DamagedError, Saved, Section
from fedclient.trainer.state import ModelMismatchError, State
from fedclient.trainer.team import Team
from fedlink.failpoints import reach
from fedlink.tensors import Role, ShardWriter, TensorSpec

NAME = "checkpoint.safetensors"
"""The file in a job's checkpoint directory."""


class CheckpointUnusable(BaseException):
    """Ends a job that cannot go on from its checkpoint, to be begun anew without; the text says why.

    Not an Exception, so that ordinary handlers let it through.
    """


class Checkpoints:
    """A job's checkpoints: the one to go on from, and when and how the next one is written.

    Args:
        directory: where they lie; made when the first is written.
        owner: what the job is: a checkpoint is good for this very job alone.
        every: seconds between two.
        state: the model's tensors.
        device: the job's.
        alive: called between windows; raises to stop.
        say: tells the site's owner what is worth knowing.
        team: the processes that train together. If each holds the whole model, the first one writes; else they must
            write together, and the first one gets it all.
    """

    def __init__(
        self,
        directory: Path,
        *,
        owner: str,
        every: float,
        state: State,
        device: str,
        alive: Alive = lambda: None,
        say: Callable[[str], None] = lambda _: None,
        team: Team | None = None,
    ) -> None:
        self._team = team or Team()
        self._directory = directory
        self._owner = owner
        self._every = every
        self._state = state
        self._alive = alive
        self._say = say
        self._said = False
        self._last = time.monotonic()
        self.device = device
        """The job's."""
        self.saved: Saved | None = None
        """What the job is to go on from; None once it has, or if there is nothing."""

    def look(self) -> None:
        """Open the checkpoint that is there; one that is damaged, or another job's, is taken out of the way."""
        try:
            whole = self._team.whole
            path, agreed = self._directory / NAME, self._team.first_says
            saved = Saved(path, self.device, self._alive, agreed=agreed, mapped=not whole)
        except FileNotFoundError:
            return
        except DamagedError as e:
            self.put_aside(f"the local checkpoint is damaged ({e})")
            return
        if saved.owner == self._owner:
            self.saved = saved
            return
        saved.close()
        self.drop()
        self._say("training begins at the round's start: the local checkpoint was another job's")

    def due(self) -> bool:
        """Whether it is time to write one."""
        return self._team.first_says(time.monotonic() - self._last >= self._every)

    def write(self, take: Callable[[], Mapping[str, Flat]]) -> None:
        """Write a checkpoint of the parts that `take` gives and of the model.

        A disk that refuses, and a state that cannot be held, are told once and do no harm. Written is window by window:
        nothing of what it holds is copied as a whole. What was put aside makes room for it.

        Args:
            take: gives the parts, or raises CannotHoldError.
        """
        try:
            parts = take()
            model = {f"model/{name}": flatten(value, f"the model's {name}") for name, value in self._model().items()}
            if self._team.rank:
                _hand_over({**parts, **model})
                self._last = time.monotonic()
                return
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._directory / NAME
            path.with_suffix(".unusable").unlink(missing_ok=True)
            # What is left must do for the update: a training that would have passed without checkpoints passes with.
            with _all_taken({**parts, **model}, wanted=not self._team.whole) as all_parts:
                write_parts(path, self._owner, all_parts, spare=2 * _size(model), alive=self._alive)
        except OSError as e:
            self._complain(f"a checkpoint could not be written: {e.strerror}; an interrupted training will lose more")
        except CannotHoldError as e:
            self._complain(f"a checkpoint could not be written: {e}")
        self._last = time.monotonic()

    def model_root(self) -> dict[str, Any]:
        """The container of the model's tensors, by the name "model"; nothing if it has none."""
        container = self._state.container()
        return {} if container is None else {"model": container}

    def restore(self, saved: Saved) -> None:
        """Bring the model back.

        Raises:
            CheckpointUnusable: it is not as it was.
        """
        section = Section(saved, "model/")
        self._state.restore(section)
        parts = self._model()
        if parts.keys() != set(section):
            raise CheckpointUnusable("the model has other tensors than it had")
        for name, value in parts.items():
            self._alive()
            if not saved.is_same(f"model/{name}", flatten(value, name)):
                raise CheckpointUnusable(f"the model's {name} could not be brought back")
        self._last = time.monotonic()

    def close(self) -> None:
        """Close what the job was to go on from."""
        if self.saved:
            self.saved.close()
            self.saved = None

    def give_up(self, why: str) -> None:
        """Go on without: what has been written is of no use."""
        self.drop()
        self._say(f"there are no local checkpoints of this training: {why}")

    def stop(self, why: str) -> None:
        """Write none any more; what has been written is good."""
        self._say(f"no further local checkpoint of this training is written: {why}")

    def drop(self) -> None:
        """Delete the checkpoint that is there."""
        (self._directory / NAME).unlink(missing_ok=True)

    def put_aside(self, why: str) -> None:
        """Let nobody go on from the checkpoint that is there; it can be looked at until the next is written."""
        self.close()
        path = self._directory / NAME
        with contextlib.suppress(OSError):
            path.replace(path.with_suffix(".unusable"))
        self._say(f"training begins at the round's start: {why}; it was put aside in {self._directory}")

    def _model(self) -> Mapping[str, Any]:
        try:
            return self._state.parts()
        except ModelMismatchError as e:
            raise CannotHoldError(str(e)) from None

    def _complain(self, text: str) -> None:
        if not self._said:
            self._said = True
            self._say(text)


def write_parts(
    path: Path, owner: str, parts: Mapping[str, Flat], *, spare: int = 0, alive: Alive = lambda: None
) -> None:
    """Write parts to a file that `fedclient.trainer.saved.Saved` reads: whole, and synced, or not at all.

    Args:
        path: the file; its directory exists.
        owner: what it is good for.
        parts: what goes into it.
        spare: bytes that are to stay free on the disk besides.
        alive: called between windows; raises to stop.

    Raises:
        OSError: the disk refuses, or has not enough room.
    """
    leaves = {f"{i}.{k}": leaf for i, flat in enumerate(parts.values()) for k, leaf in enumerate(flat.leaves)}
    table = {name: [flat.node, [[leaf.dtype, leaf.shape] for leaf in flat.leaves]] for name, flat in parts.items()}
    state = json.dumps({"owner": owner, "parts": table}, allow_nan=False).encode()
    specs = [TensorSpec(name, leaf.dtype, leaf.shape, Role.BUFFER) for name, leaf in leaves.items()]
    specs.append(TensorSpec("state", "U8", (len(state),), Role.BUFFER))
    specs.append(TensorSpec("checks", "U32", (len(specs),), Role.BUFFER))
    if shutil.disk_usage(path.parent).free < sum(spec.nbytes for spec in specs) + spare:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    part = path.with_suffix(".part")
    try:
        with ShardWriter(part, specs) as writer:
            checks = [_write_leaf(writer, name, leaf, alive) for name, leaf in leaves.items()]
            writer.write("state", state)
            writer.write("checks", np.array([*checks, zlib.crc32(state)], "<u4").tobytes())
        _sync(part)
        reach("checkpoint.written")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    reach("checkpoint.renamed")
    _sync(path.parent)


class _Once:
    """A leaf that is gone through once, and can be gone through to its end."""

    def __init__(self, leaf: Leaf) -> None:
        self.dtype, self.shape, self._views = leaf.dtype, leaf.shape, leaf.views()

    def views(self) -> Iterator[memoryview]:
        """See `nested.Leaf`; what is left."""
        return self._views


@contextlib.contextmanager
def _all_taken(parts: Mapping[str, Flat], *, wanted: bool) -> Iterator[Mapping[str, Flat]]:
    """See that everything the other processes hand over is taken, also where the disk refuses it."""
    once = {name: replace(flat, leaves=[_Once(leaf) for leaf in flat.leaves]) for name, flat in parts.items()}
    try:
        yield once if wanted else parts
    finally:
        if wanted:
            _hand_over(once)


def _hand_over(parts: Mapping[str, Flat]) -> None:
    """What writing is to a process that does not write: it gives what it holds."""
    for flat in parts.values():
        for leaf in flat.leaves:
            for _ in leaf.views():
                pass


def _write_leaf(writer: ShardWriter, name: str, leaf: Leaf, alive: Alive) -> int:
    at = check = 0
    for view in leaf.views():
        for first in range(0, len(view), WINDOW):
            alive()
            part = view[first : first + WINDOW]
            writer.write(name, part, at)
            check = zlib.crc32(part, check)
            at += len(part)
    return check


def _size(parts: Mapping[str, Flat]) -> int:
    return sum(TensorSpec("", x.dtype, x.shape).nbytes for flat in parts.values() for x in flat.leaves)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
