"""The out-of-core pass: updates in, the files of the next version out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlink.errors import FedlinkError, Reason
from fedlink.failpoints import reach
from fedlink.files import sync
from fedlink.manifest import Manifest, TensorEntry, manifest_of_files
from fedlink.recycle import Recycler
from fedlink.tensors import DTYPES, Header, Kind, Role, TensorSpec, shard_name, windows
from fedserver.aggregation.checked import CheckedReader
from fedserver.aggregation.files import NamingWriter, naming_a_full_disk
from fedserver.aggregation.numbers import Raw, decode, encode, sound
from fedserver.aggregation.pipeline import (
    Contribution,
    Holder,
    ModelFiles,
    NewVersion,
    Pipeline,
    Window,
    WrittenFile,
)

WINDOW = 1 << 17
"""Elements of a window: the float64 buffers of one worker stay in the processor's cache."""


def aggregate(
    model: ModelFiles,
    master: ModelFiles | None,
    contributions: Sequence[Contribution],
    pipeline: Pipeline,
    out_dir: Path,
    *,
    recycler: Recycler | None = None,
    workers: int = 2,
    unwanted: Callable[[], bool] = lambda: False,
) -> NewVersion:
    """Compute and write the next version. Blocking; call it off the event loop.

    Parameters move by `pipeline`; floating buffers become the mean of the clients' values, weighted
    by examples; other buffers come from the client with the most examples (ties: the lower name);
    frozen shards are kept by digest and not read. Everything is computed in float64, in the order
    of client names whatever order `contributions` have, and rounded once: the same inputs give the
    same bits. Memory is a few windows per worker, whatever the size of the model.

    Args:
        model: the current version.
        master: float32 values of the parameters narrower than 32 bits, as the last call returned
            them; None at the first round (the published values are taken) or if there are none.
        contributions: checked updates, one a client.
        pipeline: the strategy.
        out_dir: an empty directory for the new files; the caller removes what is left in it,
            after success and after failure.
        recycler: gives files to write over.
        workers: shards written at the same time, one thread each.
        unwanted: asked before every window; once it says so, the pass ends.

    Raises:
        FedlinkError: NO_EXAMPLES if the weights sum to zero, NOT_FINITE naming the tensor if a
            result is NaN or infinite or too large for its dtype, BLOB_CORRUPT if a file is not what its manifest
            says, with metadata "digest", and "client" if it is part of an update; DISK_FULL; DRAINING if the result
            is not wanted any more.
        OSError: a file cannot be read or written.
    """
    ordered = sorted(contributions, key=lambda c: c.client)
    if sum(c.num_examples for c in ordered) <= 0:
        raise FedlinkError(
            Reason.NO_EXAMPLES,
            f"the {len(ordered)} updates of this round rest on no example at all; nothing to average",
        )
    # The first of several maxima: the lower name.
    donor = max(ordered, key=lambda c: c.num_examples)
    plan = _Plan(model, master, ordered, donor, pipeline, out_dir, recycler, unwanted)
    changing = [i for i in range(len(model.files)) if any(_changes(t) for t in model.manifest.in_file(i))]
    with naming_a_full_disk(out_dir), ThreadPoolExecutor(1, "sync") as syncing:
        with ThreadPoolExecutor(workers, "fold") as pool:
            folded = dict(zip(changing, pool.map(lambda i: _ShardFold(plan, i).run(syncing), changing), strict=True))
        # Whoever stores the files waits for the disk: it has begun while the next shards were computed.
        for shard in folded.values():
            shard.synced.result()
    return _assemble(model.manifest, folded)


def _sync_written(files: Sequence[WrittenFile]) -> None:
    for file in files:
        sync(file.path)


def _changes(entry: TensorEntry) -> bool:
    return entry.spec.role is not Role.FROZEN


def _is_narrow(spec: TensorSpec) -> bool:
    return spec.is_delta and DTYPES[spec.dtype].bits < 32


@dataclass(frozen=True, slots=True)
class _Plan:
    model: ModelFiles
    master: ModelFiles | None
    contributions: Sequence[Contribution]
    donor: Contribution
    """Whose values are taken where nothing can be averaged."""
    pipeline: Pipeline
    out_dir: Path
    recycler: Recycler | None
    unwanted: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class _FoldedShard:
    """One shard of the next version, and the shard of the master that goes with it."""

    file: WrittenFile
    header: Header
    master: tuple[WrittenFile, Header] | None
    synced: Future[None]


