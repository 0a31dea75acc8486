"""Merge an adapter into a copy of its base, window by window. numpy alone; runs in the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedlink.base import BaseTensor, base_difference, base_tensor
from fedlink.errors import FedlinkError, Reason
from fedlink.manifest import TensorEntry
from fedlink.tensors import DTYPES, ShardWriter, TensorSpec, canonical_shards, shard_name, windows
from fedserver.aggregation.files import WINDOW_BYTES, ShardReader
from fedserver.aggregation.numbers import Raw, decode, encode, sound
from fedserver.aggregation.pipeline import Window
from fedserver.lora import Adapter, LowRank
from fedserver.modelfiles import Weights, read_weights

Rows = npt.NDArray[np.float64]
_WINDOW = 1 << 17
"""Elements that are computed at a time, or one row if that is longer."""


def merge(adapter_dir: Path, base_dir: Path, out_dir: Path, base: Sequence[BaseTensor]) -> list[list[TensorSpec]]:
    """Write the shards of the merged model. Blocking; memory is a few windows and one layer's factors.

    Everything is computed in float64 and rounded once to the dtype that the base's files have. Tensors are called as
    the model calls them, which may be with a prefix that the base's files leave out; what the run's model does not use
    of those files is left out.

    Args:
        adapter_dir: as peft saves one.
        base_dir: a copy of the base: a directory as transformers saves one.
        out_dir: where the shards are written, called as `shard_name` says.
        base: the tensors of the run's base, which are compared first; none if they are not known.

    Returns:
        The tensors of each shard.

    Raises:
        FedlinkError: BAD_CONFIG: this is not the run's base, or the adapter does not fit it or is merged in another
            way; NOT_FINITE: a sum is too large for its dtype; BAD_MANIFEST: a file is malformed.
        OSError: a file cannot be read or written.
    """
    adapter, weights = Adapter.read(adapter_dir), read_weights(base_dir)
    with ShardReader() as reader:
        held = _identified(weights, base, base_dir, reader) if base else dict(weights.tensors)
        for weight in adapter.factors:
            if weight not in held:
                raise FedlinkError(
                    Reason.BAD_CONFIG,
                    f"the adapter changes {weight!r}, which {base_dir} does not hold, or holds as a tensor tied to "
                    "another: export it without --merge, and merge it with peft",
                )
        merged = _Merged(adapter, weights, held, reader)
        shards = canonical_shards(merged.specs())
        for index, specs in enumerate(shards):
            with ShardWriter(out_dir / shard_name(index, len(shards)), specs) as out:
                for spec in specs:
                    at = 0
                    for window in merged.data(spec):
                        out.write(spec.name, window.data, at)
                        at += len(window)
    return shards


@dataclass(frozen=True, slots=True)
class _Merged:
    adapter: Adapter
    weights: Weights
    held: Mapping[str, TensorEntry]
    """The base's tensors, by the names that the model calls them."""
    reader: ShardReader

    def specs(self) -> list[TensorSpec]:
        """What the merged model holds: what replaces a tensor takes its dtype."""
        found = {name: TensorSpec(name, e.spec.dtype, e.spec.shape, e.spec.role) for name, e in self.held.items()}
        for name, own in self.adapter.whole.items():
            spec = self.adapter.weights.tensors[own].spec
            dtype = found[name].dtype if spec.averaged and name in found else spec.dtype
            found[name] = TensorSpec(name, dtype, spec.shape, spec.role)
        return list(found.values())

    def data(self, spec: TensorSpec) -> Iterator[Raw]:
        """The bytes of a tensor of the merged model, window by window; each is good until the next."""
        own = self.adapter.whole.get(spec.name)
        entry = self.adapter.weights.tensors[own] if own else self.held[spec.name]
        paths = self.adapter.weights.paths if own else self.weights.paths
        if spec.name not in self.adapter.factors:
            yield from _cast(self.reader, paths, entry, spec.dtype)
            return
        if not DTYPES[spec.dtype].floating:
            raise FedlinkError(Reason.BAD_CONFIG, f"tensor {spec.name!r} of the base is {spec.dtype}: it takes no sums")
        change = self.adapter.change_of(spec.name, entry.spec.shape, self.reader)
        for values in _scaled(change, lambda: self._summed(entry, paths, change)):
            raw = _encoded(values.reshape(-1), spec.dtype)
            if not sound(raw, spec.dtype):
                raise FedlinkError(
                    Reason.NOT_FINITE,
                    f"the merged tensor {spec.name!r} holds NaN, or what is too large for {spec.dtype}",
                    metadata={"tensor": spec.name},
                )
            yield raw

    def _summed(self, entry: TensorEntry, paths: Sequence[Path], change: LowRank) -> Iterator[Rows]:
        """A weight with what is added to it, some rows at a time."""
        rows, columns = change.shape
        for first, count in windows(rows, max(1, _WINDOW // max(1, columns))):
            values = _read(self.reader, paths, entry, first * columns, count * columns).reshape(count, columns)
            values += change.left[first : first + count] @ change.right
            yield values


def _scaled(change: LowRank, summed: Callable[[], Iterator[Rows]]) -> Iterator[Rows]:
    """The rows of a weight, each output's weights scaled to the length that DoRA has learned for it, if it has one.

    Where an output's weights are a column, all rows are gone through twice: lengths are known at the end.
    """
    if change.lengths is None:
        yield from summed()
        return
    with np.errstate(divide="ignore", invalid="ignore"):  # of no length at all: not finite, and refused as such
        if change.outputs:
            factors = change.lengths / np.sqrt(sum((np.square(rows).sum(axis=0) for rows in summed()), start=0.0))
            for rows in summed():
                yield rows * factors
            return
        first = 0
        for rows in summed():
            lengths = change.lengths[first : first + len(rows)]
            yield rows * (lengths / np.linalg.norm(rows, axis=1))[:, None]
            first += len(rows)


def _identified(
    weights: Weights, base: Sequence[BaseTensor], directory: Path, reader: ShardReader
) -> dict[str, TensorEntry]:
    """The tensors of the run's base in some files, by the names that the run calls them.

    Raises:
        FedlinkError: BAD_CONFIG: it is another base.
    """
    shorter = {name.partition(".")[2]: name for name in weights.tensors}
    held, own = {}, []
    for wanted in base:
        # A model with a head calls its body's tensors "bert.x"; the body saved by itself calls them "x".
        names = (wanted.name, wanted.name.partition(".")[2], shorter.get(wanted.name, ""))
        name = next((n for n in names if n in weights.tensors), None)
        if name is None:
            continue
        entry = held[wanted.name] = weights.tensors[name]
        spec = entry.spec
        # The sites may have loaded it in a wider dtype.
        dtype = wanted.dtype if DTYPES[spec.dtype].floating and DTYPES[wanted.dtype].floating else spec.dtype
        data = (window.data for window in _cast(reader, weights.paths, entry, dtype))
        own.append(base_tensor(TensorSpec(wanted.name, dtype, spec.shape, wanted.spec.role), data))
    if difference := base_difference(own, base):
        raise FedlinkError(
            Reason.BAD_CONFIG,
            f"{directory} is not the base of this run: {difference}; name the copy that the sites have",
        )
    return held


def _cast(reader: ShardReader, paths: Sequence[Path], entry: TensorEntry, dtype: str) -> Iterator[Raw]:
    """A tensor's bytes in another floating dtype; values are rounded once."""
    spec = entry.spec
    if dtype == spec.dtype:
        yield from _bytes(reader, paths, entry)
        return
    for first, count in windows(spec.elements, _WINDOW):
        yield _encoded(_read(reader, paths, entry, first, count), dtype)


def _read(reader: ShardReader, paths: Sequence[Path], entry: TensorEntry, first: int, count: int) -> Window:
    size = DTYPES[entry.spec.dtype].bits // 8
    raw, values = np.empty(count * size, np.uint8), np.empty(count)
    reader.read(paths, entry, first * size, raw.data)
    decode(raw, entry.spec.dtype, values)
    return values


def _encoded(values: Window, dtype: str) -> Raw:
    raw = np.empty(len(values) * DTYPES[dtype].bits // 8, np.uint8)
    encode(values, dtype, raw)
    return raw


def _bytes(reader: ShardReader, paths: Sequence[Path], entry: TensorEntry) -> Iterator[Raw]:
    raw = np.empty(WINDOW_BYTES, np.uint8)
    for start, length in windows(entry.spec.nbytes, WINDOW_BYTES):
        reader.read(paths, entry, start, raw[:length].data)
        yield raw[:length]
