"""What a checkpoint holds besides the model: how the state of each kind of thing is taken and given back."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedclient.trainer.aliases import bring_back


@dataclass(frozen=True)
class Kept:
    """One thing of the user's, seen as a state that can be taken and given back in place."""

    take: Callable[[], Any]
    """Its state, for `fedclient.trainer.nested`; may refer to live values."""
    give: Callable[[Any], object]
    """Bring a state back."""
    random: bool = False
    """Whether it is a generator: the data of an epoch may be drawn from it."""
    root: Any = None
    """The thing itself, if it is a container, an array or a tensor: the user's code may hold parts of it besides."""


def kept(name: str, thing: Any) -> Kept:
    """How a thing is kept.

    Raises:
        TypeError: there is no way to, and the message says what there is.
    """
    for look in (_generator, _in_place, _torch):
        if (found := look(thing)) is not None:
            return found
    if callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None)):
        return Kept(thing.state_dict, thing.load_state_dict)
    raise TypeError(
        f"ctx.keep({name}=...): {type(thing).__name__} cannot be kept; give it state_dict and load_state_dict, or keep "
        "a generator, a tensor, a writable array, a dict or a list"
    )


def take_random(device: str) -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators; draws nothing."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(legacy=False)}  # noqa: NPY002 - the global one
    if "torch" in sys.modules:
        from fedclient.trainer.torch_state import take_torch_random  # noqa: PLC0415 - imports torch

        state["torch"] = take_torch_random(device)
    return state


def give_random(state: dict[str, Any], device: str) -> None:
    """Set the global generators to states that `take_random` gave.

    Raises:
        ValueError, KeyError, TypeError, RuntimeError: they are none.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002 - the global one
    if "torch" in state:
        from fedclient.trainer.torch_state import give_torch_random  # noqa: PLC0415 - imports torch

        give_torch_random(state["torch"], device)


def _generator(thing: Any) -> Kept | None:
    if isinstance(thing, np.random.Generator):
        bits = thing.bit_generator
        return Kept(lambda: bits.state, lambda state: setattr(bits, "state", state), random=True)
    if isinstance(thing, np.random.RandomState):
        return Kept(lambda: thing.get_state(legacy=False), thing.set_state, random=True)
    if isinstance(thing, random.Random) and not isinstance(thing, random.SystemRandom):
        return Kept(thing.getstate, thing.setstate, random=True)
    return None


def _in_place(thing: Any) -> Kept | None:
    if type(thing) in (dict, list) or (type(thing) is np.ndarray and thing.flags.writeable):
        return Kept(lambda: thing, lambda state: _give(thing, state), root=thing)
    return None


def _torch(thing: Any) -> Kept | None:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(thing, torch.Tensor | torch.Generator | torch.optim.Optimizer):
        return None
    from fedclient.trainer.torch_state import load_optimizer  # noqa: PLC0415 - imports torch

    if isinstance(thing, torch.Generator):
        return Kept(thing.get_state, thing.set_state, random=True)
    if isinstance(thing, torch.optim.Optimizer):
        return Kept(thing.state_dict, lambda state: load_optimizer(thing, state))
    return Kept(lambda: thing, lambda state: _give(thing, state), root=thing)


def _give(thing: Any, state: Any) -> None:
    if bring_back(thing, state) is not thing:
        raise ValueError("it is of another kind, dtype or shape than it was")
