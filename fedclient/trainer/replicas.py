"""Several processes with a whole model each: their gradients are made one after every backward pass.

The module stays the user's own: hooks on its parameters see when a backward pass ends, and the
gradients are then replaced by their weighted mean over the ranks, the same bits everywhere.
What had been added up before is the same at every rank already, so accumulation needs nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist

from fedclient.trainer.torch_state import give_torch_random, take_torch_random

_BUCKET = 32 << 20
"""Bytes that are exchanged at a time, or one gradient if it is larger."""


class Rank(Protocol):
    """What is used of `fedclient.trainer.ranks.Ranks`."""

    rank: int
    world_size: int
    weight: float

    def meet(self) -> None:
        """Say that this rank waits for the others."""
        ...


class Job(Protocol):
    """What is used of the job's context."""

    device: str
    seed: int

    @property
    def step(self) -> int:
        """Steps finished so far."""
        ...


class RanksDifferError(RuntimeError):
    """The ranks' models are not the same after training; the text says what to do."""


class Replicas:
    """Holds while a model is trained, one copy at each rank.

    Args:
        model: the user's module, as it was built and loaded at each rank.
        ranks: this process among the others.
        job: its context.
    """

    def __init__(self, model: torch.nn.Module, ranks: Rank, job: Job) -> None:
        self._model = model
        self._ranks = ranks
        self._parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
        self._draws = OwnDraws(model, ranks.rank, job)
        self._hooks: list[Any] = []
        self._queued = False

    def __enter__(self) -> Self:
        """Watch backward passes."""
        self._hooks = [p.register_post_accumulate_grad_hook(self._accumulated) for p in self._parameters]
        self._draws.begin()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Let the model be, and see that it is the same everywhere.

        Raises:
            RanksDifferError: it is not.
        """
        for hook in self._hooks:
            hook.remove()
        self._draws.end()
        if kind is None:
            check_same(self._model, self._ranks.world_size)

    def _accumulated(self, _: torch.Tensor) -> None:
        if not self._queued:
            self._queued = True
            # What DDP and FSDP do, too: torch has no public name for the end of a backward pass.
            torch.autograd.Variable._execution_engine.queue_callback(self._exchange)  # noqa: SLF001

    def _exchange(self) -> None:
        self._queued = False
        self._ranks.meet()
        device = self._parameters[0].device
        have = torch.tensor([p.grad is not None for p in self._parameters], dtype=torch.uint8, device=device)
        dist.all_reduce(have, dist.ReduceOp.MAX)
        # A parameter that no rank has used keeps none, as with one process.
        used = [p for p, some in zip(self._parameters, have.tolist(), strict=True) if some]
        for bucket in _buckets(used):
            _average(bucket, self._ranks.weight)


class OwnDraws:
    """Other random numbers at each rank inside of the model, for dropout; the same ones outside, for the data's order.

    They depend on the job, the rank and the step alone, so that a training that goes on draws what it would have drawn.
    """

    def __init__(self, model: torch.nn.Module, rank: int, job: Job) -> None:
        self._model = model
        self._rank = rank
        self._job = job
        self._own: tuple[int, Any] | None = None
        self._outer: Any = None
        self._depth = 0
        self._hooks: list[Any] = []

    def begin(self) -> None:
        """Watch forward passes."""
        self._hooks = [
            self._model.register_forward_pre_hook(self._enter),
            self._model.register_forward_hook(self._leave, always_call=True),
        ]

    def end(self) -> None:
        """Watch them no more."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, *_: object) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self._outer = take_torch_random(self._job.device)
        if self._own is not None and self._own[0] == self._job.step:
            give_torch_random(self._own[1], self._job.device)
        else:
            text = f"{self._job.seed}/{self._rank}/{self._job.step}".encode()
            torch.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1)

    def _leave(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._own = self._job.step, take_torch_random(self._job.device)
            give_torch_random(self._outer, self._job.device)


def check_same(model: torch.nn.Module, world_size: int) -> None:
    """See that what trains is the same at every rank.

    Raises:
        RanksDifferError: naming the first parameter that is not.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        return
    # Bits, not numbers: NaN is unlike itself.
    sums = torch.stack([p.detach().double().sum() for _, p in named]).view(torch.int64)
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    for (name, _), same in zip(named, (low == high).tolist(), strict=True):
        if not same:
            raise RanksDifferError(
                f"{name!r} is not the same in all {world_size} processes after training: train what requires a "
                "gradient when train begins, by backward() and an optimizer, and draw random numbers from ctx.rng "
                "and ctx.generator alone; or say processes = 1 in [distributed] of site.toml"
            )


def _buckets(parameters: list[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    bucket: list[torch.nn.Parameter] = []
    size = 0
    for parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        if bucket and (size + parameter.nbytes > _BUCKET or kind != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket


def _average(bucket: list[torch.nn.Parameter], weight: float) -> None:
    """Replace the gradients of some parameters by their weighted mean over all ranks."""
    first = bucket[0]
    wide = torch.float64 if first.dtype is torch.float64 else torch.float32
    flat = torch.zeros(sum(p.numel() for p in bucket), dtype=wide, device=first.device)
    parts = torch.split(flat, [p.numel() for p in bucket])
    for parameter, part in zip(bucket, parts, strict=True):
        # What counts for nothing may be NaN all the same.
        if parameter.grad is not None and weight:
            if parameter.grad.layout is not torch.strided:
                raise RuntimeError("sparse gradients cannot be added up over processes: say sparse=False")
            part.copy_(parameter.grad.reshape(-1)).mul_(weight)
    dist.all_reduce(flat)
    for parameter, part in zip(bucket, parts, strict=True):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.copy_(part.reshape(parameter.shape))
