"""Heart disease in four hospitals: logistic regression on 13 features (the Fed-Heart-Disease benchmark).

site.toml names the data, as `data.py` prepares it:

    [workload.heart]
    trainer = "heart:HeartDisease"

    [workload.heart.data]
    train = "cleveland-train.csv"       # or a list of files, one after the other
    test = "cleveland-test.csv"
    statistics = "statistics.json"      # mean and std of every feature over all hospitals' training rows
    normalise = "shared"                # training rows by `statistics`, or "own": by their own mean and std
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, repeat
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import nn

from fedclient.trainer import Bounds, Context, Workload, find_learning_rate

# Fourteen parameters: a second thread costs ten times the time that it could save.
torch.set_num_threads(1)

FEATURES = 13
"""Columns of a prepared file before the label."""
FOLDS = 4
"""Parts of the training rows: to find a rate, each is held out once."""


class HeartDisease(Workload):
    """Predicts whether a patient has heart disease."""

    @dataclass(frozen=True)
    class Settings:
        """What a run may set."""

        learning_rate: Annotated[float, Bounds(0, 10)] | Literal["auto"] = 1e-2
        batch_size: Annotated[int, Bounds(1, 1024)] = 4
        steps: Annotated[int, Bounds(1, 100_000)] = 100
        optimizer: Literal["sgd", "adam"] = "sgd"

    def build_model(self) -> nn.Module:
        """A linear layer; the sigmoid is part of the loss."""
        return nn.Linear(FEATURES, 1)

    def train(self, model: nn.Module, ctx: Context) -> None:
        """Steps on batches drawn without replacement, over and over."""
        features, labels = self.train_set
        rate = ctx.settings.learning_rate
        adam = adam_of(model, ctx)
        if adam:
            ctx.keep(optimizer=adam)
        order = Shuffled(len(labels), ctx.settings.batch_size, ctx.generator())
        for batch in ctx.batches(order, steps=ctx.settings.steps):
            ctx.log(loss=step(model, adam, rate, features[batch].to(ctx.device), labels[batch].to(ctx.device)))
        ctx.num_examples = len(labels)

    def calibrate(self, model: nn.Module, ctx: Context) -> dict[str, float]:
        """The learning rate, for a run that gives it as "auto": each part of the rows is held out once."""
        features, labels = (t.to(ctx.device) for t in self.train_set)
        parts = torch.randperm(len(labels), generator=ctx.generator()).chunk(FOLDS)

        def descend(rates: Sequence[float], fold: int) -> Iterator[torch.Tensor]:
            rest = torch.cat([part for number, part in enumerate(parts) if number != fold])
            order = Shuffled(len(rest), ctx.settings.batch_size, ctx.generator(fold + 1))
            adam = adam_of(model, ctx)
            for rate, batch in zip(rates, chain.from_iterable(repeat(order)), strict=False):
                yield step(model, adam, rate, features[rest[batch]], labels[rest[batch]])

        def held_out(fold: int) -> float:
            with torch.no_grad():
                return float(loss_of(model, features[parts[fold]], labels[parts[fold]]))

        batch_size = ctx.settings.batch_size
        in_round = ctx.expected_steps(
            ctx.settings.steps, epoch=math.ceil(len(labels) / batch_size), examples=batch_size
        )
        return {
            "learning_rate": find_learning_rate(
                model, ctx, descend=descend, held_out=held_out, schedule=[1.0] * in_round, folds=len(parts)
            )
        }

    def gradient(self, model: nn.Module, ctx: Context) -> None:
        """The gradient of the mean loss over every training row."""
        features, labels = self.train_set
        loss = loss_of(model, features.to(ctx.device), labels.to(ctx.device))
        loss.backward()
        ctx.log(loss=loss)
        ctx.num_examples = len(labels)

    def evaluate(self, model: nn.Module, ctx: Context) -> dict[str, float]:
        """Accuracy and loss on the test rows."""
        features, labels = (t.to(ctx.device) for t in self.test_set)
        right = (model(features).squeeze(1) > 0) == (labels > 0)
        ctx.num_examples = len(labels)
        return {"accuracy": float(right.double().mean()), "loss": float(loss_of(model, features, labels))}

    @cached_property
    def train_set(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised features and labels to train on."""
        rows = self.rows("train")
        if self.site.data.get("normalise", "shared") == "own":
            return tensors(rows, rows[:, :-1].mean(axis=0), rows[:, :-1].std(axis=0, ddof=1))
        return tensors(rows, *self.statistics)

    @cached_property
    def test_set(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised features and labels to test on; always by the shared statistics, so that sites compare."""
        return tensors(self.rows("test"), *self.statistics)

    @cached_property
    def statistics(self) -> tuple[Any, Any]:
        """Mean and standard deviation of every feature, over all hospitals."""
        table = json.loads(self.site.path("statistics").read_text(encoding="utf-8"))
        return np.array(table["mean"]), np.array(table["std"])

    def rows(self, key: str) -> Any:
        """The rows of the file, or files, that a key of the data table names."""
        named = self.site.data.get(key)
        files = [self.site.path(key)] if not isinstance(named, list) else [self.site.directory / n for n in named]
        return np.concatenate([read_rows(path) for path in files])


class Shuffled:
    """The numbers of all rows in batches, in another order each time."""

    def __init__(self, rows: int, batch_size: int, generator: torch.Generator) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.generator = generator

    def __iter__(self) -> Iterator[torch.Tensor]:
        """One epoch."""
        return iter(torch.randperm(self.rows, generator=self.generator).split(self.batch_size))


def read_rows(path: Path) -> Any:
    """A prepared file as an array: 13 features and the label in each row."""
    return np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)


def tensors(rows: Any, mean: Any, std: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, normalised in float64, and labels, as float32 tensors."""
    # One hospital measured no cholesterol: a column that never varies becomes zero.
    features = (rows[:, :-1] - mean) / np.where(std == 0, 1, std)
    return torch.from_numpy(features.astype(np.float32)), torch.from_numpy(rows[:, -1].astype(np.float32))


def adam_of(model: nn.Module, ctx: Context) -> torch.optim.Adam | None:
    """The optimizer, if the run does not want plain gradient descent."""
    # torch.optim imports torch's compiler, which takes longer than all the steps here; only Adam is worth it.
    return torch.optim.Adam(model.parameters()) if ctx.settings.optimizer == "adam" else None


def step(
    model: nn.Module, adam: torch.optim.Adam | None, rate: float, features: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """One step of Adam or of plain gradient descent; returns the loss before it."""
    model.zero_grad()
    loss = loss_of(model, features, labels)
    loss.backward()
    if adam:
        adam.param_groups[0]["lr"] = rate
        adam.step()
        return loss.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.grad, alpha=-rate)
    return loss.detach()


def loss_of(model: nn.Module, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean binary cross-entropy."""
    return nn.functional.binary_cross_entropy_with_logits(model(features).squeeze(1), labels)
