"""Several processes with a share of the model each (FSDP2): cut up, loaded and written piece by piece.

A model is built without values (`fedclient.trainer.without_values`) and cut up; only then there is
memory for this rank's rows, which it reads from the run's files. An update goes to rank 0 window by window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fedclient.trainer.memory import keep_whole
from fedclient.trainer.replicas import Job, OwnDraws
from fedclient.trainer.state import WINDOW, Fill
from fedclient.trainer.torch_state import TorchState, encode, fill_tensor
from fedlink.tensors import TensorSpec

_SENT = 1 << 20
"""Elements that are sent to rank 0 at a time."""


class Rank(Protocol):
    """What is used of `fedclient.trainer.ranks.Ranks`."""

    rank: int
    world_size: int
    weight: float


def shard(model: torch.nn.Module, world_size: int, device: str) -> int:
    """Cut a model up, in place: each block by itself, so that no more than one is whole at a time.

    Returns how many blocks it has: none means that it is whole at each forward pass.

    Args:
        model: as built, with or without values.
        world_size: among how many.
        device: where this rank's share goes.
    """
    mesh = init_device_mesh(device.partition(":")[0], (world_size,))
    if device == "cpu":
        # Else the C library keeps what was gathered once, and the whole model and more is held in the end.
        keep_whole()
    parts = blocks(model)
    for block in parts:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                if id(parameter) not in made:
                    values = torch.empty_like(parameter, device=device)
                    made[id(parameter)] = torch.nn.Parameter(values, requires_grad=parameter.requires_grad)
                setattr(module, name, made[id(parameter)])
    return len(parts)


def blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The parts of a model that are gathered one at a time.

    Those that transformers never splits, by the names of their classes; else the members of its lists of modules.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList | torch.nn.Sequential)]
        found = [member for members in lists for member in members]
    found = [module for module in found if module is not model and any(True for _ in module.parameters())]
    inner = {id(part) for module in found for part in module.modules() if part is not module}
    return [module for module in found if id(module) not in inner]


class ShardedState(TorchState):
    """A model that `shard` cut up; its tensors are addressed as whole ones.

    Every rank goes through the same tensors in the same order. Rank 0 is given the bytes; the others give theirs.
    """

    def __init__(
        self, model: torch.nn.Module, names: Mapping[str, str], ranks: Rank, *, frozen_base: bool = False
    ) -> None:
        super().__init__(model, names, frozen_base=frozen_base)
        self._ranks = ranks

    def marks(self, names: Sequence[str]) -> object:  # noqa: ARG002 - torch counts no writes to shards
        """See `State`."""
        return None

    def base_marks(self) -> object:
        """See `State`: where the shards lie; writes to them are not counted."""
        return [_local(t).data_ptr() for _, t in self._base_tensors()]

    def _fill(self, target: torch.Tensor, spec: TensorSpec, fill: Fill) -> None:
        if not isinstance(target, DTensor):
            fill_tensor(target, spec, fill)
            return
        own, row = _local(target), spec.nbytes // spec.shape[0] if spec.shape[0] else 0
        first, last = rows(spec.shape[0], self._ranks.rank, self._ranks.world_size)
        assert own.shape[0] == last - first, "torch cuts tensors up in another way than it did"
        part = TensorSpec(spec.name, spec.dtype, tuple(own.shape), spec.role)
        fill_tensor(own, part, lambda view, at: fill(view, first * row + at))

    def _windows(self, tensor: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
        if isinstance(tensor, DTensor):
            yield from gathered(tensor, size)
        elif self._ranks.rank == 0:
            yield from super()._windows(tensor, size)


def gathered(tensor: DTensor, size: int) -> Iterator[torch.Tensor]:
    """A whole tensor's elements on the CPU, so many at a time, at rank 0; the others must do it too, and get none."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = _local(tensor.detach()).reshape(-1)
    row = tensor.numel() // tensor.shape[0] if tensor.shape[0] else 0
    left = torch.empty(0, dtype=tensor.dtype)
    for other in range(world_size):
        first, last = rows(tensor.shape[0], other, world_size)
        count = (last - first) * row
        for at in range(0, count, _SENT):
            piece = _sent(own, other, at, min(_SENT, count - at))
            if rank == 0:
                # Windows go on over the borders between ranks.
                left = torch.cat([left, piece]) if len(left) else piece
                whole = len(left) - len(left) % size
                yield from torch.split(left[:whole], size) if whole else ()
                left = left[whole:]
    if len(left):
        yield left


