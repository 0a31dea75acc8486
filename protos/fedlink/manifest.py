"""The manifest: which files make up a model or an update, which tensors lie where, and on what they stand.

The serialized `fedlink.v1.Manifest` is itself a blob; `Manifest` is its checked value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from google.protobuf.message import DecodeError

from fedlink.base import BaseTensor
from fedlink.blobs import DIGEST_SIZE, MAX_BLOB_SIZE, MAX_MANIFEST_SIZE, BlobRef
from fedlink.companions import MAX_COMPANION_BYTES, is_companion
from fedlink.errors import FedlinkError, Reason
from fedlink.tensors import DTYPES, FILE_NAME, Header, Kind, Role, Stored, TensorError, TensorSpec, check_spec
from fedlink.v1 import types_pb2 as pb

MAX_TENSORS = 65_536
"""Tensors in the largest manifest."""
MAX_FILES = 16_384
"""Files in the largest manifest."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file, by name and content."""

    name: str
    blob: BlobRef


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor and where it lies: `stored.offset` bytes into file number `file`."""

    stored: Stored
    file: int

    @property
    def spec(self) -> TensorSpec:
        """What the tensor is."""
        return self.stored.spec


@dataclass(frozen=True)
class Manifest:
    """A checked manifest: names are unique, files and aliases exist, every spec is valid.

    Raises:
        FedlinkError: BAD_MANIFEST, naming what is wrong.
    """

    kind: Kind
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    aliases: Mapping[str, str]
    base: tuple[BaseTensor, ...] = ()
    """The frozen base that the model stands on; sites have it of their own."""
    companions: tuple[FileEntry, ...] = ()
    """Files beside the weights; for export only."""

    def __post_init__(self) -> None:
        _check(self)

    @cached_property
    def by_name(self) -> Mapping[str, TensorEntry]:
        """Tensors by name; aliases are not in it."""
        return {t.spec.name: t for t in self.tensors}

    @property
    def total_size(self) -> int:
        """Bytes of all shards."""
        return sum(f.blob.size for f in self.files)

    @property
    def everything(self) -> tuple[FileEntry, ...]:
        """The shards, then the files beside them: what is kept as long as the model."""
        return self.files + self.companions

    def in_file(self, index: int) -> list[TensorEntry]:
        """The tensors of one file, in order of offset."""
        return self._by_file[index]

    @cached_property
    def _by_file(self) -> list[list[TensorEntry]]:
        # Grouped once: a scan for each file would let a hostile manifest cost files x tensors.
        groups: list[list[TensorEntry]] = [[] for _ in self.files]
        for t in sorted(self.tensors, key=lambda t: (t.stored.offset, t.spec.nbytes)):
            groups[t.file].append(t)
        return groups

    def check_header(self, index: int, header: Header) -> None:
        """Compare a file's own safetensors header with this manifest.

        Raises:
            FedlinkError: BAD_MANIFEST, naming the tensor that differs.
        """
        said = {(t.spec.name, t.spec.dtype, t.spec.shape, t.stored.offset) for t in self.in_file(index)}
        found = {(s.spec.name, s.spec.dtype, s.spec.shape, s.offset) for s in header.tensors}
        if said != found:
            name = min(said ^ found)[0]
            raise FedlinkError(
                Reason.BAD_MANIFEST,
                f"file {self.files[index].name} and its manifest disagree about tensor {name!r}",
                metadata={"tensor": name},
            )

    def serialize(self) -> bytes:
        """The manifest as a blob.

        Raises:
            FedlinkError: BAD_MANIFEST if it is larger than `MAX_MANIFEST_SIZE`.
        """
        message = pb.Manifest(kind=pb.Manifest.Kind.Value(f"KIND_{self.kind.name}"))
        for file in self.files:
            message.files.add(name=file.name, blob=ref_to_pb(file.blob))
        for t in self.tensors:
            message.tensors.add(
                name=t.spec.name,
                dtype=pb.Dtype.Value(f"DTYPE_{t.spec.dtype}"),
                shape=t.spec.shape,
                role=pb.Role.Value(f"ROLE_{t.spec.role.name}"),
                file=t.file,
                offset=t.stored.offset,
            )
        for name, target in sorted(self.aliases.items()):
            message.aliases.add(name=name, target=target)
        for b in self.base:
            message.base.add(name=b.name, dtype=pb.Dtype.Value(f"DTYPE_{b.dtype}"), shape=b.shape, digest=b.digest)
        for file in self.companions:
            message.companions.add(name=file.name, blob=ref_to_pb(file.blob))
        data = message.SerializeToString(deterministic=True)
        if len(data) > MAX_MANIFEST_SIZE:
            raise _bad(f"manifest is {len(data)} bytes; the limit is {MAX_MANIFEST_SIZE}")
        return data

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Read a manifest that somebody sent.

        Raises:
            FedlinkError: BAD_MANIFEST, naming what is wrong.
        """
        if len(data) > MAX_MANIFEST_SIZE:
            raise _bad(f"manifest is {len(data)} bytes; the limit is {MAX_MANIFEST_SIZE}")
        try:
            message = pb.Manifest.FromString(data)
            kind = Kind[pb.Manifest.Kind.Name(message.kind).removeprefix("KIND_")]
            files = tuple(FileEntry(f.name, ref_from_pb(f.blob)) for f in message.files)
            tensors = tuple(_tensor_from_pb(t) for t in message.tensors)
            base = tuple(_base_from_pb(b) for b in message.base[: MAX_TENSORS + 1])
            companions = tuple(FileEntry(f.name, ref_from_pb(f.blob)) for f in message.companions)
        except (DecodeError, KeyError, ValueError) as e:
            raise _bad(f"manifest cannot be read: {e}") from None
        return cls(kind, files, tensors, {a.name: a.target for a in message.aliases}, base, companions)


