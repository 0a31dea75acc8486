"""Learning rate and batch size of the built-in workloads, measured on the site's texts with the run's own steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedclient.trainer.api import AUTO, Context
from fedclient.trainer.largest_batch import find_batch_size
from fedclient.trainer.range_test import TRIAL_STEPS, find_learning_rate
from fedclient.trainer.text import optimizers, schedules
from fedclient.trainer.text.batches import Numbers, Steps, counting, in_order_of_length

if TYPE_CHECKING:
    from fedclient.trainer.text.finetuning import FineTuning, FineTuningSettings

FOLDS = 3
"""How often each rate is tried: one that is too high may be lucky once."""
HELD_OUT = 512
"""Examples of the training data that each trial is judged by, at most; a quarter of fewer than four times as many."""


class Calibration:
    """What a run leaves to measurement.

    Args:
        workload: the site's.
        model: with the run's starting weights.
        ctx: the job.
    """

    def __init__(self, workload: FineTuning, model: Any, ctx: Context) -> None:
        self._workload = workload
        self._model = model
        self._ctx = ctx
        self._corpus = workload.train_corpus
        self._precision = workload.computing(model, ctx)

    def found(self) -> dict[str, float]:
        """A number for each setting that is "auto"."""
        settings: FineTuningSettings = self._ctx.settings
        found: dict[str, float] = {}
        if settings.batch_size == AUTO:
            size = found["batch_size"] = self._batch_size(settings)
            # The rate is of the effective batch, however it is cut; the copy of the weights needs room, too.
            effective = settings.effective_batch(measured=True)
            settings = replace(settings, batch_size=max(1, size // 2), effective_batch_size=effective)
        if settings.learning_rate == AUTO:
            found["learning_rate"] = self._learning_rate(settings)
        return found

    def _batch_size(self, settings: FineTuningSettings) -> int:
        order = in_order_of_length(self._corpus, len(self._corpus))[0]
        most = min(settings.effective_batch(measured=True), len(self._corpus))

        def attempt(size: int) -> None:
            # Where gradients add up, a later forward pass has those of the earlier ones beside it.
            passes = 1 if size == most else 2
            # At a rate of 0 no weight moves.
            optimizer = optimizers.make_optimizer(self._model, replace(settings, learning_rate=0.0))
            try:
                for _ in range(2):
                    self._step(optimizer, [order[:size]] * passes, settings)
            finally:
                self._model.zero_grad(set_to_none=True)

        return find_batch_size(self._ctx, attempt, most=most)

    def _learning_rate(self, settings: FineTuningSettings) -> float:
        order = self._ctx.rng(1).permutation(len(self._corpus)).astype(np.int64)
        count = min(HELD_OUT, len(order) // 4)
        rolled = [np.roll(order, -fold * count) for fold in range(FOLDS)]
        # With a handful of examples there are none to spare.
        parts = [(fold[:count], fold[count:]) if count else (order, order) for fold in rolled]
        size, effective = int(settings.batch_size), settings.effective_batch()

        def descend(rates: Sequence[float], fold: int) -> Iterator[float]:
            optimizer = optimizers.make_optimizer(self._model, replace(settings, learning_rate=0.0))
            rest = parts[fold][1]
            epoch = Steps(len(rest), size, 1, self._ctx.rng(2 + fold), effective)
            steps = (step for _ in iter(int, 1) for step in epoch)
            for rate, batches in zip(rates, steps, strict=False):
                optimizers.set_rate(optimizer, rate)
                loss, weight = self._step(optimizer, [rest[numbers] for numbers in batches], settings)
                yield self._summed(loss) / max(1, weight)

        def held_out(fold: int) -> float:
            return self._measured(parts[fold][0], size)

        epoch = Steps(len(self._corpus), size, 1, self._ctx.rng(), effective)
        in_round = self._ctx.expected_steps(
            settings.steps or settings.epochs * len(epoch), epoch=len(epoch), examples=effective
        )
        trial = min(TRIAL_STEPS, in_round * max(1, self._ctx.rounds))
        shape = schedules.Schedule(settings.schedule, 1.0, trial, settings.warmup, settings.floor)
        shares = [shape.rate(step) for step in range(trial)]
        return find_learning_rate(
            self._model, self._ctx, descend=descend, held_out=held_out, schedule=shares, folds=FOLDS
        )

    def _step(
        self, optimizer: torch.optim.Optimizer, batches: Sequence[Numbers], settings: FineTuningSettings
    ) -> tuple[float, int]:
        """One step as the run does it: the summed loss of this process' part, and what the whole of it weighs."""
        losses, weight = 0.0, 0
        for loss, counted in self._workload.gradients(self._model, batches, self._precision, self._ctx):
            losses, weight = losses + float(loss.detach()), weight + counted
        self._workload.step(optimizer, self._precision, settings.max_grad_norm)
        return losses, weight

    def _summed(self, loss: float) -> float:
        """Over all processes."""
        return float(self._ctx.team.summed(torch.tensor(loss, dtype=torch.float64)))

    def _measured(self, held: Numbers, size: int) -> float:
        """The mean loss over examples."""
        corpus, padding, total = self._corpus, self._workload.padding(self._ctx.device), 0.0
        order = held[np.argsort(-corpus.sizes[held], kind="stable")]
        self._model.eval()
        with torch.no_grad(), self._precision.autocast():
            for first in range(0, len(order), size):
                self._ctx.alive()
                share = self._ctx.team.share(order[first : first + size])
                batch = self._workload.make_batch(corpus, share.part, padding)
                total += float(counting(self._workload.summed_loss(self._model, batch), share))
        self._model.train()
        return self._summed(total) / max(1, int(self._workload.train_weights[held].sum()))
