"""A torch module's tensors. The only module of the runtime that imports torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedclient.trainer.memory import NUMBERED
from fedclient.trainer.nested import CannotHoldError, Leaf, Source
from fedclient.trainer.state import WINDOW, Fill, ModelMismatchError, Start, check_gradient
from fedclient.trainer.wire import Write
from fedlink.base import BaseTensor, base_name, base_tensor
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
_ORIGINALS = "fedlink_originals"
"""Attribute of a module with parameters of a frozen base that are held in another form: what they were, by name."""
_HASHED = 1 << 20
"""Elements that are hashed at a time."""
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class TorchState:
    """A `torch.nn.Module`: exactly what its `state_dict` holds, without a frozen base.

    Args:
        model: the module.
        names: under which other names tensors of its `state_dict` travel.
        frozen_base: whether parameters that require no gradient are the site's own.

    Raises:
        ModelMismatchError: two tensors would travel under one name, or `names` has one that is not there.
    """

    def __init__(
        self, model: torch.nn.Module, names: Mapping[str, str] | None = None, *, frozen_base: bool = False
    ) -> None:
        self._model = model
        self._trainable = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
        kept = model.state_dict(keep_vars=True)
        self._base = frozenset(n for n in kept if frozen_base and not self._trainable.get(n, True))
        self._beside = frozenset(_beside(model, kept)) if frozen_base else frozenset[str]()
        self._originals: dict[str, BaseTensor] = {
            f"{path}.{name}": original
            for path, module in model.named_modules()
            for name, original in getattr(module, _ORIGINALS, {}).items()
        }
        self._names = dict(names or {})
        self._at_rest: dict[str, torch.Tensor] | None = None
        _check_names(self._names, kept, self._base | self._beside)
        self._tensors()
        self._unkept = {name: b.clone() for name, b in model.named_buffers() if name not in kept}
        self._frozen: Collection[str] = ()

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
        self._frozen = frozen
        self._model.to(device)
        self._model.train(training)
        self._model.zero_grad(set_to_none=True)
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(
                self._trainable.get(name, parameter.requires_grad) and self._names.get(name, name) not in frozen
            )
        buffers = dict(self._model.named_buffers())
        for name, value in self._unkept.items():
            if name in buffers:
                buffers[name].copy_(value)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """See `State`: walking through the modules of a large model takes long."""
        self._at_rest = self._tensors()
        try:
            yield
        finally:
            self._at_rest = None

    def assign(self, spec: TensorSpec, names: Sequence[str], fill: Fill) -> None:
        """See `State`."""
        tensors = self._tensors()
        target = tensors[spec.name]
        if any(_identity(tensors[name]) != _identity(target) for name in names):
            raise ModelMismatchError(f"the run ties {', '.join(names)}; the model that build_model returned does not")
        with torch.no_grad():
            self._fill(target, spec, fill)

    def _fill(self, target: torch.Tensor, spec: TensorSpec, fill: Fill) -> None:
        fill_tensor(target, spec, fill)

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
            found = (
                tensor.grad if gradient is None else gradient.get(spec.name, gradient.get(self._own_name(spec.name)))
            )
            tensor = torch.zeros(()).expand(spec.shape) if found is None else found
            check_gradient(spec, tensor.shape)
        wide = torch.float64 if spec.dtype == "F64" else torch.float32
        buffer, first = torch.empty(min(WINDOW, spec.elements), dtype=wide), 0
        for window in self._windows(tensor, WINDOW):
            part, count = window, len(window)
            if changes:
                part = part.to(wide)
                if write is Write.DELTA:
                    part = torch.sub(part, _decode(start(first, count), spec.dtype).to(wide), out=buffer[:count])
                part = part.to(TORCH_DTYPES[dtype])
            first += count
            yield encode(part)

    def _windows(self, tensor: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
        """A tensor's elements on the CPU, so many at a time."""
        flat = tensor.detach().reshape(-1)
        for first, count in windows(flat.numel(), size):
            yield flat[first : first + count].to("cpu")

    def _own_name(self, name: str) -> str:
        """What `state_dict` calls a tensor that travels under another name."""
        return next((own for own, travelling in self._names.items() if travelling == name), name)

    def evaluating(self) -> AbstractContextManager[object]:
        """See `State`: no gradients are tracked."""
        return torch.no_grad()

    def parts(self) -> dict[str, Any]:
        """See `State`: tensors, gradients, other buffers, what is trainable and what is in training mode."""
        tensors = self._tensors()
        seen = {_identity(tensors[name]) for name in self._frozen if name in tensors}
        parts: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if _identity(tensor) not in seen:
                seen.add(_identity(tensor))
                parts[f"tensors/{name}"] = tensor
        buffers = dict(self._model.named_buffers())
        parts |= {f"buffers/{name}": buffers[name] for name in self._unkept if name in buffers}
        parameters = dict(self._model.named_parameters())
        parts |= {f"gradients/{name}": p.grad for name, p in parameters.items() if p.grad is not None}
        parts["trainable"] = [name for name, p in parameters.items() if p.requires_grad]
        parts["training"] = [name for name, module in self._model.named_modules() if module.training]
        return parts

    def base(self) -> Iterator[BaseTensor | tuple[TensorSpec, Iterator[memoryview]]]:
        """See `State`; what peft keeps of a module that is trained in its place is not part of it."""
        replaced, seen = {base_name(name) for name in self._tensors()}, set()
        for name, tensor in self._base_tensors():
            called, identity = base_name(self._names.get(name, name)), _identity(tensor)
            if called in replaced or identity in seen:
                continue
            seen.add(identity)
            if name in self._originals:
                yield self._originals[name]
                continue
            if tensor.dtype not in _NAMES:
                raise ModelMismatchError(f"tensor {name!r} of the base is {tensor.dtype}, which cannot be named")
            yield TensorSpec(called, _NAMES[tensor.dtype], tuple(tensor.shape), Role.FROZEN), _stored(tensor.detach())

    def base_marks(self) -> object:
        """See `State`."""
        return [(t.data_ptr(), t._version) for _, t in self._base_tensors()]  # noqa: SLF001 - as in `marks`

    def _base_tensors(self) -> list[tuple[str, torch.Tensor]]:
        tensors = self._model.state_dict(keep_vars=True) if self._base else {}
        return [(name, tensor) for name, tensor in tensors.items() if name in self._base]

    def container(self) -> None:
        """See `State`: tensors are given their values in place."""

    def restore(self, parts: Mapping[str, Any]) -> None:
        """See `State`."""
        named = self._tensors()
        buffers, parameters = dict(self._model.named_buffers()), dict(self._model.named_parameters())
        self._model.zero_grad(set_to_none=True)
        for part in parts:
            kind, _, name = part.partition("/")
            if kind in ("tensors", "buffers"):
                copy_tensor((named if kind == "tensors" else buffers)[name], parts[part])
            elif kind == "gradients":
                parameters[name].grad = _cut_like(parameters[name], parts[part]).to(parameters[name].device)
        trainable, training = set(parts["trainable"]), set(parts["training"])
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trainable)
        for name, module in self._model.named_modules():
            module.training = name in training

    def _tensors(self) -> dict[str, torch.Tensor]:
        if self._at_rest is not None:
            return self._at_rest
        tensors = {n: t for n, t in self._model.state_dict(keep_vars=True).items() if n not in self._beside}
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
                raise ModelMismatchError(f"{name!r} in the model's state_dict is not a dense tensor with values")
        return {self._names.get(name, name): tensor for name, tensor in tensors.items() if name not in self._base}

    def _current(self, spec: TensorSpec) -> torch.Tensor:
        tensor = self._tensors().get(spec.name)
        if tensor is None or _NAMES.get(tensor.dtype) != spec.dtype or tuple(tensor.shape) != spec.shape:
            found = "gone" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ModelMismatchError(f"after training {spec.name!r} is {found}, it was {spec.dtype} {spec.shape}")
        return tensor


