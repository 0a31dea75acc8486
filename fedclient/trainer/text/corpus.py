"""Tokenized examples in three arrays, made once and held by the workload."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

IGNORED = -100
"""Label of a token that is not to be predicted, as torch's cross entropy takes it."""


@dataclass(frozen=True)
class Example:
    """One example as it goes into the model."""

    ids: Sequence[int]
    """Its tokens."""
    learned: Sequence[bool] | None = None
    """Which of them are to be predicted; None: all."""
    label: int = 0
    """Its class."""
    length: int = 0
    """Tokens before it was cut; 0: it was not."""


@dataclass(frozen=True)
class Corpus:
    """Examples, one after the other."""

    ids: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]
    """Where each example begins in `ids`, and where the last one ends."""
    labels: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    """Tokens of each row as it was read, before anything was cut."""
    hashes: npt.NDArray[np.uint64] = field(repr=False)
    """One for each row; equal rows have equal ones."""
    dropped: int = 0
    """Rows without anything to learn once they were cut."""
    packed: bool = False
    """Whether examples are blocks cut from all rows, and not one row each."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def targets(self) -> npt.NDArray[np.int64]:
        """Tokens to predict in each example: learned ones, but for its first, which nothing comes before."""
        if not len(self):
            return np.empty(0, np.int64)
        counts = np.add.reduceat(self.learned, self.starts[:-1], dtype=np.int64)
        return counts - self.learned[self.starts[:-1]]

    def tokens(self, number: int) -> npt.NDArray[np.int32]:
        """The tokens of an example."""
        return self.ids[self.starts[number] : self.starts[number + 1]]

    def expected(self, number: int) -> npt.NDArray[np.int64]:
        """For each token of an example itself, if it is to be predicted, or IGNORED."""
        window = slice(self.starts[number], self.starts[number + 1])
        return np.where(self.learned[window], self.ids[window].astype(np.int64), IGNORED)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.starts)


def build_corpus(examples: Iterable[tuple[str, Example]], *, keep: Callable[[Example], bool]) -> Corpus:
    """Put examples one after the other.

    Args:
        examples: the text that tells an example from others, and the example.
        keep: whether there is something to learn from it.
    """
    ids, learned = _Growing(np.int32), _Growing(np.bool_)
    starts, labels, lengths, hashes, dropped = [0], list[int](), list[int](), list[int](), 0
    for text, example in examples:
        if not keep(example):
            dropped += 1
            continue
        ids.add(example.ids)
        learned.add(example.learned if example.learned is not None else np.ones(len(example.ids), np.bool_))
        starts.append(starts[-1] + len(example.ids))
        labels.append(example.label)
        lengths.append(example.length or len(example.ids))
        hashes.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))
    return Corpus(
        ids.array(),
        learned.array(),
        np.array(starts, np.int64),
        np.array(labels, np.int32),
        np.array(lengths, np.int32),
        np.array(hashes, np.uint64),
        dropped,
    )


class _Growing:
    """An array that grows by parts, without a Python object for each number."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = dtype
        self._parts: list[npt.NDArray[Any]] = []

    def add(self, values: Any) -> None:
        self._parts.append(np.asarray(values, self._dtype))

    def array(self) -> npt.NDArray[Any]:
        return np.concatenate(self._parts) if self._parts else np.empty(0, self._dtype)


def pack(corpus: Corpus, size: int) -> Corpus:
    """The same tokens, cut anew into blocks of `size`: none is lost, and none is padding but in the last batch.

    A block's examples see each other. A rest of one token, which predicts nothing, is left out.
    """
    total = len(corpus.ids) - (len(corpus.ids) % size == 1)
    starts = np.append(np.arange(0, total, size, dtype=np.int64), total)
    return replace(corpus, starts=starts, labels=np.zeros(len(starts) - 1, np.int32), packed=True)
