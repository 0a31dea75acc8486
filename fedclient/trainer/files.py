"""Between a model and its safetensors files: load a version, write an update, write a first model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedclient.trainer.layout import read_layout
from fedclient.trainer.state import Fill, ModelMismatchError, Start, State
from fedclient.trainer.wire import UPDATE_STEM, Write
from fedlink.base import BaseTensor, base_metadata
from fedlink.tensors import (
    DTYPES,
    Role,
    ShardWriter,
    Stored,
    TensorSpec,
    read_into,
    roles_metadata,
    shard_name,
    update_spec,
)

Alive = Callable[[], None]
"""Called between tensors; raises to stop."""


@dataclass(frozen=True)
class Shard:
    """One file of a model, its tensors with their roles."""

    path: Path
    tensors: tuple[Stored, ...]

    @property
    def names(self) -> list[str]:
        """Names of its tensors."""
        return [t.spec.name for t in self.tensors]

    @property
    def changing(self) -> list[Stored]:
        """Those that are not frozen."""
        return [t for t in self.tensors if t.spec.role is not Role.FROZEN]

    def identity(self) -> tuple[int, ...]:
        """Differs once another file, or other content, lies at the path."""
        s = self.path.stat()
        return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns


@dataclass(frozen=True)
class ModelDirectory:
    """A model directory as the daemon prepares it."""

    shards: tuple[Shard, ...]
    aliases: Mapping[str, str]
    """Tied names: alias to the tensor that is stored."""
    base: tuple[BaseTensor, ...] = ()
    """The frozen base that the model stands on."""

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read `MODEL_FILE`; the files need not be there yet.

        Raises:
            OSError, ValueError, KeyError: there is none, or it is damaged.
        """
        files, aliases, base = read_layout(directory)
        return cls(tuple(Shard(directory / name, tensors) for name, tensors in files), aliases, base)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Every stored tensor by name."""
        return {t.spec.name: t.spec for shard in self.shards for t in shard.tensors}


class Loader:
    """Loads versions into one built model, and leaves out what it holds already."""

    def __init__(self, state: State) -> None:
        self._state = state
        # As built: training may replace tensors, which the next load puts right.
        self._specs, self._aliases = state.specs()
        self._shards: dict[str, tuple[object, object]] = {}
        self._key = ""

    def load(self, model: ModelDirectory, key: str, alive: Alive, shards: Iterable[Shard] | None = None) -> None:
        """Load a version into the model.

        A frozen shard is skipped when it is the file loaded last and nothing has written to its tensors; the others
        only when besides `key` (not empty) is that of the last load and `forget` was not called since.

        Args:
            model: the version.
            key: names its content.
            alive: called between tensors.
            shards: all of its shards, each as soon as it may be read; by default they are all there.

        Raises:
            ModelMismatchError: names, shapes or dtypes are not those of the built model.
        """
        check_match(self._specs, self._aliases, model)
        names_of: dict[str, list[str]] = {name: [name] for name in model.specs}
        for alias, name in model.aliases.items():
            names_of[name].append(alias)
        same = bool(key) and key == self._key
        self._key = ""
        for shard in model.shards if shards is None else shards:
            held = self._shards.get(shard.path.name)
            if held == (shard.identity(), self._state.marks(shard.names)) and (same or not shard.changing):
                continue
            self._load_shard(shard, names_of, alive)
        self._key = key

    def forget(self) -> None:
        """The model has been trained: whatever may have changed is loaded anew next time."""
        self._key = ""

    def _load_shard(self, shard: Shard, names_of: Mapping[str, list[str]], alive: Alive) -> None:
        self._shards.pop(shard.path.name, None)
        identity = shard.identity()
        with shard.path.open("rb") as f, self._state.at_rest():
            for stored in shard.tensors:
                alive()
                self._state.assign(stored.spec, names_of[stored.spec.name], _filler(f.fileno(), stored))
        marks = self._state.marks(shard.names)
        if marks is not None:
            self._shards[shard.path.name] = identity, marks


def check_match(specs: Sequence[TensorSpec], tied: Mapping[str, str], model: ModelDirectory) -> None:
    """Check that files and built model (its tensors, its tied names) hold the same.

    Raises:
        ModelMismatchError: naming the first tensor that differs.
    """
    built = {spec.name: spec for spec in specs}
    built |= {alias: built[name] for alias, name in tied.items()}
    run = dict(model.specs)
    for name in (*run, *model.aliases):
        if name not in built:
            raise ModelMismatchError(f"the run's model has {name!r}; the model that build_model returned has not")
    groups = {tied.get(name, name) for name in run}
    for name, spec in built.items():
        if tied.get(name, name) not in groups:
            raise ModelMismatchError(f"build_model returned a model with {name!r}; the run's model has no such tensor")
        wanted = run.get(name, spec)
        if (wanted.dtype, wanted.shape) != (spec.dtype, spec.shape):
            raise ModelMismatchError(
                f"{name!r} is {wanted.dtype} {list(wanted.shape)} in the run's model and {spec.dtype} "
                f"{list(spec.shape)} in the one that build_model returned"
            )


def write_update(
    state: State,
    model: ModelDirectory,
    out_dir: Path,
    *,
    write: Write,
    update_dtype: str,
    gradient: Mapping[str, Any] | None,
    alive: Alive,
    wrote: Callable[[Path], None],
) -> tuple[Path, ...]:
    """Write what training changed: one file for each of the model's shards that holds something not frozen.

    `wrote` is told each file once it is whole.

    Raises:
        ModelMismatchError: training changed a dtype or shape, or the gradient is of another shape.
    """
    shards = [shard for shard in model.shards if shard.changing]
    paths = []
    for index, shard in enumerate(shards):
        path = out_dir / shard_name(index, len(shards), UPDATE_STEM)
        kept = write is Write.WEIGHTS
        specs = {t.spec.name: t.spec if kept else update_spec(t.spec, update_dtype) for t in shard.changing}
        with ShardWriter(path, _aligned(specs.values())) as writer, shard.path.open("rb") as f, state.at_rest():
            for stored in shard.changing:
                alive()
                at = 0
                dtype, start = specs[stored.spec.name].dtype, _reader(f.fileno(), stored)
                for view in state.encoded(stored.spec, write, dtype, start, gradient):
                    writer.write(stored.spec.name, view, at)
                    at += len(view)
        wrote(path)
        paths.append(path)
    return tuple(paths)


def hand_over_update(
    state: State, model: ModelDirectory, *, write: Write, gradient: Mapping[str, Any] | None, alive: Alive
) -> None:
    """What `write_update` is to a rank that holds a share of the model, and writes nothing: the first one gets it."""
    for shard in model.shards:
        with state.at_rest():
            for stored in shard.changing:
                alive()
                for _ in state.encoded(stored.spec, write, stored.spec.dtype, _no_start, gradient):
                    raise AssertionError("only the first rank is given bytes")


def write_model(state: State, path: Path, base: Sequence[BaseTensor] = ()) -> None:
    """Write a whole built model to one file; its roles, tied names and the base it stands on go to the metadata.

    Raises:
        ModelMismatchError: it holds something that safetensors cannot.
    """
    specs, aliases = state.specs()
    metadata = {**aliases, **roles_metadata(specs, aliases), **base_metadata(base)}
    with ShardWriter(path, _aligned(specs), metadata) as writer, state.at_rest():
        for spec in specs:
            at = 0
            for view in state.encoded(spec, Write.WEIGHTS, spec.dtype, _no_start, None):
                writer.write(spec.name, view, at)
                at += len(view)


def _aligned(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    return sorted(specs, key=lambda s: (-DTYPES[s.dtype].bits, s.name))


def _reader(fd: int, stored: Stored) -> Start:
    raw = np.dtype(DTYPES[stored.spec.dtype].raw)

    buffer = np.empty(0, raw)

    def start(first: int, count: int) -> npt.NDArray[Any]:
        nonlocal buffer
        if len(buffer) < count:
            buffer = np.empty(count, raw)
        out = buffer[:count]
        read_into(fd, out.view(np.uint8).data, stored.offset + first * raw.itemsize)
        return out

    return start


def _filler(fd: int, stored: Stored) -> Fill:
    def fill(view: memoryview, at: int) -> None:
        read_into(fd, view, stored.offset + at)

    return fill


def _no_start(first: int, count: int) -> npt.NDArray[Any]:
    raise AssertionError(f"weights have no start ({first}, {count})")
