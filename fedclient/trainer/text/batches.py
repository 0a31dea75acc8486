"""Batches: which examples, in which order, and padded to what."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedclient.trainer.memory import NUMBERED
from fedclient.trainer.team import Share
from fedclient.trainer.text.corpus import IGNORED, Corpus

Numbers = npt.NDArray[np.int64]
"""Numbers of examples in a corpus."""


@dataclass(frozen=True)
class Batch:
    """Some examples on the job's device."""

    inputs: dict[str, torch.Tensor]
    """What goes into the model."""
    expected: torch.Tensor
    """What is to come out: classes, or for each position the next token or IGNORED."""


@dataclass(frozen=True)
class Steps:
    """An epoch of optimizer steps, each over `accumulation` batches, for `Context.batches`; drawn anew each time.

    No example is left out: what is over at the end makes a smaller step.
    """

    count: int
    """Examples."""
    batch_size: int
    accumulation: int
    rng: np.random.Generator
    """Draws the order; one of `Context.rng`, so that an interrupted epoch goes on."""
    effective: int = 0
    """Examples in a step, cut into as few batches as that takes; 0: `accumulation` full batches."""

    def __len__(self) -> int:
        return math.ceil(self.count / self._size)

    @property
    def _size(self) -> int:
        return self.effective or self.batch_size * self.accumulation

    def __iter__(self) -> Iterator[list[Numbers]]:
        order = self.rng.permutation(self.count)
        return iter(self._steps(order))

    def _steps(self, order: Numbers) -> Iterator[list[Numbers]]:
        for first in range(0, self.count, self._size):
            step = order[first : first + self._size]
            yield [step[at : at + self.batch_size] for at in range(0, len(step), self.batch_size)]


def in_order_of_length(corpus: Corpus, batch_size: int, limit: int = 0) -> list[Numbers]:
    """Batches of examples of like length, which need little padding; the longest first, for it takes most memory.

    Args:
        corpus: the examples.
        batch_size: how many in a batch.
        limit: take so many of them only, from the beginning of the data; 0: all.
    """
    sizes = corpus.sizes[: limit or None]
    order = np.argsort(-sizes, kind="stable").astype(np.int64)
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


@dataclass(frozen=True)
class Padding:
    """How examples of several lengths become one batch.

    Attributes:
        token: what is filled up with.
        device: where batches go.
        separator: the token that ends each of two texts, for models that are told which of them a token is of (BERT's
            `token_type_ids`); None for others.
    """

    token: int
    device: str = "cpu"
    separator: int | None = None

    def inputs(self, corpus: Corpus, numbers: Sequence[int] | Numbers) -> dict[str, torch.Tensor]:
        """What goes into the model."""
        rows = [corpus.tokens(int(n)) for n in numbers]
        ids = np.full((len(rows), max(map(len, rows))), self.token, np.int64)
        mask = np.zeros(ids.shape, np.int64)
        types = np.zeros(ids.shape, np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
            if self.separator is not None:
                types[i, : len(row)] = second_text(row, self.separator)
        found = {"input_ids": self._there(ids), "attention_mask": self._there(mask)}
        return found | ({"token_type_ids": self._there(types)} if self.separator is not None else {})

    def expected(self, corpus: Corpus, numbers: Sequence[int] | Numbers) -> torch.Tensor:
        """For each position of `inputs` the token that is to be predicted at the next one, or IGNORED."""
        rows = [corpus.expected(int(n)) for n in numbers]
        labels = np.full((len(rows), max(map(len, rows))), IGNORED, np.int64)
        for i, row in enumerate(rows):
            labels[i, : len(row) - 1] = row[1:]
        return self._there(labels)

    def labels(self, corpus: Corpus, numbers: Sequence[int] | Numbers) -> torch.Tensor:
        """The examples' classes."""
        return self._there(corpus.labels[np.asarray(numbers)].astype(np.int64))

    def _there(self, values: npt.NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if self.device.startswith(NUMBERED):
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def counting(loss: torch.Tensor, share: Share) -> torch.Tensor:
    """The summed loss of a rank's part of a batch: nothing, if its examples are another rank's."""
    return loss if share.own else loss * 0


def second_text(ids: npt.NDArray[Any], separator: int) -> npt.NDArray[Any]:
    """1 for the tokens of a second text, and the separator after it: those after the first separator."""
    ends = np.cumsum(ids == separator)
    second: npt.NDArray[np.int64] = (ends > (ids == separator)).astype(np.int64)
    return second
