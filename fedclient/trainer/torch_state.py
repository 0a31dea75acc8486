"""A torch module's tensors. The only module of the runtime that imports torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedclient.trainer.state import WINDOW, ModelMismatchError, Start, check_gradient
from fedclient.trainer.wire import Write
from fedlink.tensors import DTYPES, Role, TensorSpec, windows

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""Every dtype of safetensors that torch computes with."""
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class TorchState:
    """A `torch.nn.Module`: exactly what its `state_dict` holds."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._trainable = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
        kept = self._tensors()
        self._unkept = {name: b.clone() for name, b in model.named_buffers() if name not in kept}

    def specs(self) -> tuple[list[TensorSpec], dict[str, str]]:
        """See `State`."""
        specs, aliases = [], {}
        seen: dict[object, str] = {}
        for name, tensor in self._tensors().items():
            if (first := seen.setdefault(_identity(tensor), name)) != name:
                aliases[name] = first
                continue
            if tensor.dtype not in _NAMES:
                raise ModelMismatchError(f"tensor {name!r} is {tensor.dtype}, which safetensors cannot hold")
            dtype = _NAMES[tensor.dtype]
            if tensor.requires_grad and not DTYPES[dtype].floating:
                raise ModelMismatchError(
                    f"tensor {name!r} of {tensor.dtype} cannot be trained here; split it or freeze it"
                )
            role = Role.BUFFER
            if isinstance(tensor, torch.nn.Parameter):
                role = Role.PARAMETER if tensor.requires_grad else Role.FROZEN
            specs.append(TensorSpec(name, dtype, tuple(tensor.shape), role))
        return specs, aliases

    def begin(self, *, training: bool, device: str, frozen: Collection[str]) -> None:
        """See `State`."""
        self._model.to(device)
        self._model.train(training)
        self._model.zero_grad(set_to_none=True)
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(self._trainable.get(name, parameter.requires_grad) and name not in frozen)
        buffers = dict(self._model.named_buffers())
        for name, value in self._unkept.items():
            if name in buffers:
                buffers[name].copy_(value)

    def assign(self, spec: TensorSpec, names: Sequence[str], raw: npt.NDArray[Any]) -> None:
        """See `State`."""
        tensors = self._tensors()
        target = tensors[spec.name]
        if any(_identity(tensors[name]) != _identity(target) for name in names):
            raise ModelMismatchError(f"the run ties {', '.join(names)}; the model that build_model returned does not")
        with torch.no_grad():
            target.copy_(_decode(raw, spec.dtype).reshape(spec.shape))

    def marks(self, names: Sequence[str]) -> object:
        """See `State`: where the bytes lie, and torch's count of writes in place."""
        tensors = self._tensors()
        found = [tensors[name] for name in names if name in tensors]
        return len(found), [(t.data_ptr(), t._version) for t in found]  # noqa: SLF001 - documented, without a public name

    def encoded(
        self, spec: TensorSpec, write: Write, dtype: str, start: Start, gradient: Mapping[str, Any] | None
    ) -> Iterator[memoryview]:
        """See `State`."""
        tensor = self._current(spec)
        changes = spec.is_delta and write is not Write.WEIGHTS
        if changes and write is Write.GRADIENT:
            found = tensor.grad if gradient is None else gradient.get(spec.name)
            tensor = torch.zeros(()).expand(spec.shape) if found is None else found
            check_gradient(spec, tensor.shape)
        wide = torch.float64 if spec.dtype == "F64" else torch.float32
        flat = tensor.detach().reshape(-1)
        for first, count in windows(spec.elements, WINDOW):
            part = flat[first : first + count].to("cpu")
            if changes:
                part = part.to(wide)
                if write is Write.DELTA:
                    part = part - _decode(start(first, count), spec.dtype).to(wide)
                part = part.to(TORCH_DTYPES[dtype])
            yield _encode(part)

    def evaluating(self) -> AbstractContextManager[object]:
        """See `State`: no gradients are tracked."""
        return torch.no_grad()

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = self._model.state_dict(keep_vars=True)
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
                raise ModelMismatchError(f"{name!r} in the model's state_dict is not a dense tensor with values")
        return tensors

    def _current(self, spec: TensorSpec) -> torch.Tensor:
        tensor = self._tensors().get(spec.name)
        if tensor is None or _NAMES.get(tensor.dtype) != spec.dtype or tuple(tensor.shape) != spec.shape:
            found = "gone" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ModelMismatchError(f"after training {spec.name!r} is {found}, it was {spec.dtype} {spec.shape}")
        return tensor


def best_device() -> str:
    """The accelerator torch finds, or "cpu"."""
    if torch.cuda.is_available():
        return "cuda:0"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def accelerators() -> list[tuple[str, str, int]]:
    """Name, product and bytes of memory of each CUDA device."""
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append((f"cuda:{i}", str(properties.name), int(properties.total_memory)))
    return found


def _identity(tensor: torch.Tensor) -> object:
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _decode(raw: npt.NDArray[Any], dtype: str) -> torch.Tensor:
    if raw.size == 0:
        return torch.empty(0, dtype=TORCH_DTYPES[dtype])
    flat = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
    return torch.from_numpy(flat).view(TORCH_DTYPES[dtype])


def _encode(part: torch.Tensor) -> memoryview:
    # A single element of an expanded tensor has stride 0 and counts as contiguous, but cannot be viewed as bytes.
    if part.stride(0) != 1:
        part = part.clone(memory_format=torch.contiguous_format)
    array: npt.NDArray[Any] = part.view(torch.uint8).numpy()
    return array.data
