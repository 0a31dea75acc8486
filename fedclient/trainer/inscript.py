"""What a training script calls. Run by hand, without a daemon, none of it does anything."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, TypeVar, cast

from fedclient.trainer.api import Context
from fedclient.trainer.play import GLOBAL, Play

Model = TypeVar("Model")
T = TypeVar("T")
_SEEDS = 1 << 32


def load(model: Model, evaluate: Callable[[Model], Mapping[str, float]] | None = None) -> Model:
    """Load the round's weights into a model, before it is trained.

    Args:
        model: a torch module, or a dict of numpy arrays by name.
        evaluate: measures the model: returns metrics, and `num_examples`. A script that gives it is asked to measure
            every version; it then goes no further than this call.

    Returns:
        The very same model.

    Raises:
        ScriptError: it was called before.
    """
    play = _play()
    if play is not None:
        play.load(model, evaluate)
    return model


def save(model: Any, *, num_examples: int, **metrics: Any) -> None:
    """Hand the trained model over: what it has learned since `load` is the site's update.

    Args:
        model: that of `load`, or what wraps it.
        num_examples: the weight of this site's update.
        metrics: of the training, such as `loss=0.5`.

    Raises:
        ScriptError: there was no `load`, it was called before, or it is another model.
    """
    play = _play()
    if play is not None:
        play.save(model, num_examples, metrics)


def setting(
    name: str,
    default: T,
    *,
    minimum: float | None = None,  # noqa: ARG001 - the server and the daemon see to it
    maximum: float | None = None,  # noqa: ARG001 - as above
    choices: Iterable[T] = (),  # noqa: ARG001 - as above
) -> T:
    """What the run sets, or the script's own default.

    Name, default and limits must be written out there: they are read from the script's text.

    Args:
        name: of the setting.
        default: an int, a float, a bool, a text, or a list of one of these; the setting has its type.
        minimum: least value of a number.
        maximum: greatest value of a number.
        choices: all values of a text.
    """
    play = _play()
    value: Any = getattr(None if play is None else play.context.settings, name, default)
    return cast("T", list(value) if isinstance(default, list) else value)


def seed(default: int) -> int:
    """A seed that differs by site and round, below 2**32; by hand the script's own."""
    play = _play()
    return default if play is None else play.context.seed % _SEEDS


def context() -> Context | None:
    """The job's context: `round`, `run`, `client`, `device` and more; None by hand."""
    play = _play()
    return None if play is None else play.context


def log(**metrics: Any) -> None:
    """Keep the last value of each metric, as `Context.log`."""
    play = _play()
    if play is not None:
        play.log(metrics)


def batches(data: Iterable[T]) -> Iterable[T]:
    """The batches of an epoch, each of them a step that is counted and reported; has a length if the data have one."""
    play = _play()
    return data if play is None else _Batches(play, data)


def step(total: int = 0) -> bool:
    """Say that a step is over, where there is no loop for `batches`; whether another may follow.

    Args:
        total: steps in all, if that is known.
    """
    play = _play()
    return play is None or play.step(total)


def watch(trainer: Any) -> None:
    """Count and report the steps of a trainer of transformers, TRL or Lightning, and stop it when it is to stop.

    Raises:
        TypeError: it is none of them.
    """
    play = _play()
    if play is not None:
        from fedclient.trainer.watching import watched  # noqa: PLC0415 - goes with the libraries

        watched(trainer, play)


class _Batches(Iterable[T]):
    def __init__(self, play: Play, data: Iterable[T]) -> None:
        self._play = play
        self._data = data

    def __iter__(self) -> Iterator[T]:
        return self._play.batches(self._data)

    def __len__(self) -> int:
        if not isinstance(self._data, Sized):
            raise TypeError(f"{type(self._data).__name__} has no length")
        return len(self._data)


def _play() -> Play | None:
    found = getattr(sys.modules.get("__main__"), GLOBAL, None)
    return found if isinstance(found, Play) else None
