"""Models out of the canonical layout, as people's tools load them. Runs in the command line, not in the server."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedlink.base import BASE_KEY, base_metadata
from fedlink.companions import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX_NAME
from fedlink.errors import FedlinkError, Reason
from fedlink.manifest import FileEntry, Manifest
from fedlink.tensors import (
    DTYPES,
    METADATA_KEY,
    ShardWriter,
    TensorError,
    TensorSpec,
    read_header,
    roles_metadata,
    shard_name,
    windows,
)
from fedserver.aggregation.files import WINDOW_BYTES, ShardReader, naming_a_full_disk
from fedserver.merging import merge
from fedserver.modelfiles import companions_in

Fetch = Callable[[FileEntry, Path], Awaitable[None]]
"""Brings one file of a manifest, verified by its digest, to a path that does not exist yet."""


async def export(manifest: Manifest, fetch: Fetch, target: Path, *, merge_into: Path | None = None) -> list[Path]:
    """Write a model as its users' tools load it, with the files that were beside it when it was imported.

    A model is written as transformers names it: model.safetensors, or shards and model.safetensors.index.json. An
    adapter is written as peft names it, in one file; or merged into a copy of its base, as a whole model. Roles, tied
    names and the base that an adapter stands on go to the headers' metadata, so that `modelfiles.convert` reads back
    the same model; a tied tensor is stored once, as `safetensors.torch.load_model` and transformers expect.

    Args:
        manifest: the model.
        fetch: brings each file.
        target: the directory; created if it does not exist. Files appear in it when all are complete.
        merge_into: the directory of the base to merge an adapter into; it is only read.

    Returns:
        The files written, weights first.

    Raises:
        FedlinkError: BAD_CONFIG if the directory holds such files already, or the adapter cannot be merged into this
            base; BAD_MANIFEST if a shard is not what the manifest says; NOT_FINITE if a merged tensor is too large for
            its dtype; whatever `fetch` raises.
        OSError: a file cannot be written.
    """
    found = await asyncio.to_thread(companions_in, merge_into) if merge_into else []
    beside = [path for path in found if path.name != ADAPTER_CONFIG]
    adapter = bool(manifest.base) or any(c.name == ADAPTER_CONFIG for c in manifest.companions)
    if merge_into and not adapter:
        raise FedlinkError(Reason.BAD_CONFIG, "this model is whole, not an adapter: there is nothing to merge")
    with naming_a_full_disk(target):
        work = await asyncio.to_thread(_begin, target, {p.name for p in beside} | {c.name for c in manifest.companions})
        try:
            for path in beside:
                await asyncio.to_thread(shutil.copy, path, work)
            for entry in manifest.companions:
                (work / entry.name).unlink(missing_ok=True)
                await fetch(entry, work / entry.name)
            await _write_weights(manifest, fetch, work, merge_into, one_file=adapter)
            return await asyncio.to_thread(_publish, work, target)
        finally:
            await asyncio.to_thread(shutil.rmtree, work)


async def _write_weights(
    manifest: Manifest, fetch: Fetch, work: Path, merge_into: Path | None, *, one_file: bool
) -> None:
    shards = [[t.spec for t in manifest.in_file(i)] for i in range(len(manifest.files))]
    if one_file:
        specs = sorted((s for shard in shards for s in shard), key=lambda s: (-DTYPES[s.dtype].bits, s.name))
        with _writer(manifest, work / ADAPTER_WEIGHTS, specs) as out:
            for index in range(len(shards)):
                await _copy(manifest, index, fetch, work, out)
        if merge_into:
            await asyncio.to_thread(_merge, manifest, work, merge_into)
        return
    for index, specs in enumerate(shards):
        with _writer(manifest, work / shard_name(index, len(shards)), specs) as out:
            await _copy(manifest, index, fetch, work, out)
    await asyncio.to_thread(write_index, work, shards)


def write_index(directory: Path, shards: Sequence[Sequence[TensorSpec]]) -> None:
    """Write the index of shards that are called as `shard_name` says; of a single one there is none."""
    if len(shards) == 1:
        return
    files = {spec.name: shard_name(i, len(shards)) for i, shard in enumerate(shards) for spec in shard}
    total = sum(spec.nbytes for shard in shards for spec in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _begin(target: Path, beside: set[str]) -> Path:
    there = [p.name for p in sorted(target.glob("*.safetensors*"))] or sorted(
        name for name in beside if (target / name).exists()
    )
    if there:
        raise FedlinkError(Reason.BAD_CONFIG, f"{target} holds {there[0]} already; name another directory")
    target.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=".export-", dir=target))


def _writer(manifest: Manifest, path: Path, specs: Sequence[TensorSpec]) -> ShardWriter:
    """A file with these tensors, under a header that also says roles, tied names and the base."""
    names = {s.name for s in specs}
    aliases = {alias: kept for alias, kept in manifest.aliases.items() if kept in names}
    # safetensors' own way to say it is one key for each tied name; some names are taken.
    metadata = {k: v for k, v in aliases.items() if k not in ("format", METADATA_KEY, BASE_KEY)}
    return ShardWriter(path, specs, metadata | roles_metadata(specs, aliases) | base_metadata(manifest.base))


async def _copy(manifest: Manifest, index: int, fetch: Fetch, work: Path, out: ShardWriter) -> None:
    fetched = work / "fetched"
    await fetch(manifest.files[index], fetched)
    await asyncio.to_thread(_copy_tensors, manifest, index, fetched, out)


def _copy_tensors(manifest: Manifest, index: int, fetched: Path, out: ShardWriter) -> None:
    """Copy the tensors of one shard; remove what was fetched."""
    try:
        manifest.check_header(index, read_header(fetched))
    except TensorError as e:
        raise FedlinkError(Reason.BAD_MANIFEST, str(e)) from None
    raw = np.empty(WINDOW_BYTES, np.uint8)
    with ShardReader() as reader:
        for entry in manifest.in_file(index):
            lone = replace(entry, file=0)
            for start, length in windows(entry.spec.nbytes, WINDOW_BYTES):
                reader.read([fetched], lone, start, raw[:length].data)
                out.write(entry.spec.name, raw[:length].data, start)
    fetched.unlink()


def _merge(manifest: Manifest, work: Path, base: Path) -> None:
    """Put the merged model in the place of the adapter."""
    shards = merge(work, base, work, manifest.base)
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        (work / name).unlink(missing_ok=True)
    write_index(work, shards)


def _publish(work: Path, target: Path) -> list[Path]:
    """Move everything to its place."""
    files = sorted(work.iterdir(), key=lambda p: (p.suffix != ".safetensors", p.name))
    return [path.replace(target / path.name) for path in files]
