"""Model directories of local training: from the user's files, from one version to the next, and back. Blocking."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedclient.trainer.layout import write_layout
from fedlink.base import BaseTensor, base_metadata, read_base
from fedlink.companions import ADAPTER_WEIGHTS, INDEX_NAME, MODEL_WEIGHTS, is_companion
from fedlink.errors import FedlinkError, Reason
from fedlink.tensors import (
    DTYPES,
    Role,
    ShardWriter,
    Stored,
    TensorError,
    TensorSpec,
    apply_metadata,
    arithmetic_dtype,
    canonical_shards,
    read_header,
    read_into,
    roles_metadata,
    shard_name,
    windows,
)

_WINDOW = 1 << 20
_ADAPTER_CONFIG = "adapter_config.json"
_COMPUTED_BY = ("peft_type", "r", "lora_alpha", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
"""Entries of adapter_config.json that decide what the weights mean."""
_IN_SITE_TOML = {"r": "rank", "lora_alpha": "alpha"}


@dataclass(frozen=True)
class LocalModel:
    """One version: a model directory as `fedclient.trainer.wire.MODEL_FILE` describes it, and what lies in it."""

    directory: Path
    shards: tuple[tuple[str, tuple[TensorSpec, ...]], ...]
    """File names and their tensors, in canonical order."""
    aliases: Mapping[str, str]
    base: tuple[BaseTensor, ...] = ()
    """The frozen base that it stands on."""
    companions: tuple[Path, ...] = ()
    """What lay beside the weights that it began with, for `export_model`."""

    @property
    def nbytes(self) -> int:
        """Bytes in all tensors."""
        return sum(spec.nbytes for _, specs in self.shards for spec in specs)


def import_model(source: Path, target: Path) -> LocalModel:
    """Make a model directory at `target` (which must not exist) in the canonical layout.

    Args:
        source: a safetensors file, or a directory with one, or with shards and their index, or with an adapter.
        target: where the model directory is made.

    Raises:
        FedlinkError: BAD_CONFIG: not there, or not safetensors.
    """
    try:
        found, aliases, base = _read(_files_of(source))
        shards = canonical_shards([stored.spec for _, stored in found.values()])
        names = [shard_name(i, len(shards)) for i in range(len(shards))]
        target.mkdir(parents=True)
        for name, specs in zip(names, shards, strict=True):
            _copy(found, specs, target / name, {})
    except (TensorError, OSError, ValueError, KeyError) as e:
        raise FedlinkError(Reason.BAD_CONFIG, f"{source} cannot be used as a model: {e}") from None
    companions = tuple(sorted(p for p in source.iterdir() if is_companion(p.name))) if source.is_dir() else ()
    model = LocalModel(target, tuple(zip(names, map(tuple, shards), strict=True)), aliases, base, companions)
    _describe(model)
    return model


def check_same_adapter(source: Path, built: Path, workload: str) -> None:
    """Compare what two directories' adapter_config.json say of how an adapter is computed; the weights do not tell.

    Args:
        source: where weights came from; without such a file nothing is known, and nothing is checked.
        built: what `fedclient init-model` wrote.
        workload: whose table of site.toml is to be mended.

    Raises:
        FedlinkError: BAD_CONFIG: they differ, or the file is none.
    """
    theirs, ours = (directory / _ADAPTER_CONFIG for directory in (source, built))
    if not (theirs.is_file() and ours.is_file()):
        return
    try:
        one, other = (json.loads(path.read_text(encoding="utf-8")) for path in (theirs, ours))
        differs = [key for key in _COMPUTED_BY if one.get(key) != other.get(key)]
    except (OSError, ValueError, AttributeError) as e:
        raise FedlinkError(Reason.BAD_CONFIG, f"{theirs} cannot be read: {e}") from None
    if differs:
        said = ", ".join(f"{_IN_SITE_TOML.get(key, key)} {one.get(key)} instead of {other.get(key)}" for key in differs)
        raise FedlinkError(
            Reason.BAD_CONFIG, f"the adapter in {source} has {said}: say the same in [workload.{workload}.lora]"
        )


def next_version(model: LocalModel, files: Sequence[Path], target: Path, step: float | None) -> LocalModel:
    """The version after `model`, at `target` (which must not exist); frozen shards are linked, not copied.

    Args:
        model: the version that was trained.
        files: what the trainer wrote, one file for each shard that changes; they are moved or read.
        target: where the new version goes.
        step: None if the files hold weights; if they hold gradients, the learning rate to step with.
    """
    target.mkdir(parents=True)
    written = iter(files)
    for name, specs in model.shards:
        if all(s.role is Role.FROZEN for s in specs):
            (target / name).hardlink_to(model.directory / name)
        elif step is None:
            next(written).replace(target / name)
        else:
            _descend(model.directory / name, next(written), specs, target / name, step)
    fresh = replace(model, directory=target)
    _describe(fresh)
    return fresh


def export_model(model: LocalModel, path: Path) -> None:
    """Write a version as one safetensors file, with roles, tied names and its base in the metadata.

    If it began with files beside its weights, `path` becomes a directory with them, unless it is called like a file.
    """
    found, _, _ = _read([model.directory / name for name, _ in model.shards])
    specs = [spec for _, shard in model.shards for spec in shard]
    ordered = sorted(specs, key=lambda s: (-DTYPES[s.dtype].bits, s.name))
    if model.companions and not _is_file(path):
        path = as_directory(path) / (ADAPTER_WEIGHTS if model.base else MODEL_WEIGHTS)
        for companion in model.companions:
            shutil.copy(companion, path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    metadata = {**model.aliases, **roles_metadata(ordered, model.aliases), **base_metadata(model.base)}
    _copy(found, ordered, partial, metadata)
    partial.replace(path)


def as_directory(path: Path) -> Path:
    """Make a directory for a model of several files.

    Raises:
        FedlinkError: BAD_CONFIG: it is called like a file, or is one.
    """
    if _is_file(path):
        raise FedlinkError(Reason.BAD_CONFIG, f"more than one file belongs to this model: name a directory, not {path}")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _is_file(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.is_file()


def _files_of(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if (index := source / INDEX_NAME).is_file():
        return [source / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    for name in (MODEL_WEIGHTS, ADAPTER_WEIGHTS):
        if (source / name).is_file():
            return [source / name]
    raise FedlinkError(
        Reason.BAD_CONFIG,
        f"{source} is no .safetensors file, and no directory with {MODEL_WEIGHTS}, {INDEX_NAME} or {ADAPTER_WEIGHTS}",
    )


def _read(
    paths: Sequence[Path],
) -> tuple[dict[str, tuple[Path, Stored]], dict[str, str], tuple[BaseTensor, ...]]:
    """The tensors of some files and where they lie, the tied names, and the base."""
    found: dict[str, tuple[Path, Stored]] = {}
    aliases: dict[str, str] = {}
    base: tuple[BaseTensor, ...] = ()
    for path in paths:
        header = read_header(path)
        tensors, tied = apply_metadata(header)
        found |= {t.spec.name: (path, t) for t in tensors}
        aliases |= tied
        base = base or read_base(header)
    return found, aliases, base


def _describe(model: LocalModel) -> None:
    files = []
    for name, specs in model.shards:
        by_name = {s.name: s for s in specs}
        held = read_header(model.directory / name).tensors
        files.append((name, [Stored(by_name[t.spec.name], t.offset) for t in held]))
    write_layout(model.directory, files, model.aliases, model.base)


def _copy(
    found: Mapping[str, tuple[Path, Stored]], specs: Sequence[TensorSpec], path: Path, metadata: Mapping[str, str]
) -> None:
    buffer = np.empty(_WINDOW, np.uint8)
    with ShardWriter(path, specs, metadata) as writer:
        for spec in specs:
            source, stored = found[spec.name]
            with source.open("rb") as f:
                for first, count in windows(spec.nbytes, _WINDOW):
                    view = buffer[:count].data
                    read_into(f.fileno(), view, stored.offset + first)
                    writer.write(spec.name, view, first)


def _descend(model: Path, gradient: Path, specs: Sequence[TensorSpec], path: Path, rate: float) -> None:
    """Step every parameter against its gradient, in float64 and rounded once; buffers are taken from the gradient."""
    old, _, _ = _read([model])
    new, _, _ = _read([gradient])
    changing = [s for s in specs if s.role is not Role.FROZEN]
    with ShardWriter(path, changing) as writer, model.open("rb") as x, gradient.open("rb") as g:
        for spec in changing:
            own = DTYPES[spec.dtype].bits // 8
            _, was = old[spec.name]
            _, now = new[spec.name]
            step = DTYPES[now.spec.dtype].bits // 8
            for first, count in windows(spec.elements, _WINDOW):
                data = np.empty(count * step, np.uint8)
                read_into(g.fileno(), data.data, now.offset + first * step)
                if spec.is_delta:
                    start = np.empty(count * own, np.uint8)
                    read_into(x.fileno(), start.data, was.offset + first * own)
                    dtype = arithmetic_dtype(spec.dtype)
                    slope = data.view(arithmetic_dtype(now.spec.dtype)).astype(np.float64)
                    data = (start.view(dtype).astype(np.float64) - rate * slope).astype(dtype).view(np.uint8)
                writer.write(spec.name, data.data, first * own)
