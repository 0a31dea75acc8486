"""What aggregation works on, and the two replaceable stages of the server's half of the pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fedlink.manifest import FileEntry, Manifest
from fedlink.tensors import Kind

Window = npt.NDArray[np.float64]
"""A run of consecutive elements of one tensor, one-dimensional, in float64."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model (or a float32 master) on local disk."""

    manifest: Manifest
    files: Sequence[Path]
    """Where each of `manifest.files` lies, in the same order."""
    lists: Sequence[Path] = ()
    """Where the chunk list of each lies; what is read is compared with it. Empty: it is believed."""
    title: str = "the model"
    """What messages call it."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """One client's accepted update: it has passed `check_update`."""

    client: str
    num_examples: int
    """Weight of the update; 0 or more."""
    manifest: Manifest
    files: Sequence[Path]
    """Where each of `manifest.files` lies, in the same order."""
    lists: Sequence[Path] = ()
    """As for `ModelFiles`."""

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"the update of client {self.client!r}"

    @property
    def key(self) -> Key:
        """What it adds to a sum: equal keys add the same numbers."""
        return self.client, self.num_examples, tuple(f.blob.digest for f in self.manifest.files)


Key = tuple[str, int, tuple[bytes, ...]]
"""Client, number of examples, and digests of the files of an update."""

Holder = ModelFiles | Contribution
"""What tensors are read from."""


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A shard that was written here: what `BlobStore.adopt` takes, and its name in the manifest."""

    entry: FileEntry
    path: Path
    chunk_digests: bytes


@dataclass(frozen=True, slots=True)
class NewVersion:
    """The next version of a model; its files have been synced, their directory has not."""

    model: Manifest
    master: Manifest | None
    """The float32 values of parameters narrower than 32 bits; None if the model has none."""
    files: tuple[WrittenFile, ...]
    """Every file of `model` and `master` but the frozen shards, which the blob store already has by their digests."""
    folded_early: int = 0
    """So many updates, the first ones, had been added up before and were not read again."""


class Reducer(Protocol):
    """Makes one update out of many, element by element."""

    def reduce(self, updates: Iterable[tuple[int, Window]], out: Window) -> None:
        """Reduce one window.

        Args:
            updates: number of examples and values of each client, in client-name order; at least
                one weight is positive. Values are lent: the next one is read into the same memory.
            out: receives the result; its contents are undefined before.
        """


@runtime_checkable
class SummingReducer(Reducer, Protocol):
    """A reducer that can begin with the first updates and go on with the others later.

    What it has after some of them is one float64 for each element: `reduce` gives bit for bit what zeros, `add` for
    each stretch of the updates in their order, and `finish` give.
    """

    def add(self, updates: Iterable[tuple[int, Window]], sums: Window) -> int:
        """Add one window of further updates.

        Args:
            updates: as for `reduce`, but any number of them, of any weight.
            sums: what it has so far, which is changed; zeros before the first update.

        Returns:
            The examples of these updates.
        """

    def finish(self, sums: Window, examples: int) -> None:
        """Turn one window of sums into the result, in place.

        Args:
            sums: what it has after every update.
            examples: those of all updates.
        """


class ServerOptimizer(Protocol):
    """Moves the model by the reduced update."""

    def step(self, values: Window, direction: Window) -> None:
        """Step one window of parameters, in place.

        Args:
            values: the parameters x of the current version.
            direction: which way to go: the reduced delta, or minus the reduced gradient. May be overwritten.
        """


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The server's half of a strategy."""

    kind: Kind
    """What the updates hold: deltas are added, gradients subtracted."""
    reducer: Reducer
    optimizer: ServerOptimizer
