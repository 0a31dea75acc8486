"""Nested state as JSON and arrays: what `state_dict` of an optimizer or a scheduler gives, without pickle.

A value becomes a node of JSON. None, booleans, texts, numbers and lists are themselves;
everything else is an object whose first key says what it is:

    {"tuple": [...]}  {"dict": [[key, value], ...]}  {"array": 0}  {"tensor": 1, ...}  {"int": "0x..."}

Arrays and tensors are leaves, counted from 0; the node holds their number and the file
their bytes (`fedclient.trainer.checkpoint`).
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedlink.tensors import TensorError, arithmetic_dtype, dtype_name, raw_bytes

MAX_DEPTH = 64
"""How deep a value may be nested; what holds itself is deeper than anything."""
_MAX_JSON_INT = 1 << 63


class CannotHoldError(TypeError):
    """A value that is neither plain data nor an array; the message says where it is and what."""


class Leaf(Protocol):
    """An array or a tensor on its way into a file; it refers to the value, it holds no copy."""

    @property
    def dtype(self) -> str:
        """Its safetensors dtype."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        ...

    def views(self) -> Iterator[memoryview]:
        """Its bytes, one part after the other."""
        ...


class Source(Protocol):
    """Where the leaves of one value are read from."""

    @property
    def device(self) -> str:
        """Where tensors go that were on an accelerator."""
        ...

    def leaf(self, number: int) -> tuple[str, tuple[int, ...]]:
        """A leaf's dtype and shape."""
        ...

    def mapped(self, number: int) -> npt.NDArray[Any] | None:
        """A leaf's bytes where they lie in the file; None: they are to be read."""
        ...

    def fill(self, number: int, view: memoryview) -> None:
        """Read a leaf's bytes."""
        ...


@dataclass(frozen=True)
class Flat:
    """A value taken apart."""

    node: Any
    """JSON."""
    leaves: Sequence[Leaf]

    @property
    def text(self) -> str:
        """The node as text: equal texts and equal leaves mean equal values."""
        return json.dumps(self.node, allow_nan=False)


@dataclass(frozen=True)
class ArrayLeaf:
    """A numpy array."""

    array: npt.NDArray[Any]
    dtype: str
    shape: tuple[int, ...]

    def views(self) -> Iterator[memoryview]:
        """See `Leaf`."""
        yield raw_bytes(self.array)


def flatten(value: Any, where: str) -> Flat:
    """Take a value apart.

    Args:
        value: plain data, arrays and tensors, nested in lists, tuples, sets, deques and dicts.
        where: what to call it in an error.

    Raises:
        CannotHoldError: there is something else in it.
    """
    leaves: list[Leaf] = []
    return Flat(_node(value, where, leaves, 0), leaves)


def rebuild(node: Any, source: Source) -> Any:
    """Put a value together again.

    Raises:
        ValueError, KeyError, TypeError: the node is none that `flatten` gives.
        OSError: its leaves cannot be read.
    """
    if isinstance(node, list):
        return [rebuild(item, source) for item in node]
    if not isinstance(node, dict):
        return node
    return _BUILD[next(iter(node))](node, source)


def _node(value: Any, where: str, leaves: list[Leaf], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise CannotHoldError(f"{where[:200]}... is nested more than {MAX_DEPTH} deep")
    kind = type(value)
    if kind in _PLAIN:
        return _PLAIN[kind](value)
    if kind in _SEQUENCES:
        items = [_node(item, f"{where}[{i}]", leaves, depth + 1) for i, item in enumerate(value)]
        return _SEQUENCES[kind](value, items)
    if kind in (dict, OrderedDict, Counter):
        keys = [_node(key, f"a key of {where}", leaves, depth + 1) for key in value]
        values = [_node(item, f"{where}[{key!r:.40}]", leaves, depth + 1) for key, item in value.items()]
        # A torch module's state_dict holds the versions of its layers in an attribute.
        metadata = getattr(value, "_metadata", None)
        extra = {} if metadata is None else {"metadata": _node(metadata, f"the metadata of {where}", leaves, depth + 1)}
        return {kind.__name__: list(zip(keys, values, strict=True)), **extra}
    return _leaf(value, where, leaves)


def _plain_float(value: float) -> Any:
    return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}