def keep_original(module: torch.nn.Module, parameter: str, called: str, original: torch.Tensor) -> None:
    """Note on a module what a frozen parameter was before it was quantized: the run's base is named by that.

    Args:
        module: the parameter's own.
        parameter: its name in there.
        called: what the model calls it.
        original: its values as they were.
    """
    spec = TensorSpec(called, _NAMES[original.dtype], tuple(original.shape), Role.FROZEN)
    noted: dict[str, BaseTensor] = getattr(module, _ORIGINALS, {})
    setattr(module, _ORIGINALS, noted | {parameter: base_tensor(spec, _stored(original))})


def copied(model: torch.nn.Module) -> Callable[[], None]:
    """Copy what may change of a module: parameters that require a gradient, buffers, and whether it is in train mode.

    Returns:
        What brings all of it back in place, and clears gradients.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    # Of what is cut up, this process' share.
    held: list[Any] = [*trained, *model.buffers()]
    own: list[torch.Tensor] = [t.detach().to_local() if is_cut(t) else t for t in held]
    # Not where they lie: an accelerator's memory is what is short.
    copies = [(t, t.detach().to("cpu", copy=True)) for t in own]
    modes = [(module, module.training) for module in model.modules()]

    def bring_back() -> None:
        # What was gathered for a forward pass would be taken for the weights.
        for module in model.modules() if any(map(is_cut, trained)) else ():
            if callable(drop := getattr(module, "reshard", None)):
                drop()
        for tensor, copy in copies:
            copy_tensor(tensor, copy)
        for module, mode in modes:
            module.training = mode
        model.zero_grad(set_to_none=True)

    return bring_back


def best_device() -> str:
    """The accelerator torch finds, or "cpu"."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "cpu"
    return accelerator.type if accelerator.type == "mps" else f"{accelerator.type}:0"