def _sent(own: torch.Tensor, rank: int, at: int, count: int) -> torch.Tensor:
    """A piece of a rank's rows, sent to rank 0."""
    if rank == dist.get_rank():
        piece = own[at : at + count].to("cpu").contiguous()
        if rank:
            dist.send(piece.view(torch.uint8), 0)
        return piece
    piece = torch.empty(count if dist.get_rank() == 0 else 0, dtype=own.dtype)
    if dist.get_rank() == 0:
        dist.recv(piece.view(torch.uint8), rank)
    return piece


def cut_like(tensor: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A rank's share of a whole tensor, as another one is shared; the whole one, if that is not.

    Args:
        tensor: what it is to be like.
        whole: the same at every rank; it may lie in a file.
    """
    if not isinstance(tensor, DTensor) or tensor.shape != whole.shape:
        return whole
    first, last = rows(whole.shape[0], dist.get_rank(), dist.get_world_size())
    own = torch.empty_like(_local(tensor), dtype=whole.dtype)
    own.copy_(whole[first:last])
    cut: torch.Tensor = DTensor.from_local(
        own, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return cut


@dataclass(frozen=True)
class SharedLeaf:
    """A tensor that is cut up, on its way into a checkpoint: all ranks must go through its views."""

    tensor: DTensor
    dtype: str
    shape: tuple[int, ...]

    def views(self) -> Iterator[memoryview]:
        """See `nested.Leaf`; rank 0 alone is given any."""
        return (encode(part) for part in gathered(self.tensor, WINDOW))


def rows(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """The first of a rank's rows of a tensor, and the one after its last: as torch cuts it up."""
    size = -(-count // world_size)
    return min(rank * size, count), min((rank + 1) * size, count)


def _local(tensor: Any) -> torch.Tensor:
    own: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own


class Shards:
    """Holds while a model is trained that is cut up; torch adds the gradients up.

    Args:
        model: the module.
        ranks: this process among the others.
        job: its context.
    """

    def __init__(self, model: torch.nn.Module, ranks: Rank, job: Job) -> None:
        self._ranks = ranks
        self._draws = OwnDraws(model, ranks.rank, job)
        self._model = model
        self._hook: Any = None

    def __enter__(self) -> Self:
        """Watch forward passes."""
        self._hook = self._model.register_forward_hook(self._weigh)
        self._draws.begin()
        return self

    def __exit__(self, *_: object) -> None:
        """Watch them no more."""
        self._hook.remove()
        self._draws.end()

    def _weigh(self, _model: object, _inputs: object, outputs: Any) -> Any:
        # torch takes the plain mean over the ranks: one with a smaller part has smaller gradients.
        factor = self._ranks.weight * self._ranks.world_size
        return outputs if factor == 1 else _weighed(outputs, factor)


class _Weighed(torch.autograd.Function):
    """The same value, with a gradient that counts otherwise."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return (gradients[0] * ctx.factor if ctx.factor else torch.zeros_like(gradients[0])), None


def _weighed(thing: Any, factor: float) -> Any:
    if isinstance(thing, torch.Tensor):
        return _Weighed.apply(thing, factor) if thing.requires_grad else thing  # type: ignore[no-untyped-call]
    if isinstance(thing, Mapping):
        items = {key: _weighed(item, factor) for key, item in thing.items()}
        return items if type(thing) is dict else type(thing)(**items)
    if isinstance(thing, tuple | list):
        parts = [_weighed(item, factor) for item in thing]
        return type(thing)(*parts) if hasattr(thing, "_fields") else type(thing)(parts)
    return thing
