"""Models as people have them on disk, into the canonical layout. Runs in the command line, not in the server."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from fedlink.base import BaseTensor, read_base
from fedlink.bulk import hash_file
from fedlink.companions import (
    ADAPTER_WEIGHTS,
    INDEX_NAME,
    MAX_COMPANION_BYTES,
    MODEL_WEIGHTS,
    is_companion,
)
from fedlink.errors import FedlinkError, Reason
from fedlink.manifest import FileEntry, Manifest, TensorEntry, manifest_of_files
from fedlink.tensors import (
    FILE_NAME,
    Header,
    Kind,
    Role,
    TensorError,
    TensorSpec,
    apply_metadata,
    canonical_shards,
    check_spec,
    read_header,
    shard_name,
    windows,
)
from fedserver.aggregation.files import WINDOW_BYTES, NamingWriter, ShardReader, naming_a_full_disk
from fedserver.aggregation.numbers import Raw, sound
from fedserver.aggregation.pipeline import WrittenFile

_MAX_INDEX_BYTES = 32 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class ConvertedModel:
    """A model in the canonical layout, ready to be sent."""

    manifest: Manifest
    files: tuple[WrittenFile, ...]
    """In the order of `manifest.everything`."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The safetensors files of a model on disk, and what they hold."""

    paths: Sequence[Path]
    tensors: Mapping[str, TensorEntry]
    """Every tensor by name, and where it lies in `paths`."""
    aliases: Mapping[str, str]
    """Tied names."""
    base: tuple[BaseTensor, ...]
    """The frozen base that it stands on."""


def convert(
    source: Path,
    out_dir: Path,
    *,
    buffers: Sequence[str] = (),
    frozen: Sequence[str] = (),
    dropped: Sequence[str] = (),
) -> ConvertedModel:
    """Re-shard a model from safetensors files to the canonical layout. Blocking; streams in windows.

    Roles, tied names and a frozen base come from the files' metadata (as `fedserver model export` and
    `fedclient init-model` write it); patterns override the roles. Of a directory the config, tokenizer and adapter
    files are taken along.

    Args:
        source: a .safetensors file, or a directory with one, or with shards and their index, or with peft's adapter.
        out_dir: an empty directory for the shards.
        buffers: shell patterns (`*.running_mean`) of tensors that are buffers.
        frozen: shell patterns of tensors that never change; stronger than `buffers`.
        dropped: shell patterns of tensors to leave out.

    Raises:
        FedlinkError: BAD_CONFIG if the source is no such file or directory (a pickle is never opened) or a
            pattern matches nothing; BAD_MANIFEST if a file is malformed; NOT_FINITE if a tensor that is not frozen
            holds NaN or Inf.
        OSError: a file cannot be read or written.
    """
    weights = _without(read_weights(source), dropped)
    try:
        roles = _roles([t.spec for t in weights.tensors.values()], buffers, frozen)
        specs = [replace(t.spec, role=roles[name]) for name, t in weights.tensors.items()]
        for spec in specs:
            check_spec(spec)
        with naming_a_full_disk(out_dir):
            shards = _write_shards(weights.paths, weights.tensors, canonical_shards(specs), out_dir)
    except TensorError as e:
        raise _malformed(source, e) from None
    beside = [_named(path) for path in companions_in(source)]
    manifest = manifest_of_files(
        Kind.MODEL,
        [(file.entry, header) for file, header in shards],
        roles,
        weights.aliases,
        base=weights.base,
        companions=[file.entry for file in beside],
    )
    return ConvertedModel(manifest, (*(file for file, _ in shards), *beside))


def read_weights(source: Path) -> Weights:
    """Read the headers of a model's files. Blocking.

    Args:
        source: as for `convert`.

    Raises:
        FedlinkError: BAD_CONFIG, BAD_MANIFEST, as for `convert`.
    """
    paths, weight_map = _find(source)
    try:
        return _read_headers(paths, weight_map)
    except TensorError as e:
        raise _malformed(source, e) from None


def companions_in(source: Path) -> list[Path]:
    """The files beside a model's weights that travel with it; of a single file none.

    Raises:
        FedlinkError: BAD_CONFIG: they are too large.
    """
    if not source.is_dir():
        return []
    found = sorted(p for p in source.iterdir() if is_companion(p.name) and p.is_file())
    size = sum(p.stat().st_size for p in found)
    if size > MAX_COMPANION_BYTES:
        raise FedlinkError(
            Reason.BAD_CONFIG,
            f"{source} has {size} bytes of config and tokenizer files; at most {MAX_COMPANION_BYTES} travel with a "
            "model: move those away that it does not need",
        )
    return found


def _named(path: Path) -> WrittenFile:
    ref, chunk_digests = hash_file(path)
    return WrittenFile(FileEntry(path.name, ref), path, chunk_digests)


def _malformed(source: Path, error: TensorError) -> FedlinkError:
    tensor = {"tensor": error.tensor} if error.tensor else None
    return FedlinkError(Reason.BAD_MANIFEST, f"{source}: {error}", metadata=tensor)


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
    for name in (MODEL_WEIGHTS, ADAPTER_WEIGHTS):
        if source / name in found:
            found = [source / name]
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


def _read_headers(paths: Sequence[Path], weight_map: Mapping[str, str]) -> Weights:
    tensors: dict[str, TensorEntry] = {}
    aliases: dict[str, str] = {}
    base: tuple[BaseTensor, ...] = ()
    for index, path in enumerate(paths):
        header = read_header(path)
        stored, tied = apply_metadata(header)
        base = base or read_base(header)
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
    return Weights(paths, tensors, aliases, base)


def _roles(specs: Iterable[TensorSpec], buffers: Sequence[str], frozen: Sequence[str]) -> dict[str, Role]:
    """The role of each tensor: what its file says, then `buffers`, then `frozen`."""
    roles = {spec.name: spec.role for spec in specs}
    for role, patterns in ((Role.BUFFER, buffers), (Role.FROZEN, frozen)):
        for pattern in patterns:
            roles |= dict.fromkeys(_matches(pattern, roles), role)
    return roles


def _without(weights: Weights, patterns: Sequence[str]) -> Weights:
    gone = {name for pattern in patterns for name in _matches(pattern, weights.tensors)}
    tensors = {name: entry for name, entry in weights.tensors.items() if name not in gone}
    return replace(weights, tensors=tensors, aliases={a: t for a, t in weights.aliases.items() if t not in gone})


def _matches(pattern: str, names: Iterable[str]) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise FedlinkError(
            Reason.BAD_CONFIG, f"the pattern {pattern!r} matches no tensor; they are called {_some(names)}"
        )
    return found


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
