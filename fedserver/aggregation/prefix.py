"""Sums over the updates that come first in a round, made while others are still out.

They are a cache. A shard's sums say of which updates they are, by digest, so that the pass
that makes the version takes them only where they are the sums it would have had itself. They
may be thrown away at any moment, and are never synced.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlink.errors import FedlinkError
from fedlink.manifest import Manifest, manifest_of_files
from fedlink.recycle import Recycler
from fedlink.tensors import Kind, TensorSpec
from fedserver.aggregation.files import NamingWriter, naming_a_full_disk
from fedserver.aggregation.pipeline import Contribution, Key, ModelFiles, SummingReducer
from fedserver.aggregation.reading import WindowReader


@dataclass(frozen=True, slots=True)
class ShardSums:
    """One float64 for each element that is averaged, of one shard of the model."""

    of: tuple[Key, ...]
    """The updates that are in them, in the order in which they were added."""
    source: ModelFiles
    """A file of the shard's averaged tensors in float64."""


class DamagedSumsError(Exception):
    """Sums have changed on the disk. Whoever goes without them needs nothing from anybody."""


class PrefixSums:
    """The sums of a round's shards, in a directory of their own. For one thread at a time.

    Args:
        directory: is made when the first updates are added; nothing else is in it.
        recycler: gives files to write over, and gets those that are over.
    """

    def __init__(self, directory: Path, recycler: Recycler | None = None) -> None:
        self._directory = directory
        self._recycler = recycler
        self._shards: dict[int, ShardSums] = {}
        self.count = 0
        """So many updates are in every shard's sums."""

    def add(
        self,
        model: Manifest,
        contributions: Sequence[Contribution],
        reducer: SummingReducer,
        *,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> None:
        """Add the updates that follow the first `count`, shard by shard. Blocking.

        A shard's sums are written to a new file, which takes the place of the old one when everything that was read
        has been found to be as it was sent. So whatever ends this, each shard's sums are right; some may be further.
        Memory is a few windows, whatever the size of the model.

        Args:
            model: that the updates belong to.
            contributions: checked updates, in the order of client names.
            reducer: the strategy's.
            unwanted: asked before every window; once it says so, this ends.

        Raises:
            FedlinkError: BLOB_CORRUPT with metadata "client" if an update has changed; DISK_FULL; DRAINING.
            DamagedSumsError: those that are here.
            OSError: a file cannot be read or written.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        with naming_a_full_disk(self._directory), blaming(self._shards):
            for index in averaging(model):
                before = self._shards.get(index)
                further = contributions[len(before.of) - self.count if before else 0 :]
                if further:
                    self._shards[index] = self._added(model, index, further, reducer, unwanted)
                    if before:
                        self._delete(before.source)
        self.count += len(contributions)

    def begun(self, updates: Sequence[Key]) -> Mapping[int, ShardSums]:
        """By the shard's index, the sums that a sum over these updates, in this order, begins with."""
        return {i: s for i, s in self._shards.items() if s.of == tuple(updates[: len(s.of)])}

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(s.source.manifest.total_size for s in self._shards.values())

    def drop(self) -> None:
        """Delete everything. Blocking."""
        for sums in self._shards.values():
            self._delete(sums.source)
        self._shards, self.count = {}, 0
        shutil.rmtree(self._directory, ignore_errors=True)

    def _added(
        self,
        model: Manifest,
        index: int,
        contributions: Sequence[Contribution],
        reducer: SummingReducer,
        unwanted: Callable[[], bool],
    ) -> ShardSums:
        before = self._shards.get(index)
        of = (*(before.of if before else ()), *(c.key for c in contributions))
        path = self._directory / f"{index}-{len(of)}"
        specs = [TensorSpec(t.spec.name, "F64", t.spec.shape) for t in model.in_file(index) if t.spec.averaged]
        try:
            # Overflow shows in the version's values, where it is refused by the tensor's name.
            with (
                WindowReader(unwanted) as reader,
                NamingWriter(path, specs, self._recycler) as out,
                np.errstate(over="ignore", under="ignore", invalid="ignore"),
            ):
                room = np.empty(reader.size)
                for spec in specs:
                    for first, count in reader.windows(spec.elements):
                        sums = room[:count]
                        if before:
                            entry = before.source.manifest.by_name[spec.name]
                            reader.read(before.source, entry, first, sums)
                        else:
                            sums.fill(0.0)
                        reducer.add(reader.lend(contributions, spec.name, first, count), sums)
                        out.write(spec.name, sums.view(np.uint8).data)
            file = out.finish(path.name)
            chunks = path.with_suffix(".chunks")
            chunks.write_bytes(file.chunk_digests)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        manifest = manifest_of_files(Kind.MODEL, [(file.entry, out.header)], {})
        return ShardSums(of, ModelFiles(manifest, [path], [chunks], "the sums of the updates that came first"))

    def _delete(self, source: ModelFiles) -> None:
        for path in (*source.files, *source.lists):
            with contextlib.suppress(OSError):
                if self._recycler:
                    self._recycler.give(path)
                else:
                    path.unlink()


def averaging(model: Manifest) -> list[int]:
    """The shards of a model that hold something that is averaged."""
    return [i for i in range(len(model.files)) if any(t.spec.averaged for t in model.in_file(i))]


@contextlib.contextmanager
def blaming(shards: Mapping[int, ShardSums]) -> Iterator[None]:
    """Tell sums that have changed on the disk from damage to what cannot be made anew.

    Raises:
        DamagedSumsError: instead of BLOB_CORRUPT for one of these.
    """
    before = dict(shards)
    try:
        yield
    except FedlinkError as e:
        digests = {f.blob.digest.hex() for s in before.values() for f in s.source.manifest.files}
        if e.metadata.get("digest") not in digests:
            raise
        raise DamagedSumsError(str(e)) from e
