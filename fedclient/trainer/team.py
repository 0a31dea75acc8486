"""The processes that train one model together: here the one that does it alone, and how a batch is shared out.

What several processes do is in `fedclient.trainer.ranks`, which imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fedclient.trainer.own_base import OwnBase
from fedclient.trainer.state import State, state_of

SOCKET = "FEDCLIENT_RANKS_SOCKET"
"""Names, in a rank's environment, the socket of its launcher."""
STRATEGY = "FEDCLIENT_RANKS_STRATEGY"
"""In a rank's environment: "ddp" or "fsdp"."""

_Method = TypeVar("_Method", bound=Callable[..., Any])


class CannotShareError(TypeError):
    """A batch is none that can be shared out; the text says what to do."""


@dataclass(frozen=True)
class Share:
    """A rank's part of a batch."""

    part: Any
    """The part; never empty, so that every rank takes every step: where there is too little it is one of another's."""
    own: int
    """Examples in it that count; 0 if they are another rank's."""
    of: int
    """Examples in the batch."""

    @property
    def weight(self) -> float:
        """How much of the batch it is."""
        return self.own / self.of if self.of else 0.0


class Team:
    """The processes of a training; this one works alone.

    Attributes:
        rank: this process' number, from 0; the first one speaks for all.
        world_size: how many there are.
        weight: how much this rank's gradients count in the mean over all of them.
        whole: whether each holds the whole model.
        beside: how many of them this machine has.
    """

    rank = 0
    world_size = 1
    weight = 1.0
    whole = True
    beside = 1

    def told(self, table: Any = None) -> Any:
        """What the first rank says, as JSON, at every rank."""
        return table

    def agree(self, step: int, seconds: float, saw: int | None = None) -> int | None:  # noqa: ARG002 - for several ranks
        """Let every rank know what the first one has been told: called between two steps.

        Args:
            step: steps that are over.
            seconds: since this rank's training began.
            saw: examples of this rank's part that have not been told yet; None: none were counted.

        Returns:
            The sum of `saw` over the ranks; None if no rank counted any.
        """
        return saw

    def clock(self, seconds: float) -> float:
        """The first rank's `seconds` when they last agreed, for what all decide alike; one alone has its own."""
        return seconds

    def first(self, mine: float) -> float:
        """The first rank's number, but none that is finite if another rank's is not."""
        return mine

    def share(self, batch: Any) -> Share:
        """This rank's part of a batch."""
        return Share(batch, len(batch), len(batch))

    def go_alone(self) -> None:
        """The rest of the job is this rank's alone."""

    def all_true(self, mine: bool) -> bool:
        """Whether it is so at every rank."""
        return mine

    def first_says(self, mine: bool) -> bool:
        """What the first rank says, where they must do something together; else what this one says."""
        return mine

    def summed(self, value: Any) -> Any:
        """A tensor's sum over the ranks."""
        return value

    def joined(self, value: Any) -> Any:
        """The ranks' tensors one after the other, along their first dimension."""
        return value

    def same_random(self, device: str) -> None:
        """Give every rank the first one's random state."""

    def training(self, model: Any, ctx: Any) -> AbstractContextManager[object]:  # noqa: ARG002 - for several ranks
        """Holds while the model is trained: gradients are those of the whole batch."""
        return nullcontext()

    def building(self, *, frozen_base: bool) -> AbstractContextManager[object]:  # noqa: ARG002 - for shares of a model
        """Around the building of a model."""
        return nullcontext()

    def laid_out(
        self,
        model: object,
        names: Mapping[str, str],
        *,
        frozen_base: bool,
        device: str,  # noqa: ARG002 - for shares of a model
        say: Callable[[str], None],  # noqa: ARG002 - for shares of a model
    ) -> tuple[State, OwnBase]:
        """A model's tensors and its base, each rank holding of them what it is to hold.

        Args:
            model: as the class built it.
            names: other names under which its tensors travel.
            frozen_base: whether the class has one.
            device: where it goes.
            say: tells the site's owner what is worth knowing.

        Raises:
            ModelMismatchError: see `state_of`.
        """
        state = state_of(model, names, frozen_base=frozen_base)
        return state, OwnBase(state)

    def place(self, device: str) -> str:
        """Where this rank's model lies, of a kind of device."""
        return device

    def lost(self, error: BaseException) -> bool:  # noqa: ARG002 - for several ranks
        """Whether an exception says that another rank is gone."""
        return False


