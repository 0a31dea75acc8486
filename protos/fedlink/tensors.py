"""Tensors in safetensors files: dtypes, headers, the canonical layout. numpy only, no torch.

This module runs in the server, in the daemon and in the trainer process. It handles raw
little-endian bytes for every dtype of safetensors; arithmetic on the small floats needs
ml-dtypes, which is imported only when asked for (`arithmetic_dtype`).

Format: https://github.com/huggingface/safetensors#format - an 8-byte length, a JSON
header, then the data without gaps.
"""

from __future__ import annotations

import enum
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedlink.files import open_to_fill

MAX_HEADER_SIZE = 16 << 20
"""Bytes in the largest safetensors header that is read."""
SHARD_MIN_BYTES = 64 << 20
"""A shard that has reached this size takes no further tensor."""
SHARD_MAX_BYTES = 256 << 20
"""A shard holds no more than this, except a single tensor that is larger."""
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
"""What a file in a manifest may be called."""
METADATA_KEY = "fedlink"
"""Key in a safetensors header's metadata under which roles and aliases are kept as JSON."""

_MAX_TENSOR_BYTES = 64 << 30
_MAX_DIMS = 32


class TensorError(ValueError):
    """A file or a state dict that breaks a rule.

    Attributes:
        tensor: name of the tensor at fault; empty if it is the file as a whole.
    """

    def __init__(self, message: str, tensor: str = "") -> None:
        super().__init__(message)
        self.tensor = tensor


