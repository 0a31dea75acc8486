"""A checkpoint that is there: checked, and read part by part."""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedclient.trainer.nested import Flat, rebuild
from fedlink.tensors import TensorError, read_array, read_header, read_into

WINDOW = 16 << 20
"""Bytes that are read or written at a time."""

Alive = Callable[[], None]
"""Called between windows; raises to stop."""


class DamagedError(ValueError):
    """A file that is not as it was written; the text says what is wrong with it."""


class Saved:
    """An open checkpoint, all of which has been read once and is as it was written.

    Args:
        path: the file.
        device: where tensors go that were on an accelerator.
        alive: called between windows.
        agreed: what the first of several processes says, which must all say the same.
        mapped: give tensors as they lie in the file, of which each process then reads what it holds.

    Attributes:
        owner: the job that wrote it.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: it is not as it was written, or cannot be read.
    """

    def __init__(
        self,
        path: Path,
        device: str,
        alive: Alive,
        *,
        agreed: Callable[[bool], bool] = bool,
        mapped: bool = False,
    ) -> None:
        self.device = device
        self._agreed = agreed
        self._mapped = mapped
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(path) from None
        except OSError as e:
            raise DamagedError(str(e)) from None
        try:
            self._stored = {t.spec.name: t for t in read_header(path).tensors}
            self._check(alive)
        except (TensorError, OSError, ValueError, KeyError, TypeError) as e:
            self.close()
            raise DamagedError(str(e) or type(e).__name__) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    @property
    def names(self) -> list[str]:
        """Its parts."""
        return list(self._parts)

    def part(self, name: str) -> Any:
        """A part's value, read now.

        Raises:
            KeyError: there is no such part.
            ValueError, TypeError, OSError: it cannot be read any more.
        """
        node, leaves = self._parts[name]
        return rebuild(node, _Leaves(self, self._numbers[name], leaves))

    def is_same(self, name: str, flat: Flat) -> bool:
        """Whether a part holds this very value, bit for bit."""
        node, leaves = self._parts[name]
        if json.dumps(node) != flat.text or leaves != [[leaf.dtype, list(leaf.shape)] for leaf in flat.leaves]:
            return False
        same = True
        for k, leaf in enumerate(flat.leaves):
            check = 0
            for view in leaf.views():
                check = zlib.crc32(view, check)
            same = same and check == self._checks[f"{self._numbers[name]}.{k}"]
        return self._agreed(same)

    def read(self, leaf: str, view: memoryview) -> None:
        """Fill a buffer with a leaf's bytes."""
        read_into(self._fd, view, self._stored[leaf].offset)

    def map(self, leaf: str) -> npt.NDArray[np.uint8] | None:
        """A leaf's bytes as they lie in the file, to be written to by nobody; None if they are to be read."""
        stored = self._stored[leaf]
        if not self._mapped or not stored.spec.nbytes:
            return None
        start = stored.offset - stored.offset % mmap.ALLOCATIONGRANULARITY
        end = stored.offset + stored.spec.nbytes
        data = mmap.mmap(self._fd, end - start, access=mmap.ACCESS_COPY, offset=start)
        return np.frombuffer(data, np.uint8)[stored.offset - start :]

    def _check(self, alive: Alive) -> None:
        state = read_array(self._fd, self._stored["state"]).tobytes()
        checks = read_array(self._fd, self._stored["checks"]).tolist()
        if zlib.crc32(state) != checks[-1]:
            raise DamagedError("its description is damaged")
        table = json.loads(state)
        self.owner: str = table["owner"]
        self._parts: dict[str, Any] = table["parts"]
        self._numbers = {name: i for i, name in enumerate(self._parts)}
        specs = {f"{i}.{k}": spec for i, (_, specs) in enumerate(self._parts.values()) for k, spec in enumerate(specs)}
        self._checks: dict[str, int] = dict(zip(specs, checks[:-1], strict=True))
        for leaf, (dtype, shape) in specs.items():
            found = self._stored[leaf].spec
            if (found.dtype, list(found.shape)) != (dtype, shape) or self._sum(leaf, alive) != self._checks[leaf]:
                raise DamagedError("some of its bytes have changed")

    def _sum(self, leaf: str, alive: Alive) -> int:
        stored, check = self._stored[leaf], 0
        buffer = np.empty(min(WINDOW, stored.spec.nbytes), np.uint8)
        for first in range(0, stored.spec.nbytes, WINDOW):
            alive()
            view = buffer[: stored.spec.nbytes - first].data
            read_into(self._fd, view, stored.offset + first)
            check = zlib.crc32(view, check)
        return check


@dataclass(frozen=True)
class Section(Mapping[str, Any]):
    """The parts whose names begin with a prefix, by the rest of their names; each is read when it is asked for."""

    saved: Saved
    prefix: str

    def __getitem__(self, name: str) -> Any:
        return self.saved.part(self.prefix + name)

    def __iter__(self) -> Iterator[str]:
        return (n.removeprefix(self.prefix) for n in self.saved.names if n.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class _Leaves:
    """The leaves of one part, for `nested.rebuild`."""

    saved: Saved
    part: int
    specs: list[tuple[str, list[int]]]

    @property
    def device(self) -> str:
        return self.saved.device

    def leaf(self, number: int) -> tuple[str, tuple[int, ...]]:
        dtype, shape = self.specs[number]
        return dtype, tuple(shape)

    def mapped(self, number: int) -> npt.NDArray[np.uint8] | None:
        return self.saved.map(f"{self.part}.{number}")

    def fill(self, number: int, view: memoryview) -> None:
        self.saved.read(f"{self.part}.{number}", view)
