"""A model's tensors, in and out: the seam between files and whatever `build_model` returned."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedclient.trainer.aliases import bring_back
from fedclient.trainer.wire import Write
from fedlink.base import BaseTensor
from fedlink.tensors import (
    DTYPES,
    Role,
    TensorSpec,
    arithmetic_dtype,
    dtype_name,
    raw_bytes,
    windows,
)

WINDOW = 1 << 16
"""Elements that are converted at a time: all buffers of a window stay in the processor's cache."""

Start = Callable[[int, int], npt.NDArray[Any]]
"""Reads elements `(first, count)` of a tensor's value before training, in its raw dtype; good until the next call."""
Fill = Callable[[memoryview, int], None]
"""Fills a buffer with the bytes of a tensor from an offset on."""


class ModelMismatchError(ValueError):
    """The model that `build_model` returned is not the one in the run's files; the message names the tensor."""


class State(Protocol):
    """The tensors of one built model.

    Tensors are addressed by name; every window is of the flattened tensor.
    """

    def specs(self) -> tuple[list[TensorSpec], dict[str, str]]:
        """What the model holds now, each tied tensor once, and the other names of the tied ones.

        Raises:
            ModelMismatchError: something in it is not a tensor that safetensors can hold.
        """
        ...

    def begin(self, *, training: bool, device: str, frozen: Collection[str]) -> None:
        """Undo what an earlier job may have left behind besides values, and make ready for the next."""
        ...

    def at_rest(self) -> AbstractContextManager[object]:
        """Holds while nothing but this object changes the model: which tensors there are is found out only once."""
        ...

    def assign(self, spec: TensorSpec, names: Sequence[str], fill: Fill) -> None:
        """Give a tensor its value, and tie `names` (the first is the tensor's own)."""
        ...

    def marks(self, names: Sequence[str]) -> object:
        """A value that is different once any of the tensors was written to, or None if that cannot be known."""
        ...

    def encoded(
        self, spec: TensorSpec, write: Write, dtype: str, start: Start, gradient: Mapping[str, Any] | None
    ) -> Iterator[memoryview]:
        """The bytes of a tensor as it travels, window by window; each is good until the next one is asked for.

        Args:
            spec: the tensor in the model.
            write: what to write if it `is_delta`; other tensors are written as values.
            dtype: the dtype to write in.
            start: reads the value before training.
            gradient: what `Workload.gradient` returned.

        Raises:
            ModelMismatchError: training has changed the tensor's dtype or shape, or removed it.
        """
        ...

    def evaluating(self) -> AbstractContextManager[object]:
        """Holds while the model is measured."""
        ...

    def parts(self) -> Mapping[str, Any]:
        """What a checkpoint must hold of the model, by a name of its own: live values, no copies; nothing frozen.

        Raises:
            ModelMismatchError: something in it cannot be held.
        """
        ...

    def base(self) -> Iterator[BaseTensor | tuple[TensorSpec, Iterator[memoryview]]]:
        """The frozen base, each tied tensor once: what it is called there, and its bytes in windows.

        What is held in another form than the run's base, such as quantized, is named already.

        Raises:
            ModelMismatchError: a tensor of it is none that safetensors can hold.
        """
        ...

    def base_marks(self) -> object:
        """A value that is different once a tensor of the base was written to or replaced."""
        ...

    def container(self) -> dict[str, Any] | None:
        """What holds the tensors by name, and what training may put others in; None if they stay the model's own."""
        ...

    def restore(self, parts: Mapping[str, Any]) -> None:
        """Bring back what `parts` gave, one at a time, in place.

        Raises:
            ValueError, KeyError: it is not this model's.
        """
        ...


def state_of(model: object, names: Mapping[str, str] | None = None, *, frozen_base: bool = False) -> State:
    """The tensors of what `build_model` returned.

    Args:
        model: what it returned.
        names: as of `Workload.tensor_names`.
        frozen_base: as of `Workload`.

    Raises:
        ModelMismatchError: neither a torch module nor a dict of numpy arrays, or the names are not its.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        from fedclient.trainer.torch_state import TorchState  # noqa: PLC0415 - imports torch

        return TorchState(model, names or {}, frozen_base=frozen_base)
    if isinstance(model, dict):
        if names or frozen_base:
            raise ModelMismatchError("frozen_base and tensor_names are for torch modules; this model is a dict")
        return NumpyState(model)
    raise ModelMismatchError(
        f"build_model returned {type(model).__name__}; it must be a torch.nn.Module or a dict of numpy arrays"
    )


def check_gradient(spec: TensorSpec, shape: Sequence[int]) -> None:
    """Refuse a gradient of another shape than its parameter.

    Raises:
        ModelMismatchError: naming the parameter.
    """
    if tuple(shape) != spec.shape:
        raise ModelMismatchError(f"the gradient of {spec.name!r} has the shape {list(shape)}, not {list(spec.shape)}")


def to_bfloat16(values: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """The bits of float32 values rounded to bfloat16 (to nearest, ties to even), by numpy alone."""
    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


_NO_ARRAY: npt.NDArray[Any] = np.empty(0, np.void)


def _usable(array: object, spec: TensorSpec) -> bool:
    """Whether an array can take a tensor's bytes as they are."""
    if type(array) is not np.ndarray or array.shape != spec.shape or array.dtype != arithmetic_dtype(spec.dtype):
        return False
    return array.flags.owndata and array.flags.c_contiguous and array.flags.writeable