def accelerators() -> list[tuple[str, str, int]]:
    """Name, product and bytes of memory of each accelerator that torch knows by number."""
    kind = best_device().partition(":")[0]
    if kind not in NUMBERED:
        return []
    found = []
    for i in range(torch.accelerator.device_count()):
        properties: Any = torch.get_device_module(kind).get_device_properties(i)
        found.append((f"{kind}:{i}", str(properties.name), int(properties.total_memory)))
    return found


def _beside(model: torch.nn.Module, kept: Iterable[str]) -> Iterator[str]:
    """What a `state_dict` holds of quantized parameters besides themselves, such as scales: of no use without them."""
    quantized = {n.rpartition(".")[0] for n, p in model.named_parameters() if not p.dtype.is_floating_point}
    if not quantized:
        return
    held = {
        name for named in (model.named_parameters, model.named_buffers) for name, _ in named(remove_duplicate=False)
    }
    for name in kept:
        parts = name.split(".")
        if name not in held and any(".".join(parts[:n]) in quantized for n in range(len(parts))):
            yield name


def _check_names(names: Mapping[str, str], kept: Mapping[str, object], base: Collection[str]) -> None:
    if unknown := sorted(names.keys() - kept.keys()):
        raise ModelMismatchError(f"tensor_names names {unknown[0]!r}, which the model's state_dict does not hold")
    seen: dict[str, str] = {}
    for name in kept:
        travelling = names.get(name, name)
        if name not in base and (first := seen.setdefault(travelling, name)) != name:
            raise ModelMismatchError(f"{first!r} and {name!r} would both travel as {travelling!r}; see tensor_names")


