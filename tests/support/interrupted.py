"""A training in this process that ends in the middle and goes on from its checkpoint, as the worker does it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedclient.trainer import Context
from fedclient.trainer.checkpoint import Checkpoints, CheckpointUnusable
from fedclient.trainer.state import NumpyState, state_of
from fedclient.trainer.torch_state import encode
from fedclient.trainer.wire import Progress
from fedclient.trainer.worker import seed_everything
from fedlink.tensors import raw_bytes


def _filler(array: Any) -> Callable[[memoryview, int], None]:
    data = bytes(raw_bytes(array))

    def fill(view: memoryview, at: int) -> None:
        view[:] = data[at : at + len(view)]

    return fill


ALWAYS = 1e-9
"""Seconds between checkpoints: one before every step but the first."""


MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""A directory in memory: syncing hundreds of files there takes no time."""


class Interrupted(BaseException):
    """Where a test ends a training, as a kill would."""


class Run:
    """One process' try at a training.

    Args:
        directory: where the checkpoint lies.
        build: builds the model, as `build_model` does.
        train: as `Workload.train`.
        every: seconds between two checkpoints; 0: none.
        owner: the job.

    Attributes:
        model: as training left it.
        ctx: its context.
        notes: what the site's owner was told.
    """

    def __init__(
        self,
        directory: Path,
        build: Callable[[], Any],
        train: Callable[[Any, Context], None],
        *,
        every: float = ALWAYS,
        owner: str = "job",
    ) -> None:
        self.reports: list[Progress] = []
        seed_everything(1)
        self.model = build()
        self.state = state_of(self.model)
        self.ctx = Context(settings=None, seed=5, report=self.reports.append)
        specs, aliases = self.state.specs()
        self.state.begin(training=True, device="cpu", frozen=())
        if isinstance(self.state, NumpyState):
            for spec in specs:
                names = [spec.name, *(alias for alias, name in aliases.items() if name == spec.name)]
                array = self.model[spec.name]
                self.state.assign(spec, names, _filler(array))
        if every:
            checkpoints = Checkpoints(
                directory, owner=owner, every=every, state=self.state, device="cpu", say=self.ctx.note
            )
            checkpoints.look()
            self.ctx.use_checkpoints(checkpoints)
        seed_everything(9)
        self.interrupted = self.unusable = False
        try:
            train(self.model, self.ctx)
        except Interrupted:
            self.interrupted = True
        except CheckpointUnusable as e:
            self.unusable = True
            checkpoints.put_aside(str(e))

    @property
    def notes(self) -> list[str]:
        return [report.note for report in self.reports if report.note]

    @property
    def weights(self) -> dict[str, bytes]:
        if isinstance(self.state, NumpyState):
            return {name: raw_bytes(array).tobytes() for name, array in self.model.items()}
        tensors = {**self.model.state_dict(), **dict(self.model.named_buffers())}
        return {name: bytes(encode(tensor.detach().reshape(-1))) for name, tensor in tensors.items()}


def dying(found: Any, die_at: int | None, **given: Any) -> Callable[[Any, Context], None]:
    """A built-in workload's `train`, under these settings, that ends as the loss of batch `die_at` is computed."""
    done = 0

    def train(model: Any, ctx: Context) -> None:
        nonlocal done
        ctx.settings, ctx.round, ctx.rounds = found.Settings(**given), 1, 3
        one = found.summed_loss

        def summed_loss(*arguments: Any) -> Any:
            nonlocal done
            done += 1
            if done == die_at:
                raise Interrupted
            return one(*arguments)

        found.summed_loss = summed_loss
        found.train(model, ctx)

    return train
