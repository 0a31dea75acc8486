"""An update as blobs: its files named by their content, and its manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedclient.spool import Order
from fedclient.trainer.layout import read_roles
from fedclient.trainer.wire import UPDATE_STEM
from fedlink import bulk
from fedlink.blobs import BlobRef
from fedlink.errors import FedlinkError, Reason
from fedlink.manifest import FileEntry, Manifest, manifest_of_files
from fedlink.tensors import Role, TensorError, read_header, shard_name, update_spec

_MANIFEST = "manifest"


@dataclass(frozen=True, slots=True)
class LocalBlob:
    """A file that has been named by its content."""

    path: Path
    ref: BlobRef
    chunk_digests: bytes

    @classmethod
    def of(cls, path: Path) -> Self:
        """Name a file. Blocking.

        Raises:
            OSError: it cannot be read.
        """
        return cls(path, *bulk.hash_file(path))


@dataclass(frozen=True, slots=True)
class Encoded:
    """An update ready to be sent."""

    manifest: LocalBlob
    shards: tuple[LocalBlob, ...]

    @property
    def blobs(self) -> tuple[LocalBlob, ...]:
        """Everything to send, the manifest first, so that the server knows early what comes."""
        return (self.manifest, *self.shards)


def update_files(model: Manifest, update_dtype: str) -> dict[str, int]:
    """Names and about the sizes of the files that a trainer will write for an update to a model."""
    trained = [[t.spec for t in model.in_file(i) if t.spec.role is not Role.FROZEN] for i in range(len(model.files))]
    sizes = [sum(update_spec(s, update_dtype).nbytes for s in specs) for specs in trained if specs]
    return {shard_name(i, len(sizes), UPDATE_STEM): size for i, size in enumerate(sizes)}


def encode(
    order: Order, model_dir: Path, update_dir: Path, files: Sequence[str], named: Mapping[str, LocalBlob]
) -> Encoded:
    """Name an update by its content and write its manifest. Blocking; the same files give the same manifest.

    Args:
        order: the task.
        model_dir: as `Transfer.begin` laid it out; gives the roles.
        update_dir: where the shards are; the manifest is written beside them.
        files: names of the shards in canonical order.
        named: those of the shards that have been named already, by file name.

    Raises:
        FedlinkError: BAD_MANIFEST: a file is no safetensors file; TOO_LARGE: more bytes than the task allows.
        OSError: a file is not there.
    """
    assert order.update is not None
    shards = [named.get(name) or LocalBlob.of(update_dir / name) for name in files]
    size = sum(s.ref.size for s in shards)
    if order.max_update_bytes and size > order.max_update_bytes:
        raise FedlinkError(
            Reason.TOO_LARGE, f"the update is {size} bytes long; the task allows {order.max_update_bytes}"
        )
    try:
        entries = [(FileEntry(s.path.name, s.ref), read_header(s.path)) for s in shards]
    except TensorError as e:
        raise FedlinkError(Reason.BAD_MANIFEST, str(e), metadata={"tensor": e.tensor}) from None
    manifest = manifest_of_files(order.update, entries, read_roles(model_dir))
    path = update_dir / _MANIFEST
    path.write_bytes(manifest.serialize())
    return Encoded(LocalBlob.of(path), tuple(shards))