class Role(enum.StrEnum):
    """What training does with a tensor; see `fedlink.v1.Role`."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    FROZEN = "frozen"


class Kind(enum.StrEnum):
    """What a manifest's tensors are; see `fedlink.v1.Manifest.Kind`."""

    MODEL = "model"
    DELTA = "delta"
    GRADIENT = "gradient"


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type of safetensors."""

    name: str
    bits: int
    raw: str
    """numpy dtype of the same width that holds the bits ("u1" for packed types)."""
    arithmetic: str = ""
    """numpy or ml_dtypes name to compute with; empty if nothing is ever computed."""
    floating: bool = False
    """Whether values of this type can be averaged."""


DTYPES: Mapping[str, Dtype] = {
    d.name: d
    for d in (
        Dtype("BOOL", 8, "u1", "bool"),
        Dtype("U8", 8, "u1", "uint8"),
        Dtype("I8", 8, "i1", "int8"),
        Dtype("U16", 16, "<u2", "uint16"),
        Dtype("I16", 16, "<i2", "int16"),
        Dtype("U32", 32, "<u4", "uint32"),
        Dtype("I32", 32, "<i4", "int32"),
        Dtype("U64", 64, "<u8", "uint64"),
        Dtype("I64", 64, "<i8", "int64"),
        Dtype("F8_E4M3", 8, "u1", "float8_e4m3fn", floating=True),
        Dtype("F8_E5M2", 8, "u1", "float8_e5m2", floating=True),
        Dtype("F8_E8M0", 8, "u1"),
        Dtype("F16", 16, "<u2", "float16", floating=True),
        Dtype("BF16", 16, "<u2", "bfloat16", floating=True),
        Dtype("F32", 32, "<f4", "float32", floating=True),
        Dtype("F64", 64, "<f8", "float64", floating=True),
        Dtype("C64", 64, "<c8"),
        Dtype("F4", 4, "u1"),
        Dtype("F6_E2M3", 6, "u1"),
        Dtype("F6_E3M2", 6, "u1"),
    )
}
"""Every dtype by its safetensors name."""

UPDATE_DTYPES = ("F32", "BF16", "F16")
"""Dtypes in which parameters may travel; F64 parameters always travel as F64."""


def arithmetic_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype to compute with for a safetensors dtype.

    Raises:
        TensorError: nothing is computed on this dtype (packed and complex types, scales).
    """
    wanted = DTYPES[name].arithmetic
    if not wanted:
        raise TensorError(f"dtype {name} cannot be computed with")
    if wanted in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        import ml_dtypes  # noqa: PLC0415 - the trainer's Python may lack it and never gets here

        small: np.dtype[Any] = np.dtype(getattr(ml_dtypes, wanted))
        return small
    return np.dtype(wanted)


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The safetensors name of a numpy (or ml_dtypes) dtype.

    Raises:
        TensorError: safetensors has no such dtype.
    """
    for d in DTYPES.values():
        if d.arithmetic == dtype.name or (d.name == "C64" and dtype.name == "complex64"):
            return d.name
    raise TensorError(f"safetensors has no dtype for numpy's {dtype.name}")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, element type and shape of a tensor, and what training does with it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: Role = Role.PARAMETER

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar, 0 if a dimension is 0."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.elements * DTYPES[self.dtype].bits // 8

    @property
    def averaged(self) -> bool:
        """Whether the server averages it: floating parameters and floating buffers."""
        return self.role is not Role.FROZEN and DTYPES[self.dtype].floating

    @property
    def is_delta(self) -> bool:
        """Whether an update holds it as a delta (or gradient) rather than as a value."""
        return self.role is Role.PARAMETER and DTYPES[self.dtype].floating


def check_spec(spec: TensorSpec) -> None:
    """Refuse what no valid model holds.

    Raises:
        TensorError: naming the tensor.
    """
    if not spec.name or len(spec.name.encode()) > 512:
        raise TensorError(f"tensor name {spec.name[:64]!r} is empty or longer than 512 bytes", spec.name[:64])
    if spec.dtype not in DTYPES:
        raise TensorError(f"tensor {spec.name!r} has the unknown dtype {spec.dtype!r}", spec.name)
    if len(spec.shape) > _MAX_DIMS or any(d < 0 for d in spec.shape) or spec.nbytes > _MAX_TENSOR_BYTES:
        raise TensorError(f"tensor {spec.name!r} has the impossible shape {spec.shape}", spec.name)
    if spec.elements * DTYPES[spec.dtype].bits % 8:
        raise TensorError(f"tensor {spec.name!r} of {spec.dtype} does not fill whole bytes", spec.name)
    if spec.role is Role.PARAMETER and not DTYPES[spec.dtype].floating:
        raise TensorError(
            f"tensor {spec.name!r} of {spec.dtype} cannot be a parameter: only F64, F32, F16, BF16, F8 can be trained; "
            "make it a buffer or frozen",
            spec.name,
        )


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: what it is and where its bytes begin (from the start of the file)."""

    spec: TensorSpec
    offset: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself."""

    tensors: tuple[Stored, ...]
    """In order of offset."""
    metadata: Mapping[str, str]
    data_start: int
    file_size: int


def parse_header(head: bytes, file_size: int) -> Header:
    """Read a safetensors header; every tensor gets role PARAMETER or, if it cannot be one, BUFFER.

    Args:
        head: the first bytes of the file, at least through the header.
        file_size: bytes in the whole file.

    Raises:
        TensorError: truncated, malformed, overlapping, with gaps or trailing bytes.
    """
    length = header_length(head, file_size)
    start = 8 + length
    if len(head) < start:
        raise TensorError("safetensors header is truncated")
    try:
        table = json.loads(head[8:start].decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise TensorError(f"safetensors header is not valid JSON: {e}") from None
    if not isinstance(table, dict):
        raise TensorError("safetensors header is not a JSON object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise TensorError("safetensors metadata is not a table of strings")
    stored = sorted((_parse_entry(name, entry, start) for name, entry in table.items()), key=_by_offset)
    end = start
    for item in stored:
        if item.offset != end:
            raise TensorError(f"tensor {item.spec.name!r} does not begin where the one before ends", item.spec.name)
        end += item.spec.nbytes
    if end != file_size:
        raise TensorError(f"safetensors file is {file_size} bytes long, its header describes {end}")
    return Header(tuple(stored), metadata, start, file_size)


def header_length(head: bytes, file_size: int) -> int:
    """Length of the JSON header, from the first 8 bytes of a file.

    Raises:
        TensorError: not a safetensors file, or the header is larger than `MAX_HEADER_SIZE`.
    """
    if len(head) < 8:
        raise TensorError("file is too short to be a safetensors file")
    length: int = struct.unpack("<Q", head[:8])[0]
    if length > MAX_HEADER_SIZE or 8 + length > file_size:
        raise TensorError("not a safetensors file: its first 8 bytes are no plausible header length")
    return length


def read_header(path: str | os.PathLike[str]) -> Header:
    """`parse_header` on a file.

    Raises:
        TensorError: as `parse_header`, naming the file.
        OSError: the file cannot be read.
    """
    size = Path(path).stat().st_size
    with Path(path).open("rb") as f:
        head = f.read(8)
        try:
            head += f.read(header_length(head, size))
            return parse_header(head, size)
        except TensorError as e:
            raise TensorError(f"{path}: {e}", e.tensor) from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name occurs twice")
    return out


def _by_offset(item: Stored) -> tuple[int, int]:
    return item.offset, item.spec.nbytes


def _parse_entry(name: str, entry: Any, start: int) -> Stored:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise TensorError(f"tensor {name!r} has a malformed entry in the safetensors header", name)
    if dtype not in DTYPES:
        raise TensorError(f"tensor {name!r} has the unknown dtype {str(dtype)[:32]!r}", name)
    role = Role.PARAMETER if DTYPES[dtype].floating else Role.BUFFER
    spec = TensorSpec(name, dtype, shape, role)
    check_spec(spec)
    if end - begin != spec.nbytes:
        raise TensorError(f"tensor {name!r}: {end - begin} bytes for {spec.nbytes} by its shape and dtype", name)
    return Stored(spec, start + begin)


def build_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> tuple[bytes, Header]:
    """The header bytes of a file that holds `specs` in this order, and the same parsed.

    The header is padded so that the data begins at a multiple of 64 bytes.

    Raises:
        TensorError: a spec is invalid, a name occurs twice, or the header would be too large.
    """
    if len({s.name for s in specs}) != len(specs):
        raise TensorError("a tensor name occurs twice")
    table: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for spec in specs:
        check_spec(spec)
        table[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]}
        at += spec.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    if len(text) > MAX_HEADER_SIZE:
        raise TensorError(f"{len(specs)} tensors need a header of {len(text)} bytes; the limit is {MAX_HEADER_SIZE}")
    start = 8 + len(text)
    stored, offset = [], start
    for spec in specs:
        stored.append(Stored(spec, offset))
        offset += spec.nbytes
    return struct.pack("<Q", len(text)) + text, Header(tuple(stored), table["__metadata__"], start, offset)


def canonical_shards(specs: Iterable[TensorSpec], nbytes: Mapping[str, int] | None = None) -> list[list[TensorSpec]]:
    """Cut a model into shards, the same way everywhere.

    Tensors are taken by name, first those that change (parameters and buffers), then the
    frozen ones, never both in one shard. A shard closes once it holds `SHARD_MIN_BYTES`,
    or before a tensor that would take it past `SHARD_MAX_BYTES`. Inside a shard larger
    element types come first, so that every tensor is aligned.

    Args:
        specs: every tensor of the model.
        nbytes: sizes to plan by, if not the tensors' own.
    """
    shards: list[list[TensorSpec]] = []
    for frozen in (False, True):
        group = sorted((s for s in specs if (s.role is Role.FROZEN) == frozen), key=lambda s: s.name)
        open_shard: list[TensorSpec] = []
        held = 0
        for spec in group:
            size = nbytes[spec.name] if nbytes else spec.nbytes
            if open_shard and (held >= SHARD_MIN_BYTES or held + size > SHARD_MAX_BYTES):
                shards.append(open_shard)
                open_shard, held = [], 0
            open_shard.append(spec)
            held += size
        if open_shard:
            shards.append(open_shard)
    return [sorted(shard, key=lambda s: (-DTYPES[s.dtype].bits, s.name)) for shard in shards]


def shard_name(index: int, count: int, stem: str = "model") -> str:
    """File name of a shard, from 0, as Hugging Face names them."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"


