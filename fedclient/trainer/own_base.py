"""The site's own frozen base: hashed as it was loaded, compared with the run's, and left alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from fedclient.trainer.state import State
from fedlink.base import BaseTensor, base_difference, base_tensor
from fedlink.tensors import TensorSpec

_THREADS = 4
"""Tensors hashed at a time; hashing lets go of the interpreter's lock."""


class BaseMismatchError(Exception):
    """The site's base is not the run's; the message says how, and holds nothing of the site's data."""


class OwnBase:
    """The frozen base of one built model; empty where the workload has none."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._tensors: tuple[BaseTensor, ...] | None = None
        self._marks: object = None

    def tensors(self, alive: Callable[[], None]) -> tuple[BaseTensor, ...]:
        """Name every tensor by its content; hashed when first asked for, which is to be before anything trains."""
        if self._tensors is None:
            workers = min(_THREADS, os.cpu_count() or 1)
            with ThreadPoolExecutor(workers, "base") as pool:
                try:
                    named = []
                    for tensor in pool.map(_named, self._state.base()):
                        alive()
                        named.append(tensor)
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)
            self._tensors = tuple(named)
        return self._tensors

    def check(self, wanted: Sequence[BaseTensor], alive: Callable[[], None]) -> None:
        """Compare with the base that the run's model names.

        Raises:
            BaseMismatchError: they differ, or only one of the two is there.
        """
        here = any(True for _ in self._state.base())
        if here and not wanted:
            raise BaseMismatchError(
                "the run's model names no frozen base, and this site's workload keeps one (frozen_base): "
                "begin the run with what `fedclient init-model` writes for it (with --weights, from an adapter that "
                "you have)"
            )
        if wanted and not here:
            raise BaseMismatchError(
                f"the run's model stands on a frozen base of {len(wanted)} tensors, and this site's workload has none: "
                "its class is to set frozen_base and to require no gradient of them"
            )
        if difference := base_difference(self.tensors(alive), wanted) if wanted else "":
            raise BaseMismatchError(
                f"this site's base differs from the run's: {difference}; "
                "get the copy, and load it in the dtype, that the run was begun with"
            )

    def settle(self) -> None:
        """The model lies where it stays: from now on nothing is to write to the base."""
        if self._marks is None:
            self._marks = self._state.base_marks()

    def moved_to(self, state: State) -> OwnBase:
        """The same base, where it lies from now on; named by its content already."""
        moved = OwnBase(state)
        moved._tensors = self._tensors
        return moved

    @property
    def touched(self) -> bool:
        """Whether something has written to the base since: the model must be built anew."""
        return self._marks is not None and self._marks != self._state.base_marks()


def _named(item: BaseTensor | tuple[TensorSpec, Iterator[memoryview]]) -> BaseTensor:
    return item if isinstance(item, BaseTensor) else base_tensor(*item)