class NumpyState:
    """A dict of numpy arrays; a name whose array is replaced in training is taken as it is afterwards.

    Floating arrays are parameters, all others buffers. Names of the very same array are tied.
    """

    def __init__(self, arrays: dict[str, Any]) -> None:
        self._arrays = arrays
        self._frozen: Collection[str] = ()

    def specs(self) -> tuple[list[TensorSpec], dict[str, str]]:
        """See `State`."""
        specs, aliases, seen = [], {}, dict[int, str]()
        for name, array in self._arrays.items():
            if not isinstance(name, str) or not isinstance(array, np.ndarray):
                raise ModelMismatchError(f"{name!r} of the model is {type(array).__name__}, not a numpy array")
            if (first := seen.setdefault(id(array), name)) != name:
                aliases[name] = first
                continue
            dtype = dtype_name(array.dtype)
            role = Role.PARAMETER if DTYPES[dtype].floating else Role.BUFFER
            specs.append(TensorSpec(name, dtype, array.shape, role))
        return specs, aliases

    def begin(self, *, training: bool, device: str, frozen: Collection[str]) -> None:  # noqa: ARG002 - torch's alone
        """Nothing to undo: `assign` gives every array its value."""
        self._frozen = frozen

    def at_rest(self) -> AbstractContextManager[object]:
        """See `State`: a dict is looked up quickly anyway."""
        return nullcontext()

    def assign(self, spec: TensorSpec, names: Sequence[str], fill: Fill) -> None:
        """See `State`. The array that is there is used again, unless somebody besides the model holds it."""
        array: npt.NDArray[Any] = self._arrays.get(names[0], _NO_ARRAY)
        alone = all(array is self._arrays.get(name) for name in names)
        # The model's own references, this variable, and the call's argument; a slice of it would be one more.
        if not alone or sys.getrefcount(array) > len(names) + 2 or not _usable(array, spec):
            array = np.empty(spec.shape, arithmetic_dtype(spec.dtype))
        fill(array.reshape(-1).view(np.uint8).data, 0)
        for name in names:
            self._arrays[name] = array

    def marks(self, names: Sequence[str]) -> object:  # noqa: ARG002 - numpy counts no writes
        """See `State`: numpy cannot know."""
        return None

    def encoded(
        self, spec: TensorSpec, write: Write, dtype: str, start: Start, gradient: Mapping[str, Any] | None
    ) -> Iterator[memoryview]:
        """See `State`."""
        value = self._current(spec)
        if not spec.is_delta or write is Write.WEIGHTS:
            yield raw_bytes(value)
            return
        wide = np.dtype(np.float64 if spec.dtype == "F64" else np.float32)
        if write is Write.GRADIENT:
            found = None if gradient is None else gradient.get(spec.name)
            value = np.broadcast_to(wide.type(0), spec.shape) if found is None else np.asarray(found, wide)
            check_gradient(spec, value.shape)
        flat, own = value.reshape(-1), arithmetic_dtype(spec.dtype)
        buffer = np.empty(min(WINDOW, spec.elements), wide)
        for first, count in windows(spec.elements, WINDOW):
            part, after = buffer[:count], flat[first : first + count]
            if write is Write.DELTA:
                # Both sides in the wide dtype: in a narrow one the difference would be rounded before it is one.
                before = start(first, count).view(own).astype(wide, copy=False)
                np.subtract(after.astype(wide, copy=False), before, out=part)
            else:
                np.copyto(part, after, casting="unsafe")
            yield raw_bytes(to_bfloat16(part) if dtype == "BF16" else part.astype(arithmetic_dtype(dtype), copy=False))

    def evaluating(self) -> AbstractContextManager[object]:
        """See `State`."""
        return nullcontext()

    def parts(self) -> dict[str, Any]:
        """See `State`: every array, and which of them are one."""
        seen = {id(self._arrays.get(name)): "" for name in self._frozen}
        parts, same = dict[str, Any](), dict[str, str]()
        for name, array in self._arrays.items():
            first = seen.setdefault(id(array), name)
            if first not in ("", name):
                same[name] = first
            elif first:
                parts[f"arrays/{name}"] = array
        return parts | {"same": same}

    def base(self) -> Iterator[BaseTensor | tuple[TensorSpec, Iterator[memoryview]]]:
        """See `State`: there is none."""
        return iter(())

    def base_marks(self) -> None:
        """See `State`."""

    def container(self) -> dict[str, Any]:
        """See `State`."""
        return self._arrays

    def restore(self, parts: Mapping[str, Any]) -> None:
        """See `State`."""
        for part in parts:
            kind, _, name = part.partition("/")
            if kind == "arrays":
                self._arrays[name] = bring_back(self._arrays[name], parts[part])
        for name, first in parts["same"].items():
            self._arrays[name] = self._arrays[first]

    def _current(self, spec: TensorSpec) -> npt.NDArray[Any]:
        value = np.asarray(self._arrays.get(spec.name))
        found = value.dtype.name, value.shape
        wanted = arithmetic_dtype(spec.dtype).name, spec.shape
        if found != wanted:
            raise ModelMismatchError(
                f"after training {spec.name!r} is {found[0]} {found[1]}, it was {wanted[0]} {wanted[1]}; keep its dtype"
            )
        return value