def update_spec(spec: TensorSpec, update_dtype: str) -> TensorSpec:
    """How a model's tensor travels in an update: deltas in `update_dtype` (F64 as F64), values as they are."""
    if not spec.is_delta:
        return spec
    return TensorSpec(spec.name, "F64" if spec.dtype == "F64" else update_dtype, spec.shape, spec.role)


def raw_bytes(array: npt.NDArray[Any]) -> memoryview:
    """The little-endian row-major bytes of an array of any layout, without a copy where possible."""
    contiguous = np.ascontiguousarray(array).reshape(-1)
    if contiguous.dtype.byteorder == ">":
        contiguous = contiguous.astype(contiguous.dtype.newbyteorder("<"))
    return contiguous.view(np.uint8).data


class ShardWriter:
    """Writes one safetensors file tensor by tensor, in any order, by position; over the file that is there, if any.

    Use as a context manager; leaving it without an error checks that every tensor was
    written. Nothing is synced: the caller decides what must survive a power loss.

    Attributes:
        path: the file.
        header: where each tensor goes.
        head: the bytes before the first tensor, for who names the file by its content.
    """

    def __init__(
        self, path: str | os.PathLike[str], specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.head, self.header = build_header(specs, metadata)
        self.path = Path(path)
        self._at = {s.spec.name: s for s in self.header.tensors}
        self._left = {s.spec.name: s.spec.nbytes for s in self.header.tensors}
        self._fd = open_to_fill(path, self.header.file_size)
        try:
            _pwrite_all(self._fd, memoryview(self.head), 0)
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, name: str, data: memoryview | bytes, start: int = 0) -> None:
        """Write bytes of a tensor, beginning `start` bytes into it.

        Raises:
            TensorError: no such tensor, or more bytes than it has.
        """
        stored = self._at.get(name)
        if stored is None or start + len(data) > stored.spec.nbytes:
            raise TensorError(f"{self.path.name}: {len(data)} bytes at {start} do not fit tensor {name!r}", name)
        _pwrite_all(self._fd, memoryview(data), stored.offset + start)
        self._left[name] -= len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        os.close(self._fd)
        if kind is None:
            for name, left in self._left.items():
                if left:
                    raise TensorError(f"{self.path.name}: {left} bytes of tensor {name!r} were not written", name)