def _build_mapping(node: Any, source: Source) -> Any:
    kind, pairs = next(iter(node.items()))
    built = {rebuild(key, source): rebuild(value, source) for key, value in pairs}
    mapping = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}[kind](built)
    if "metadata" in node:
        vars(mapping)["_metadata"] = rebuild(node["metadata"], source)
    return mapping


def _build_torch(node: Any, source: Source) -> Any:
    from fedclient.trainer.torch_state import rebuild_torch  # noqa: PLC0415 - imports torch

    return rebuild_torch(node, source)


def _leaf(value: Any, where: str, leaves: list[Leaf]) -> Any:
    if type(value) is np.ndarray or isinstance(value, np.generic):
        return _array_node(value, where, leaves)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor | torch.Size):
        from fedclient.trainer.torch_state import flatten_torch  # noqa: PLC0415 - imports torch

        return flatten_torch(value, where, leaves)
    raise CannotHoldError(
        f"{where} is {_article(type(value).__name__)}, which a checkpoint cannot hold: numbers, texts, lists, tuples, "
        "sets, dicts, arrays and tensors can be kept"
    )


def _array_node(value: Any, where: str, leaves: list[Leaf]) -> Any:
    array = np.asarray(value)
    try:
        dtype = dtype_name(array.dtype)
    except TensorError:
        dtype = ""
    if not dtype or not array.dtype.isnative:
        raise CannotHoldError(f"{where} is an array of {array.dtype.str}, which a checkpoint cannot hold")
    turned = array.flags.f_contiguous and not array.flags.c_contiguous
    stored = array.T if turned else array
    leaves.append(ArrayLeaf(stored, dtype, stored.shape))
    if isinstance(value, np.generic):
        return {"scalar": len(leaves) - 1}
    # Sums depend on the layout to the last bit.
    return {"array": len(leaves) - 1, **({"order": "F"} if turned else {})}


def _read_array(number: int, order: str, source: Source) -> npt.NDArray[Any]:
    dtype, shape = source.leaf(number)
    array = np.empty(shape, np.complex64 if dtype == "C64" else arithmetic_dtype(dtype))
    source.fill(number, array.reshape(-1).view(np.uint8).data)
    return array.T if order == "F" else array


def _article(name: str) -> str:
    return f"an {name}" if name[:1] in "aeiouAEIOU" else f"a {name}"


_PLAIN: Mapping[type, Callable[[Any], Any]] = {
    type(None): lambda _: None,
    bool: bool,
    str: str,
    int: lambda value: value if abs(value) < _MAX_JSON_INT else {"int": hex(value)},
    float: _plain_float,
    bytes: lambda value: {"bytes": value.hex()},
}
# Sets in an order of their own: that of a set of texts differs from process to process.
_SEQUENCES: Mapping[type, Callable[[Any, list[Any]], Any]] = {
    list: lambda _, items: items,
    tuple: lambda _, items: {"tuple": items},
    deque: lambda value, items: {"deque": items, "maxlen": value.maxlen},
    set: lambda _, items: {"set": sorted(items, key=json.dumps)},
    frozenset: lambda _, items: {"frozenset": sorted(items, key=json.dumps)},
}
_BUILD: Mapping[str, Callable[[Any, Source], Any]] = {
    "tuple": lambda node, source: tuple(rebuild(node["tuple"], source)),
    "deque": lambda node, source: deque(rebuild(node["deque"], source), node["maxlen"]),
    "set": lambda node, source: set(rebuild(node["set"], source)),
    "frozenset": lambda node, source: frozenset(rebuild(node["frozenset"], source)),
    "dict": _build_mapping,
    "OrderedDict": _build_mapping,
    "Counter": _build_mapping,
    "int": lambda node, _: int(node["int"], 16),
    "float": lambda node, _: struct.unpack(">d", bytes.fromhex(node["float"]))[0],
    "bytes": lambda node, _: bytes.fromhex(node["bytes"]),
    "array": lambda node, source: _read_array(node["array"], node.get("order", "C"), source),
    "scalar": lambda node, source: _read_array(node["scalar"], "C", source)[()],
    "tensor": _build_torch,
    "size": _build_torch,
}