class _ShardFold:
    """Computes one shard, tensor by tensor and window by window. Everything it holds is of window size."""

    def __init__(self, plan: _Plan, index: int) -> None:
        self._plan = plan
        self._index = index
        self._entries = plan.model.manifest.in_file(index)
        self._reader = CheckedReader()
        self._raw = np.empty(WINDOW * 8, np.uint8)
        self._values, self._direction, self._lent = (np.empty(WINDOW) for _ in range(3))

    def run(self, syncing: Executor) -> _FoldedShard:
        """Write the shard, and its master if it needs one, and have them synced."""
        count = len(self._plan.model.files)
        narrow = [TensorSpec(t.spec.name, "F32", t.spec.shape) for t in self._entries if _is_narrow(t.spec)]
        master_path = self._plan.out_dir / shard_name(self._index, count, "master")
        with self._reader, ExitStack() as stack:
            path, recycler = self._plan.out_dir / shard_name(self._index, count), self._plan.recycler
            out = stack.enter_context(NamingWriter(path, [t.spec for t in self._entries], recycler))
            master = stack.enter_context(NamingWriter(master_path, narrow, recycler)) if narrow else None
            # Overflow shows in the result, where it is refused by the tensor's name.
            stack.enter_context(np.errstate(over="ignore", under="ignore", invalid="ignore"))
            for entry in self._entries:
                self._fold(entry, out, master)
        reach("fold.shard")
        file = out.finish(self._plan.model.manifest.files[self._index].name)
        mastered = (master.finish(master_path.name), master.header) if master else None
        synced = syncing.submit(_sync_written, [file, mastered[0]] if mastered else [file])
        return _FoldedShard(file, out.header, mastered, synced)

    def _fold(self, entry: TensorEntry, out: NamingWriter, master: NamingWriter | None) -> None:
        spec = entry.spec
        if not spec.averaged:
            holder = self._plan.donor if _changes(entry) else self._plan.model
            self._copy(holder, spec.name, out)
            return
        for first, count in windows(spec.elements, WINDOW):
            reduced = self._direction[:count]
            self._plan.pipeline.reducer.reduce(self._lend(spec.name, first, count), reduced)
            if spec.is_delta:
                reduced = self._step(spec, first, reduced)
                if master is not None and _is_narrow(spec):
                    master.write(spec.name, self._encoded(spec.name, "F32", reduced).data)
                    decode(self._raw[: count * 4], "F32", reduced)
            out.write(spec.name, self._encoded(spec.name, spec.dtype, reduced).data)

    def _step(self, spec: TensorSpec, first: int, direction: Window) -> Window:
        base = self._plan.master if _is_narrow(spec) and self._plan.master else self._plan.model
        values = self._values[: len(direction)]
        self._read(base, base.manifest.by_name[spec.name], first, values)
        if self._plan.pipeline.kind is Kind.GRADIENT:
            np.negative(direction, out=direction)
        self._plan.pipeline.optimizer.step(values, direction)
        return values

    def _lend(self, name: str, first: int, count: int) -> Iterator[tuple[int, Window]]:
        for contribution in self._plan.contributions:
            self._read(contribution, contribution.manifest.by_name[name], first, self._lent[:count])
            yield contribution.num_examples, self._lent[:count]

    def _read(self, holder: Holder, entry: TensorEntry, first: int, out: Window) -> None:
        size = DTYPES[entry.spec.dtype].bits // 8
        raw = self._raw[: len(out) * size]
        self._read_raw(holder, entry, first * size, raw)
        decode(raw, entry.spec.dtype, out)

    def _read_raw(self, holder: Holder, entry: TensorEntry, start: int, raw: Raw) -> None:
        if self._plan.unwanted():
            raise FedlinkError(Reason.DRAINING, "the version under way is not wanted any more: the server stops")
        self._reader.read(holder, entry, start, raw.data)

    def _encoded(self, name: str, dtype: str, values: Window) -> Raw:
        raw = self._raw[: len(values) * DTYPES[dtype].bits // 8]
        encode(values, dtype, raw)
        if not sound(raw, dtype):
            raise FedlinkError(
                Reason.NOT_FINITE,
                f"the new value of tensor {name!r} is NaN, infinite or too large for {dtype}; the version is not made",
                metadata={"tensor": name},
            )
        return raw

    def _copy(self, holder: Holder, name: str, out: NamingWriter) -> None:
        entry = holder.manifest.by_name[name]
        for start, length in windows(entry.spec.nbytes, len(self._raw)):
            raw = self._raw[:length]
            self._read_raw(holder, entry, start, raw)
            out.write(name, raw.data)


def _assemble(model: Manifest, folded: Mapping[int, _FoldedShard]) -> NewVersion:
    files = list(model.files)
    tensors = [t for t in model.tensors if t.file not in folded]
    for index, shard in folded.items():
        files[index] = shard.file.entry
        tensors += [TensorEntry(stored, index) for stored in shard.header.tensors]
    masters = [shard.master for shard in folded.values() if shard.master]
    master = manifest_of_files(Kind.MODEL, [(file.entry, header) for file, header in masters], {})
    return NewVersion(
        Manifest(Kind.MODEL, tuple(files), tuple(tensors), model.aliases, model.base, model.companions),
        master if masters else None,
        (*(shard.file for shard in folded.values()), *(file for file, _ in masters)),
    )
