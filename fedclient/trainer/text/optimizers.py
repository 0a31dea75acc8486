"""Optimizers by name, from a closed list, with weight decay where it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch

from fedclient.trainer.api import measured

Name = Literal["adamw", "adam", "sgd", "adafactor", "adagrad", "adamax", "nadam", "radam", "rmsprop"]

_CLASSES: Mapping[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "adamax": torch.optim.Adamax,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
}
_BETAS = {"adamw", "adam", "adamax", "nadam", "radam"}
_MOMENTUM = {"sgd", "rmsprop"}
_DECOUPLED = {"nadam", "radam"}


class Wanted(Protocol):
    """What a run's settings say of the optimizer."""

    @property
    def optimizer(self) -> Name:
        """Which one."""
        ...

    @property
    def learning_rate(self) -> float | str:
        """The rate that it begins with; measured by now."""
        ...

    @property
    def weight_decay(self) -> float:
        """Of what is not spared."""
        ...

    @property
    def momentum(self) -> float:
        """Of those that have one."""
        ...

    @property
    def beta1(self) -> float:
        """Of the Adam family, as `beta2`."""
        ...

    @property
    def beta2(self) -> float:
        """See `beta1`."""
        ...


def make_optimizer(model: torch.nn.Module, wanted: Wanted) -> torch.optim.Optimizer:
    """The optimizer of a model's trainable parameters.

    Raises:
        ValueError: nothing trains.
    """
    name = wanted.optimizer
    options: dict[str, Any] = {"lr": measured(wanted.learning_rate)}
    if name in _BETAS:
        options["betas"] = (wanted.beta1, wanted.beta2)
    if name in _MOMENTUM:
        options["momentum"] = wanted.momentum
    if name in _DECOUPLED:
        options["decoupled_weight_decay"] = True
    return _CLASSES[name](decay_groups(model, wanted.weight_decay), **options)


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """A model's trainable parameters in two groups: biases and norms are not pulled towards zero.

    Raises:
        ValueError: nothing trains.
    """
    spared = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim < 2 or name == "bias" or "norm" in type(module).__name__.lower()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model trains: look at [parameters] of site.toml")
    groups = [
        {"params": [p for p in trained if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step be taken with a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
