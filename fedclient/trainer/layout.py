"""`MODEL_FILE`: what a model directory holds, written before the shards are there; both ends import this file.

{"files": [NAME, ...],                                      in canonical order
 "tensors": {NAME: [[tensor, dtype, shape, offset], ...]},  as the header of each file says it
 "roles": {tensor: role},
 "aliases": {alias: tensor},
 "base": {...}}                                             as `fedlink.base.base_to_json` writes it
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedclient.trainer.wire import MODEL_FILE
from fedlink.base import BaseTensor, base_from_json, base_to_json
from fedlink.tensors import Role, Stored, TensorSpec


def write_layout(
    directory: Path,
    files: Sequence[tuple[str, Sequence[Stored]]],
    aliases: Mapping[str, str],
    base: Sequence[BaseTensor],
) -> None:
    """Write a directory's `MODEL_FILE`.

    Args:
        directory: exists.
        files: names and tensors of the shards.
        aliases: tied names: alias to the tensor that is stored.
        base: the frozen base that the model stands on.
    """
    table = {
        "files": [name for name, _ in files],
        "tensors": {name: [[t.spec.name, t.spec.dtype, t.spec.shape, t.offset] for t in held] for name, held in files},
        "roles": {t.spec.name: t.spec.role.value for _, held in files for t in held},
        "aliases": dict(aliases),
        "base": base_to_json(base),
    }
    (directory / MODEL_FILE).write_text(json.dumps(table), encoding="utf-8")


def read_layout(
    directory: Path,
) -> tuple[list[tuple[str, tuple[Stored, ...]]], dict[str, str], tuple[BaseTensor, ...]]:
    """The shards, the tied names and the base that a directory's `MODEL_FILE` tells of.

    Raises:
        OSError, ValueError, KeyError: there is none, or it is damaged.
    """
    table = json.loads((directory / MODEL_FILE).read_text(encoding="utf-8"))
    roles = {name: Role(role) for name, role in table["roles"].items()}
    files = []
    for file in table["files"]:
        held = tuple(
            Stored(TensorSpec(name, dtype, tuple(shape), roles[name]), offset)
            for name, dtype, shape, offset in table["tensors"][file]
        )
        files.append((file, held))
    return files, table["aliases"], base_from_json(table["base"])


def read_roles(directory: Path) -> dict[str, Role]:
    """The roles of the tensors, of which every version of `MODEL_FILE` tells.

    Raises:
        OSError, ValueError, KeyError: there is none, or it is damaged.
    """
    table = json.loads((directory / MODEL_FILE).read_text(encoding="utf-8"))
    return {name: Role(role) for name, role in table["roles"].items()}
