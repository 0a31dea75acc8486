"""Models as people have them on disk, to and from the canonical layout. Runs in the command line, not in the server."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from fedlink.errors import FedlinkError, Reason
from fedlink.manifest import FileEntry, Manifest, TensorEntry, manifest_of_files
from fedlink.tensors import (
    FILE_NAME,
    METADATA_KEY,
    Header,
    Kind,
    Role,
    ShardWriter,
    TensorError,
    TensorSpec,
    apply_metadata,
    canonical_shards,
    check_spec,
    read_header,
    roles_metadata,
    shard_name,
    windows,
)
from fedserver.aggregation.files import WINDOW_BYTES, NamingWriter, ShardReader, naming_a_full_disk
from fedserver.aggregation.numbers import Raw, sound
from fedserver.aggregation.pipeline import WrittenFile

Fetch = Callable[[FileEntry, Path], Awaitable[None]]
"""Brings one file of a manifest, verified by its digest, to a path that does not exist yet."""

INDEX_NAME = "model.safetensors.index.json"
"""What Hugging Face calls the index of a sharded model."""

_MAX_INDEX_BYTES = 32 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class ConvertedModel:
    """A model in the canonical layout, ready to be sent."""

    manifest: Manifest
    files: tuple[WrittenFile, ...]
    """In the order of `manifest.files`."""


def convert(source: Path, out_dir: Path, *, buffers: Sequence[str] = (), frozen: Sequence[str] = ()) -> ConvertedModel:
    """Re-shard a model from safetensors files to the canonical layout. Blocking; streams in windows.

    Roles and tied names come from the files' metadata (as `export` and `fedclient init-model` write it);
    patterns override them.

    Args:
        source: a .safetensors file, or a directory with one, or with shards and their index.
        out_dir: an empty directory for the shards.
        buffers: shell patterns (`*.running_mean`) of tensors that are buffers.
        frozen: shell patterns of tensors that never change; stronger than `buffers`.

    Raises:
        FedlinkError: BAD_CONFIG if the source is no such file or directory (a pickle is never opened) or a
            pattern matches nothing; BAD_MANIFEST if a file is malformed; NOT_FINITE if a tensor that is not frozen
            holds NaN or Inf.
        OSError: a file cannot be read or written.
    """
    paths, weight_map = _find(source)
    try:
        tensors, aliases = _read_headers(paths, weight_map)
        roles = _roles([t.spec for t in tensors.values()], buffers, frozen)
        specs = [replace(t.spec, role=roles[name]) for name, t in tensors.items()]
        for spec in specs:
            check_spec(spec)
        with naming_a_full_disk(out_dir):
            shards = _write_shards(paths, tensors, canonical_shards(specs), out_dir)
    except TensorError as e:
        tensor = {"tensor": e.tensor} if e.tensor else None
        raise FedlinkError(Reason.BAD_MANIFEST, f"{source}: {e}", metadata=tensor) from None
    manifest = manifest_of_files(Kind.MODEL, [(file.entry, header) for file, header in shards], roles, aliases)
    return ConvertedModel(manifest, tuple(file for file, _ in shards))


def _find(source: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The safetensors files that `source` stands for, and which of them the index says holds each tensor."""
    if source.is_file():
        if source.suffix in _PICKLES:
            raise _pickle(source, source.name)
        return [source], {}
    if not source.is_dir():
        raise FedlinkError(Reason.BAD_CONFIG, f"{source} does not exist")
    if (source / INDEX_NAME).is_file():
        return _indexed(source / INDEX_NAME)
    found = sorted(source.glob("*.safetensors"))
    if source / "model.safetensors" in found:
        found = [source / "model.safetensors"]
    if len(found) == 1:
        return found, {}
    if found:
        raise FedlinkError(
            Reason.BAD_CONFIG,
            f"{source} holds {len(found)} safetensors files and no {INDEX_NAME}; name the one to take",
        )
    pickles = sorted(p.name for p in source.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise _pickle(source, pickles[0])
    raise FedlinkError(Reason.BAD_CONFIG, f"{source} holds no safetensors file")


def _pickle(source: Path, name: str) -> FedlinkError:
    return FedlinkError(
        Reason.BAD_CONFIG,
        f"{source}: {name} is a pickle, which can run code when it is opened and so is never read; "
        "save the model as safetensors (safetensors.torch.save_model)",
    )


def _indexed(index: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The shards that an index names, and where it says each tensor is."""
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise FedlinkError(Reason.BAD_MANIFEST, f"{index} is larger than {_MAX_INDEX_BYTES} bytes")
    try:
        weight_map = {str(k): str(v) for k, v in json.loads(index.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise FedlinkError(Reason.BAD_MANIFEST, f"{index} is no index of safetensors shards: {e!r}") from None
    names = sorted(set(weight_map.values()))
    for name in names:
        if not FILE_NAME.fullmatch(name) or not (index.parent / name).is_file():
            raise FedlinkError(Reason.BAD_MANIFEST, f"{index} names the file {name[:128]!r}, which is not beside it")
    return [index.parent / name for name in names], weight_map


def _read_headers(
    paths: Sequence[Path], weight_map: Mapping[str, str]
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Every tensor by name and where it lies, and the tied names."""
    tensors: dict[str, TensorEntry] = {}
    aliases: dict[str, str] = {}
    for index, path in enumerate(paths):
        stored, tied = apply_metadata(read_header(path))
        for item in stored:
            if item.spec.name in tensors:
                raise TensorError(f"tensor {item.spec.name!r} is in two files", item.spec.name)
            tensors[item.spec.name] = TensorEntry(item, index)
        aliases |= tied
    for name, file in weight_map.items():
        if name not in tensors or paths[tensors[name].file].name != file:
            raise TensorError(f"the index says that tensor {name!r} is in {file}, where it is not", name)
    if not tensors:
        raise TensorError("there is no tensor in it")
    return tensors, aliases


def _roles(specs: Iterable[TensorSpec], buffers: Sequence[str], frozen: Sequence[str]) -> dict[str, Role]:
    """The role of each tensor: what its file says, then `buffers`, then `frozen`."""
    roles = {spec.name: spec.role for spec in specs}
    for role, patterns in ((Role.BUFFER, buffers), (Role.FROZEN, frozen)):
        for pattern in patterns:
            matches = [name for name in roles if fnmatchcase(name, pattern)]
            if not matches:
                raise FedlinkError(
                    Reason.BAD_CONFIG, f"the pattern {pattern!r} matches no tensor; they are called {_some(roles)}"
                )
            roles |= dict.fromkeys(matches, role)
    return roles


def _some(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:5]) + (f" and {len(first) - 5} more" if len(first) > 5 else "")


def _write_shards(
    paths: Sequence[Path], tensors: Mapping[str, TensorEntry], shards: Sequence[Sequence[TensorSpec]], out_dir: Path
) -> list[tuple[WrittenFile, Header]]:
    written = []
    raw = np.empty(WINDOW_BYTES, np.uint8)
    with ShardReader() as reader:
        for index, specs in enumerate(shards):
            name = shard_name(index, len(shards))
            with NamingWriter(out_dir / name, specs) as out:
                for spec in specs:
                    for start, length in windows(spec.nbytes, WINDOW_BYTES):
                        window = raw[:length]
                        reader.read(paths, tensors[spec.name], start, window.data)
                        _check_sound(spec, window)
                        out.write(spec.name, window.data)
            written.append((out.finish(name), out.header))
    return written


def _check_sound(spec: TensorSpec, window: Raw) -> None:
    # Every client's update would be refused for it later, and they would be blamed.
    if spec.role is not Role.FROZEN and not sound(window, spec.dtype):
        what = "a byte other than 0 and 1" if spec.dtype == "BOOL" else "NaN or Inf"
        raise FedlinkError(
            Reason.NOT_FINITE,
            f"tensor {spec.name!r} holds {what} and so cannot take part in training; make it frozen or repair it",
            metadata={"tensor": spec.name},
        )


async def export(manifest: Manifest, fetch: Fetch, target: Path) -> list[Path]:
    """Write a model as Hugging Face names it: model.safetensors, or shards and model.safetensors.index.json.

    Roles and tied names go to the headers' metadata, so that `convert` reads back the same model; a tied
    tensor is stored once, as `safetensors.torch.load_model` and transformers expect.

    Args:
        manifest: the model.
        fetch: brings each shard.
        target: the directory; created if it does not exist. Files appear in it when all are complete.

    Returns:
        The files written, the index last.

    Raises:
        FedlinkError: BAD_CONFIG if the directory holds a model already; BAD_MANIFEST if a shard is not what the
            manifest says; whatever `fetch` raises.
        OSError: a file cannot be written.
    """
    with naming_a_full_disk(target):
        work = await asyncio.to_thread(_begin, target)
        try:
            for index, entry in enumerate(manifest.files):
                fetched = work / "fetched"
                await fetch(entry, fetched)
                await asyncio.to_thread(_rewrite, manifest, index, fetched, work)
            return await asyncio.to_thread(_publish, manifest, work, target)
        finally:
            await asyncio.to_thread(shutil.rmtree, work)


def _begin(target: Path) -> Path:
    if any(target.glob("*.safetensors*")):
        raise FedlinkError(Reason.BAD_CONFIG, f"{target} holds a model already; name another directory")
    target.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=".export-", dir=target))