def _stored(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in row-major order, window by window, wherever and however it lies in memory."""
    if tensor.is_contiguous() or tensor.dim() == 1:
        flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor
        for first, count in windows(flat.numel(), _HASHED):
            yield encode(flat[first : first + count].to("cpu"))
    else:
        for row in tensor:
            yield from _stored(row)


def _identity(tensor: torch.Tensor) -> object:
    # What several processes share has no place of its own.
    if tensor.numel() == 0 or is_cut(tensor):
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def fill_tensor(target: torch.Tensor, spec: TensorSpec, fill: Fill) -> None:
    """Give a tensor its bytes, without a second copy of it where it lies in memory as it lies in the file."""
    if not target.numel():
        return
    own = target.detach().reshape(-1)
    if target.device.type == "cpu" and target.is_contiguous() and own.stride(0) == 1:
        fill(encode(own), 0)
        return
    dtype, at = TORCH_DTYPES[spec.dtype], 0
    flat = target.reshape(-1) if target.is_contiguous() else torch.empty(spec.elements, dtype=dtype)
    window = np.empty(WINDOW * dtype.itemsize, np.uint8)
    for first, count in windows(spec.elements, WINDOW):
        part = window[: count * dtype.itemsize]
        fill(part.data, at)
        at += len(part)
        flat[first : first + count].copy_(_decode(part, spec.dtype))
    if not target.is_contiguous():
        target.copy_(flat.reshape(spec.shape))


def _decode(raw: npt.NDArray[Any], dtype: str) -> torch.Tensor:
    if raw.size == 0:
        return torch.empty(0, dtype=TORCH_DTYPES[dtype])
    flat = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
    return torch.from_numpy(flat).view(TORCH_DTYPES[dtype])


def encode(part: torch.Tensor) -> memoryview:
    """The bytes of a flat tensor on the CPU."""
    # A single element of an expanded tensor has stride 0 and counts as contiguous, but cannot be viewed as bytes.
    if part.stride(0) != 1:
        part = part.clone(memory_format=torch.contiguous_format)
    array: npt.NDArray[Any] = part.view(torch.uint8).numpy()
    return array.data


@dataclass(frozen=True)
class TensorLeaf:
    """A tensor on its way into a checkpoint: `flat` is its elements in the order in which they lie in memory."""

    flat: torch.Tensor
    dtype: str
    shape: tuple[int, ...]

    def views(self) -> Iterator[memoryview]:
        """See `nested.Leaf`."""
        for first, count in windows(self.flat.numel(), WINDOW):
            yield encode(self.flat[first : first + count].to("cpu"))


def flatten_torch(value: Any, where: str, leaves: list[Leaf]) -> Any:
    """The node of a tensor, for `nested.flatten`.

    Raises:
        CannotHoldError: no plain dense tensor, or of a dtype that safetensors cannot hold.
    """
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if is_cut(value):
        from fedclient.trainer.sharded import SharedLeaf  # noqa: PLC0415 - there are such tensors, so it is there

        leaves.append(SharedLeaf(value, _NAMES[value.dtype], tuple(value.shape)))
        return {"tensor": len(leaves) - 1, "accelerator": value.device.type != "cpu"}
    tensor = value.detach().resolve_conj().resolve_neg()
    plain = type(value) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
    if not plain or tensor.dtype not in _NAMES:
        kind = type(value).__name__ if type(value) is not torch.Tensor else f"{tensor.layout} {tensor.dtype} tensor"
        raise CannotHoldError(f"{where} is a {kind}, which a checkpoint cannot hold")
    shape = tuple(tensor.shape)
    node: dict[str, Any] = {"tensor": len(leaves), "accelerator": tensor.device.type != "cpu"}
    if not tensor.is_contiguous() and _is_dense(tensor):
        # Kernels differ by layout to the last bit, so it is kept; and without a copy in between.
        node |= {"shape": list(shape), "strides": list(tensor.stride())}
        shape = (tensor.numel(),)
        tensor = tensor.as_strided(shape, (1,))
    leaves.append(TensorLeaf(tensor.reshape(-1), _NAMES[tensor.dtype], shape))
    return node


def rebuild_torch(node: Mapping[str, Any], source: Source) -> Any:
    """What `flatten_torch` took apart."""
    if "size" in node:
        return torch.Size(node["size"])
    number = node["tensor"]
    dtype, shape = source.leaf(number)
    mapped = source.mapped(number)
    if mapped is not None and shape:
        return _decode(mapped, dtype).reshape(shape)
    # torch's own memory: it is aligned as that of any other tensor.
    tensor = torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    if tensor.numel():
        array: npt.NDArray[Any] = tensor.reshape(-1).view(torch.uint8).numpy()
        source.fill(number, array.data)
    if "strides" in node:
        tensor = tensor.as_strided(node["shape"], node["strides"])
    return tensor.to(source.device) if node["accelerator"] else tensor


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer its state, each tensor in the dtype it had: torch's own method casts it to the parameter's."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        if is_cut(parameter) and number in state["state"]:
            values = state["state"][number]
            state["state"][number] = {key: _cut_like(parameter, value) for key, value in values.items()}
    optimizer.load_state_dict(state)
    for number, parameter in zip(numbers, parameters, strict=True):
        held = optimizer.state.get(parameter, {})
        for key, value in state["state"].get(number, {}).items():
            if isinstance(value, torch.Tensor) and held[key].dtype != value.dtype:
                held[key] = value


def copy_tensor(target: torch.Tensor, value: torch.Tensor) -> None:
    """Give a tensor another's value, in place.

    Raises:
        ValueError: they differ in dtype or shape.
    """
    if (value.dtype, value.shape) != (target.dtype, target.shape):
        raise ValueError(f"it was {value.dtype} {list(value.shape)}, it is {target.dtype} {list(target.shape)}")
    with torch.no_grad():
        target.copy_(_cut_like(target, value))


def is_cut(value: object) -> bool:
    """Whether it is a tensor of which each process holds a part: a `DTensor`, which is imported where there are any."""
    return isinstance(value, torch.Tensor) and hasattr(value, "placements")


def _cut_like(target: torch.Tensor, value: Any) -> Any:
    if not is_cut(target) or is_cut(value) or not isinstance(value, torch.Tensor):
        return value
    from fedclient.trainer.sharded import cut_like  # noqa: PLC0415 - as in `flatten_torch`

    return cut_like(target, value)


def take_torch_random(device: str) -> dict[str, torch.Tensor]:
    """The states of torch's generators: the CPU's, and the job's accelerator's."""
    state = {"cpu": torch.get_rng_state()}
    if (module := _device_module(device)) is not None:
        state["accelerator"] = module.get_rng_state(*_number(device))
    return state


def give_torch_random(state: Mapping[str, torch.Tensor], device: str) -> None:
    """Set torch's generators to states that `take_torch_random` gave."""
    torch.set_rng_state(state["cpu"])
    module = _device_module(device)
    if "accelerator" in state and module is not None:
        module.set_rng_state(state["accelerator"], *_number(device))


def _device_module(device: str) -> Any:
    kind = device.partition(":")[0]
    return None if kind == "cpu" else torch.get_device_module(kind)


def _number(device: str) -> tuple[str, ...]:
    """A device as its module's functions take it, where there may be several."""
    return (device,) if device.partition(":")[0] in NUMBERED else ()


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether every place between its first and its last element in memory is one element of it."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return tensor.numel() > 0