def read_into(fd: int, view: memoryview, offset: int) -> None:
    """Fill `view` from a file by position.

    Raises:
        TensorError: the file ends before.
    """
    while len(view):
        n = os.preadv(fd, [view], offset)
        if n == 0:
            raise TensorError("file ends in the middle of a tensor")
        view, offset = view[n:], offset + n


def read_array(fd: int, stored: Stored) -> npt.NDArray[Any]:
    """Read a whole tensor as an array of its raw dtype (`Dtype.raw`), in its shape (packed types: flat bytes)."""
    spec = stored.spec
    dtype = DTYPES[spec.dtype]
    buffer = np.empty(spec.nbytes, np.uint8)
    read_into(fd, buffer.data, stored.offset)
    array = buffer.view(dtype.raw)
    return array if dtype.bits < 8 else array.reshape(spec.shape)


def windows(elements: int, window: int) -> Iterator[tuple[int, int]]:
    """Yield `(first, count)` element ranges of at most `window` elements."""
    for first in range(0, elements, window):
        yield first, min(window, elements - first)


def roles_metadata(specs: Iterable[TensorSpec], aliases: Mapping[str, str]) -> dict[str, str]:
    """Header metadata that keeps what safetensors has no place for: roles other than the default, and tied names."""
    roles = {s.name: s.role.value for s in specs if s.role is not Role.PARAMETER}
    return {METADATA_KEY: json.dumps({"roles": roles, "aliases": dict(aliases)}, sort_keys=True)}


def apply_metadata(header: Header) -> tuple[list[Stored], dict[str, str]]:
    """Tensors with the roles, and aliases, that a header's metadata states.

    Aliases are also read as safetensors' `save_model` writes them (removed name: kept name).

    Raises:
        TensorError: the metadata is malformed or names a tensor that is not there.
    """
    names = {s.spec.name for s in header.tensors}
    try:
        own = json.loads(header.metadata.get(METADATA_KEY, "{}"))
        roles = {str(k): Role(v) for k, v in own.get("roles", {}).items()}
        aliases = {str(k): str(v) for k, v in own.get("aliases", {}).items()}
    except (ValueError, AttributeError) as e:
        raise TensorError(f"metadata {METADATA_KEY!r} is malformed: {e}") from None
    aliases |= {k: v for k, v in header.metadata.items() if v in names and k not in names and k != "format"}
    for name in (*roles, *aliases.values()):
        if name not in names:
            raise TensorError(f"metadata names the tensor {name!r}, which the file does not hold", name)
    stored = []
    for item in header.tensors:
        spec = item.spec
        role = roles.get(spec.name, spec.role)
        stored.append(Stored(TensorSpec(spec.name, spec.dtype, spec.shape, role), item.offset))
        check_spec(stored[-1].spec)
    return stored, aliases


def _pwrite_all(fd: int, view: memoryview, offset: int) -> None:
    while len(view):
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n
