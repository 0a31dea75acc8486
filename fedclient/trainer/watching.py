"""Callbacks that count the steps of other libraries' trainers; each library is imported only where it is used."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

from fedclient.trainer.api import MAX_METRICS
from fedclient.trainer.play import Play

_LIGHTNING = ("lightning.pytorch", "pytorch_lightning")


def watched(trainer: Any, play: Play) -> None:
    """Give a trainer the callback of its library.

    Raises:
        TypeError: it is of none that is known.
    """
    modules = [kind.__module__ for kind in type(trainer).__mro__]
    if any(module.startswith("transformers.") for module in modules):
        trainer.add_callback(_for_transformers(play))
        return
    for package in _LIGHTNING:
        if any(module.startswith(f"{package}.") for module in modules):
            trainer.callbacks.append(_for_lightning(package, play))
            return
    raise TypeError(
        f"watch knows the trainers of transformers, TRL and Lightning, not {type(trainer).__name__}: "
        "call step() after each step instead"
    )


def _for_transformers(play: Play) -> Any:
    base: Any = importlib.import_module("transformers").TrainerCallback

    class Watch(base):  # type: ignore[misc]
        def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
            if not play.step(state.max_steps):
                control.should_training_stop = True

        def on_log(
            self, _args: Any, _state: Any, _control: Any, logs: Mapping[str, Any] | None = None, **_: Any
        ) -> None:
            play.log(_numbers(logs or {}))

        def on_evaluate(self, *_args: Any, **_: Any) -> None:
            play.alive()

        def on_prediction_step(self, *_args: Any, **_: Any) -> None:
            play.alive()

        def on_train_end(self, *_args: Any, **_: Any) -> None:
            play.rest()

    return Watch()


def _for_lightning(package: str, play: Play) -> Any:
    base: Any = importlib.import_module(package).Callback

    class Watch(base):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_args: Any, **_: Any) -> None:
            play.log(_numbers(trainer.logged_metrics))
            if not play.step(_batches_of(trainer)):
                trainer.should_stop = True

        def on_validation_batch_end(self, *_args: Any, **_: Any) -> None:
            play.alive()

        def on_train_end(self, *_args: Any, **_: Any) -> None:
            play.rest()

    return Watch()


def _batches_of(trainer: Any) -> int:
    """Batches in the whole training, as Lightning knows it; 0: it does not."""
    count = trainer.num_training_batches * (trainer.max_epochs or 0)
    return int(count) if 0 < count < math.inf else 0


def _numbers(table: Mapping[str, Any]) -> dict[str, Any]:
    """What can be logged of a library's metrics."""
    found = {n: v for n, v in table.items() if len(n) <= 64 and (isinstance(v, int | float) or hasattr(v, "detach"))}
    return dict(list(found.items())[: MAX_METRICS // 2])
