"""Tensors read window by window as float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Self

import numpy as np

from fedlink.errors import FedlinkError, Reason
from fedlink.manifest import TensorEntry
from fedlink.tensors import DTYPES, windows
from fedserver.aggregation.checked import CheckedReader
from fedserver.aggregation.numbers import Raw, decode
from fedserver.aggregation.pipeline import Contribution, Holder, Window

WINDOW = 1 << 17
"""Elements of a window: the float64 buffers of one worker stay in the processor's cache."""


class WindowReader:
    """Reads models and updates, compares them with their chunk lists, and holds two windows.

    For one thread; a context manager, which raises BLOB_CORRUPT if anything that was read is not as its list says.

    Attributes:
        size: the most elements of a window.
        raw: room for the bytes of one window in any dtype; a read overwrites it.

    Args:
        unwanted: asked before every window; once it says so, the next read raises DRAINING.
    """

    def __init__(self, unwanted: Callable[[], bool]) -> None:
        self.size = WINDOW
        self.raw = np.empty(self.size * 8, np.uint8)
        self._lent = np.empty(self.size)
        self._unwanted = unwanted
        self._reader = CheckedReader()

    def windows(self, elements: int) -> Iterator[tuple[int, int]]:
        """First element and number of elements of each window of a tensor."""
        return windows(elements, self.size)

    def lend(
        self, contributions: Sequence[Contribution], name: str, first: int, count: int
    ) -> Iterator[tuple[int, Window]]:
        """Number of examples and values of each update, one after the other in the same memory."""
        for contribution in contributions:
            self.read(contribution, contribution.manifest.by_name[name], first, self._lent[:count])
            yield contribution.num_examples, self._lent[:count]

    def read(self, holder: Holder, entry: TensorEntry, first: int, out: Window) -> None:
        """Fill `out` from an element on.

        Raises:
            FedlinkError: BLOB_CORRUPT, DRAINING.
            OSError: the file cannot be read.
        """
        size = DTYPES[entry.spec.dtype].bits // 8
        raw = self.raw[: len(out) * size]
        self.read_raw(holder, entry, first * size, raw)
        decode(raw, entry.spec.dtype, out)

    def read_raw(self, holder: Holder, entry: TensorEntry, start: int, raw: Raw) -> None:
        """Fill `raw` from a byte of a tensor on; raises as `read`."""
        if self._unwanted():
            raise FedlinkError(Reason.DRAINING, "the version under way is not wanted any more: the server stops")
        self._reader.read(holder, entry, start, raw.data)

    def __enter__(self) -> Self:
        self._reader.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._reader.__exit__(kind, *rest)
