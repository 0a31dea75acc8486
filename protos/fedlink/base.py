"""Frozen bases: weights that each site has of its own, told apart by digests. stdlib only; runs in the trainer, too.

A base is named tensor by tensor and not file by file, so that copies that are sharded in
another way are the same base. The hash is one that every Python brings along.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlink.tensors import Header, Role, TensorError, TensorSpec, check_spec

BASE_KEY = "fedlink.base"
"""Key in a safetensors header's metadata under which the base that an adapter stands on is kept as JSON."""
BASE_DIGEST_SIZE = 32
"""Bytes in the digest of a tensor."""

_PEFT_PREFIX = "base_model.model."
_PEFT_WRAPPERS = frozenset({"base_layer", "original_module"})


@dataclass(frozen=True, slots=True)
class BaseTensor:
    """One tensor of a frozen base.

    Raises:
        TensorError: no valid tensor, or a digest of another length.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: bytes
    """See `fedlink.v1.Manifest.BaseTensor`."""

    def __post_init__(self) -> None:
        """Check it."""
        check_spec(self.spec)
        if len(self.digest) != BASE_DIGEST_SIZE:
            raise TensorError(f"base tensor {self.name!r} has a digest of {len(self.digest)} bytes", self.name)

    @property
    def spec(self) -> TensorSpec:
        """What it is."""
        return TensorSpec(self.name, self.dtype, self.shape, Role.FROZEN)


def base_tensor(spec: TensorSpec, data: Iterable[memoryview]) -> BaseTensor:
    """A base's tensor by its bytes, in windows of any size."""
    dimensions = ",".join(map(str, spec.shape))
    digest = hashlib.sha256(f"fedlink base 1\n{spec.name}\n{spec.dtype}\n{dimensions}\n".encode())
    for window in data:
        digest.update(window)
    return BaseTensor(spec.name, spec.dtype, spec.shape, digest.digest())


def base_name(name: str) -> str:
    """What a tensor of a model that peft has wrapped is called in the model itself; other names stay as they are."""
    parts = name.removeprefix(_PEFT_PREFIX).split(".")
    return ".".join(part for part in parts if part not in _PEFT_WRAPPERS)


def base_difference(own: Sequence[BaseTensor], wanted: Sequence[BaseTensor]) -> str:
    """How a base differs from the run's, in words that begin with the tensor; empty if it does not."""
    here = {t.name: t for t in own}
    for there in wanted:
        mine = here.pop(there.name, None)
        if mine is None:
            return f"tensor {there.name!r} is not in it"
        if (mine.dtype, mine.shape) != (there.dtype, there.shape):
            return f"tensor {there.name!r} is {_kind(mine)} here and {_kind(there)} in the run's"
        if mine.digest != there.digest:
            return f"tensor {there.name!r} has other values"
    return f"tensor {min(here)!r} is not in the run's" if here else ""


def base_to_json(base: Iterable[BaseTensor]) -> dict[str, list[Any]]:
    """A base as a JSON object; the order stays."""
    return {t.name: [t.dtype, list(t.shape), t.digest.hex()] for t in base}


def base_from_json(table: Mapping[str, Any]) -> tuple[BaseTensor, ...]:
    """What `base_to_json` gave.

    Raises:
        TensorError: it is malformed.
    """
    try:
        return tuple(
            BaseTensor(name, str(dtype), tuple(map(int, shape)), bytes.fromhex(digest))
            for name, (dtype, shape, digest) in table.items()
        )
    except (AttributeError, TypeError, ValueError) as e:
        if isinstance(e, TensorError):
            raise
        raise TensorError(f"the list of the base's tensors is malformed: {e}") from None


def base_metadata(base: Sequence[BaseTensor]) -> dict[str, str]:
    """Header metadata that names the base; empty if there is none."""
    return {BASE_KEY: json.dumps(base_to_json(base))} if base else {}


def read_base(header: Header) -> tuple[BaseTensor, ...]:
    """The base that a file's metadata names; empty if it names none.

    Raises:
        TensorError: the metadata is malformed.
    """
    try:
        table = json.loads(header.metadata.get(BASE_KEY, "{}"))
    except (ValueError, RecursionError) as e:
        raise TensorError(f"metadata {BASE_KEY!r} is malformed: {e}") from None
    return base_from_json(table)


def _kind(tensor: BaseTensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