def _rewrite(manifest: Manifest, index: int, fetched: Path, work: Path) -> None:
    """Copy one shard under a header that also says roles and tied names; remove what was fetched."""
    try:
        manifest.check_header(index, read_header(fetched))
    except TensorError as e:
        raise FedlinkError(Reason.BAD_MANIFEST, str(e)) from None
    entries = manifest.in_file(index)
    names = {t.spec.name for t in entries}
    aliases = {alias: kept for alias, kept in manifest.aliases.items() if kept in names}
    # safetensors' own way to say it is one key for each tied name; two names are taken.
    metadata = {k: v for k, v in aliases.items() if k not in ("format", METADATA_KEY)}
    metadata |= roles_metadata((t.spec for t in entries), aliases)
    raw = np.empty(WINDOW_BYTES, np.uint8)
    path = work / shard_name(index, len(manifest.files))
    with ShardReader() as reader, ShardWriter(path, [t.spec for t in entries], metadata) as out:
        for entry in entries:
            lone = replace(entry, file=0)
            for start, length in windows(entry.spec.nbytes, WINDOW_BYTES):
                reader.read([fetched], lone, start, raw[:length].data)
                out.write(entry.spec.name, raw[:length].data, start)
    fetched.unlink()


def _publish(manifest: Manifest, work: Path, target: Path) -> list[Path]:
    """Write the index where one is needed, then move everything to its place."""
    count = len(manifest.files)
    names = [shard_name(i, count) for i in range(count)]
    if count > 1:
        index = {
            "metadata": {"total_size": sum(t.spec.nbytes for t in manifest.tensors)},
            "weight_map": {t.spec.name: names[t.file] for t in sorted(manifest.tensors, key=lambda t: t.spec.name)},
        }
        (work / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        names.append(INDEX_NAME)
    return [(work / name).replace(target / name) for name in names]