def ref_to_pb(ref: BlobRef) -> pb.BlobRef:
    """A BlobRef as a message."""
    return pb.BlobRef(digest=ref.digest, size=ref.size)


def ref_from_pb(message: pb.BlobRef) -> BlobRef:
    """A BlobRef that somebody sent.

    Raises:
        FedlinkError: BAD_MANIFEST if the digest has another length or the size is over the limit.
    """
    if len(message.digest) != DIGEST_SIZE or message.size > MAX_BLOB_SIZE:
        raise _bad(f"blob reference has a digest of {len(message.digest)} bytes and a size of {message.size}")
    return BlobRef(message.digest, message.size)


def manifest_of_files(
    kind: Kind,
    files: Sequence[tuple[FileEntry, Header]],
    roles: Mapping[str, Role],
    aliases: Mapping[str, str] | None = None,
    *,
    base: Sequence[BaseTensor] = (),
    companions: Sequence[FileEntry] = (),
) -> Manifest:
    """The manifest of safetensors files that are already named by digest.

    Args:
        kind: what the tensors are.
        files: each file and its header.
        roles: role of each tensor; a tensor that is not in it keeps the role in the header.
        aliases: tied names.
        base: the frozen base that it stands on.
        companions: files beside the weights.
    """
    tensors = []
    for index, (_, header) in enumerate(files):
        for item in header.tensors:
            spec = item.spec
            spec = TensorSpec(spec.name, spec.dtype, spec.shape, roles.get(spec.name, spec.role))
            tensors.append(TensorEntry(Stored(spec, item.offset), index))
    entries = tuple(entry for entry, _ in files)
    return Manifest(kind, entries, tuple(tensors), dict(aliases or {}), tuple(base), tuple(companions))


def _tensor_from_pb(t: pb.Manifest.Tensor) -> TensorEntry:
    dtype = pb.Dtype.Name(t.dtype).removeprefix("DTYPE_")
    role = Role[pb.Role.Name(t.role).removeprefix("ROLE_")]
    return TensorEntry(Stored(TensorSpec(t.name, dtype, tuple(t.shape), role), t.offset), t.file)


def _base_from_pb(b: pb.Manifest.BaseTensor) -> BaseTensor:
    return BaseTensor(b.name, pb.Dtype.Name(b.dtype).removeprefix("DTYPE_"), tuple(b.shape), b.digest)


def _check(m: Manifest) -> None:
    if len(m.files) > MAX_FILES or len(m.tensors) > MAX_TENSORS:
        raise _bad(
            f"manifest has {len(m.files)} files and {len(m.tensors)} tensors; limits: {MAX_FILES}, {MAX_TENSORS}"
        )
    names = {f.name for f in m.files}
    if len(names) != len(m.files) or not all(FILE_NAME.fullmatch(n) for n in names):
        raise _bad("manifest has a file name that occurs twice or is not [A-Za-z0-9._-]+")
    if len(m.by_name) != len(m.tensors):
        raise _bad("manifest names a tensor twice")
    for t in m.tensors:
        try:
            check_spec(t.spec)
        except TensorError as e:
            raise _bad(str(e), e.tensor) from None
        if t.file >= len(m.files) or t.stored.offset + t.spec.nbytes > m.files[t.file].blob.size:
            raise _bad(f"tensor {t.spec.name!r} lies outside its file", t.spec.name)
        if m.kind is not Kind.MODEL and t.spec.role is Role.FROZEN:
            raise _bad(f"tensor {t.spec.name!r} is frozen and may not be in an update", t.spec.name)
    _check_beside(m)
    for name, target in m.aliases.items():
        if target not in m.by_name or name in m.by_name or m.kind is not Kind.MODEL:
            raise _bad(f"alias {name!r} of {target!r} is not valid", name)


def _check_beside(m: Manifest) -> None:
    """What is no tensor of the model's own: its base, and the files beside it."""
    if m.kind is not Kind.MODEL and (m.base or m.companions):
        raise _bad("an update names a base or files beside its tensors")
    if len(m.base) > MAX_TENSORS or len({b.name for b in m.base}) != len(m.base):
        raise _bad("manifest names a tensor of the base twice, or too many")
    names = {f.name for f in m.companions}
    if len(names) != len(m.companions) or names & {f.name for f in m.files}:
        raise _bad("manifest names a file beside the model twice")
    if unknown := sorted(n for n in names if not is_companion(n)):
        raise _bad(f"manifest has {unknown[0][:128]!r} beside the model; no file of that name travels with one")
    if sum(f.blob.size for f in m.companions) > MAX_COMPANION_BYTES:
        raise _bad(f"the files beside the model have more than {MAX_COMPANION_BYTES} bytes")


def _bad(message: str, tensor: str = "") -> FedlinkError:
    return FedlinkError(Reason.BAD_MANIFEST, message, metadata={"tensor": tensor} if tensor else None)


assert set(DTYPES) == {n.removeprefix("DTYPE_") for n in pb.Dtype.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