def shares_work(method: _Method) -> _Method:
    """Mark a method of a workload that shares its work among the ranks; others but `train` are done by the first."""
    method.__dict__["shares_work"] = True
    return method


def does_share(method: object) -> bool:
    """Whether a method is marked by `shares_work`."""
    return bool(getattr(method, "shares_work", False))


def share_of(batch: Any, rank: int, world_size: int) -> Share:
    """A rank's part of a batch, in the batch's order: parts differ by one example at most.

    Args:
        batch: a tensor or array, a list of anything that is none, or tuples, lists, dicts and dataclasses of these.
        rank: whose.
        world_size: among how many.

    Raises:
        CannotShareError: it is something else, or its tensors differ in length.
    """
    lengths = set(_lengths(batch))
    if len(lengths) != 1:
        found = "no tensors" if not lengths else f"tensors of {' and '.join(map(str, sorted(lengths)))} examples"
        raise CannotShareError(f"ctx.batches gave a {type(batch).__name__} with {found}, {_WHAT}")
    count = lengths.pop()
    first, last = (count * r // world_size for r in (rank, rank + 1))
    own = last - first
    if not own:
        first, last = max(0, count - 1), count
    return Share(_cut(batch, first, last), own, count)


_WHAT = (
    "which cannot be shared among several processes: give it tensors, arrays or lists whose first dimension is the "
    "examples, or tuples and dicts of them, or say split=False and take this process' part by ctx.rank"
)


def _lengths(thing: Any) -> Iterator[int]:
    if _is_array(thing):
        if not thing.ndim:
            raise CannotShareError(
                f"ctx.batches gave a batch with a {type(thing).__name__} without dimensions, {_WHAT}"
            )
        yield int(thing.shape[0])
    elif isinstance(thing, Mapping):
        for item in thing.values():
            yield from _lengths(item)
    elif _is_record(thing):
        for name in thing.__dataclass_fields__:
            yield from _lengths(getattr(thing, name))
    elif isinstance(thing, range) or _is_list(thing):
        yield len(thing)
    elif isinstance(thing, tuple | list):
        for item in thing:
            yield from _lengths(item)
    else:
        raise CannotShareError(f"ctx.batches gave a batch with a {type(thing).__name__}, {_WHAT}")


def _cut(thing: Any, first: int, last: int) -> Any:
    if _is_array(thing) or isinstance(thing, range) or _is_list(thing):
        return thing[first:last]
    if isinstance(thing, Mapping):
        items = {key: _cut(item, first, last) for key, item in thing.items()}
        return items if type(thing) is dict else type(thing)(items)  # type: ignore[call-arg]
    if _is_record(thing):
        return type(thing)(**{name: _cut(getattr(thing, name), first, last) for name in thing.__dataclass_fields__})
    parts = [_cut(item, first, last) for item in thing]
    return type(thing)(*parts) if hasattr(thing, "_fields") else type(thing)(parts)


def _is_array(thing: Any) -> bool:
    return isinstance(thing, np.ndarray) or (hasattr(thing, "ndim") and hasattr(thing, "requires_grad"))


def _is_record(thing: Any) -> bool:
    return hasattr(thing, "__dataclass_fields__") and not isinstance(thing, type)


def _is_list(thing: Any) -> bool:
    """Whether it is a list of examples, not of their parts."""
    return type(thing) in (list, tuple) and bool(thing) and all(isinstance(item, int | float | str) for item in thing)


def to_line(table: Mapping[str, Any]) -> bytes:
    """A message between a rank and its launcher."""
    return json.dumps(table, allow_nan=False).encode() + b"\n"


def python_command(module: str, arguments: Sequence[str] = ()) -> list[str]:
    """What follows the interpreter to run a module of ours, with nothing of the working directory on its path."""
    return ["-P", "-X", "faulthandler", "-m", module, *arguments]
