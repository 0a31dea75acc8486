"""What a checkpoint keeps of real optimizers and models, and what becomes of one that is no good."""

from __future__ import annotations

import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from fedclient.trainer import Context
from fedclient.trainer.checkpoint import NAME
from tests.support.interrupted import Interrupted, Run

Train = Callable[[Any, Context], None]


def numbers(end: int | None = None) -> Train:
    """A little numpy training that ends in a step."""

    def train(model: Any, ctx: Context) -> None:
        velocity = np.zeros(4)
        ctx.keep(velocity=velocity)
        for i in ctx.steps(6):
            if i == end:
                raise Interrupted
            velocity *= 0.9
            velocity += np.random.random(4)  # noqa: NPY002
            model["w"] -= velocity

    return train


def zeros() -> dict[str, Any]:
    return {"w": np.zeros(4)}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums by several threads may differ from one time to the next."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("written")
    Run(directory, zeros, numbers(4))
    return (directory / NAME).read_bytes()


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, bytes]:
    return Run(Path(), zeros, numbers(), every=0).weights


def test_it_is_there_and_good(tmp_path: Path, written: bytes, undisturbed: dict[str, bytes]) -> None:
    (tmp_path / NAME).write_bytes(written)
    run = Run(tmp_path, zeros, numbers())
    assert run.notes == ["resumed from a local checkpoint"]
    assert run.weights == undisturbed
    assert (tmp_path / NAME).stat().st_mode & 0o077 == 0
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_one_is_put_aside(
    tmp_path: Path, written: bytes, undisturbed: dict[str, bytes], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(written) - 1))
    bad = bytearray(written)
    if data.draw(st.booleans()):
        bad = bad[:at]
    else:
        bad[at] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / NAME).write_bytes(bad)
    run = Run(tmp_path, zeros, numbers(), every=1000)
    assert run.weights == undisturbed
    header = 8 + int.from_bytes(written[:8], "little")
    if run.notes != ["resumed from a local checkpoint"] or at >= header:  # blanks and the order in the header are free
        (note,) = run.notes
        assert note.startswith("training begins at the round's start: the local checkpoint is damaged")
        assert (tmp_path / "checkpoint.unusable").read_bytes() == bad
        assert not (tmp_path / NAME).exists()


def test_another_job_s_is_deleted(tmp_path: Path, written: bytes, undisturbed: dict[str, bytes]) -> None:
    (tmp_path / NAME).write_bytes(written)
    run = Run(tmp_path, zeros, numbers(), every=1000, owner="another")
    assert run.notes == ["training begins at the round's start: the local checkpoint was another job's"]
    assert run.weights == undisturbed
    assert list(tmp_path.iterdir()) == []


def test_other_things_kept_than_before(tmp_path: Path, written: bytes) -> None:
    def train(model: Any, ctx: Context) -> None:
        ctx.keep(**things)
        for _ in ctx.steps(6):
            raise AssertionError("nothing was brought back")

    for things in (
        {},
        {"velocity": np.zeros(4), "more": [1]},
        {"velocity": np.zeros(5)},
        {"velocity": np.random.default_rng()},
    ):
        (tmp_path / NAME).write_bytes(written)
        assert Run(tmp_path, zeros, train).unusable, things


def test_what_is_not_brought_back_exactly_is_not_gone_on_from(tmp_path: Path) -> None:
    class Forgetful:
        def __init__(self) -> None:
            self.count = 0.1

        def state_dict(self) -> dict[str, float]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, float]) -> None:
            self.count = float(np.float32(state["count"]))

    def train(model: Any, ctx: Context, end: int) -> None:
        thing = Forgetful()
        ctx.keep(thing=thing)
        for i in ctx.steps(5):
            if i == end:
                raise Interrupted
            thing.count += 0.1

    Run(tmp_path, zeros, lambda model, ctx: train(model, ctx, 3))
    run = Run(tmp_path, zeros, lambda model, ctx: train(model, ctx, 9))
    assert run.unusable
    assert "ctx.keep(thing=...): its state: load_state_dict did not bring back" in run.notes[-1]


def test_a_disk_that_refuses_is_told_once_and_does_no_harm(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        run = Run(tmp_path, zeros, numbers())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    (note,) = run.notes
    assert note.startswith("a checkpoint could not be written: File too large")
    assert run.weights == undisturbed
    assert list(tmp_path.iterdir()) == []


def test_room_for_the_update_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(_: Path) -> Any:
        return type("Usage", (), {"free": 3000})

    monkeypatch.setattr("fedclient.trainer.checkpoint.shutil.disk_usage", usage)
    run = Run(tmp_path, zeros, numbers())
    assert [note.partition(";")[0] for note in run.notes] == [
        "a checkpoint could not be written: No space left on device"
    ]


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (3, r"ctx.keep\(x=\.\.\.\): int cannot be kept"),
        (random.SystemRandom(), "SystemRandom cannot be kept"),
        ([print], r"ctx.keep\(x=\.\.\.\): its state\[0\] is a builtin_function"),
        (np.broadcast_to(np.zeros(1), 3), "ndarray cannot be kept"),
    ],
    ids=["number", "system", "function", "fixed"],
)
def test_what_cannot_be_kept_is_said_at_once(thing: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        Context(settings=None).keep(x=thing)


class Failing:
    """Its state can be taken once."""

    def __init__(self) -> None:
        self.asked = 0

    def state_dict(self) -> dict[str, int]:
        self.asked += 1
        if self.asked > 1:
            raise LookupError("patient 4711")
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.asked = state["asked"]


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        ({}, "ctx.keep(thing=...): its state['last'] is a PosixPath, which a checkpoint cannot hold"),
        (Failing(), "ctx.keep(thing=...): its state could not be taken: LookupError"),
    ],
    ids=["path", "raises"],
)
def test_a_state_that_can_no_longer_be_held_is_told_once_and_does_no_harm(
    tmp_path: Path, thing: Any, text: str
) -> None:
    def train(model: Any, ctx: Context) -> None:
        ctx.keep(thing=thing)
        for i in ctx.steps(5):
            model["w"] += 1
            if i == 1 and isinstance(thing, dict):
                thing["last"] = tmp_path

    run = Run(tmp_path / "checkpoints", zeros, train)
    (note,) = run.notes
    assert note.startswith(f"a checkpoint could not be written: {text}")
    assert "4711" not in note
    assert run.model["w"].tolist() == [5.0] * 4


def test_what_was_put_aside_is_there_until_the_next_is_written(tmp_path: Path, written: bytes) -> None:
    (tmp_path / NAME).write_bytes(written[:-1])
    Run(tmp_path, zeros, numbers(), every=1000)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.unusable"]
    Run(tmp_path, zeros, numbers())
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


def test_keep_belongs_before_the_loop() -> None:
    ctx = Context(settings=None)
    passes = ctx.steps(3)
    next(passes)
    ctx.keep(x=[])
    with pytest.raises(RuntimeError, match="inside of the loop"):
        next(passes)
    for _ in ctx.steps(2):
        ctx.keep(x=[])
        for _ in ctx.steps(2):
            pass


def test_arrays_put_in_place_of_others(tmp_path: Path) -> None:
    """What the user's code holds besides the model's dict stays what it is: the old array, or the one in use."""

    def train(model: Any, ctx: Context, end: int) -> None:
        start, used = model["replaced"], model["used"]
        for i in ctx.steps(5):
            if i == end:
                raise Interrupted
            model["replaced"] = model["replaced"] * 0.5 + start
            used += model["replaced"]
            model["tied"] += 1
            if i == 1:
                model["again"] = model["again"] * 2
            model["number"] = model["number"] - np.float64(0.25)

    def build() -> dict[str, Any]:
        tied = np.ones(2)
        return {"replaced": np.ones(2), "used": np.zeros(2), "tied": tied, "again": tied, "number": np.array(0.5)}

    undisturbed = Run(tmp_path, build, lambda model, ctx: train(model, ctx, 9), every=0)
    for end in (1, 3):
        directory = tmp_path / str(end)
        assert Run(directory, build, lambda model, ctx, end=end: train(model, ctx, end)).interrupted
        run = Run(directory, build, lambda model, ctx: train(model, ctx, 9))
        assert run.notes == ["resumed from a local checkpoint"]
        assert run.weights == undisturbed.weights


def every_generator(end: int | None) -> Train:
    def train(model: Any, ctx: Context) -> None:
        kept = {
            "old": np.random.RandomState(1),
            "python": random.Random(1),
            "torch": torch.Generator().manual_seed(3),
            "philox": np.random.Generator(np.random.Philox(2)),
            "mersenne": np.random.Generator(np.random.MT19937(2)),
            "sfc": np.random.Generator(np.random.SFC64(2)),
        }
        ctx.keep(**kept)
        mine, again = ctx.generator(), ctx.generator(1)
        for i in ctx.steps(6):
            if i == end:
                raise Interrupted
            drawn = [torch.rand(1, generator=g).item() for g in (None, kept["torch"], mine, again)]
            drawn += [g.normal() for g in (kept["old"], kept["philox"], kept["mersenne"], kept["sfc"])]
            drawn += [random.gauss(), kept["python"].gauss(), np.random.normal()]  # noqa: NPY002
            model["w"] *= 0.7
            model["w"] += sum(drawn)

    return train


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    assert Run(tmp_path, zeros, every_generator(3)).interrupted
    run = Run(tmp_path, zeros, every_generator(None))
    assert run.notes == ["resumed from a local checkpoint"]
    assert run.weights == Run(tmp_path, zeros, every_generator(None), every=0).weights


class Odd(nn.Module):
    """Layouts, dtypes, ties and buffers of every kind; every dtype of parameters takes part."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.turned = nn.Parameter(torch.randn(4, 16).t())
        self.small = nn.Parameter(torch.randn(4).to(torch.bfloat16))
        self.wide = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.tied = self.wide
        self.register_buffer("scratch", torch.zeros(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.scratch += 0.01
        x = self.drop(self.norm(self.conv(x))).flatten(1)[:, :16] @ self.turned
        return (x + self.small.float() + self.wide.float() + self.scratch).square().mean()


def torch_training(make: Callable[[Any], Any], end: int | None, schedule: Any = None) -> Train:
    """Three batches add up to one step of the optimizer: a checkpoint falls between them."""

    def train(model: Any, ctx: Context) -> None:
        optimizer = make(model.parameters())
        scheduler = schedule(optimizer) if schedule else None
        ctx.keep(optimizer=optimizer, **({"scheduler": scheduler} if scheduler else {}))
        data = torch.utils.data.TensorDataset(torch.linspace(-1, 1, 9 * 2 * 25).reshape(9, 2, 5, 5))
        loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
        for (x,) in ctx.batches(loader, epochs=2):
            i = ctx.step
            if i == end:
                raise Interrupted
            model(x).backward()
            if i == 5:
                model.norm.eval()
                model.small.requires_grad_(False)
            if i % 3 == 2:
                optimizer.step(lambda x=x: model(x))
                optimizer.zero_grad()
                if scheduler:
                    scheduler.step()

    return train


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    **{
        name: (lambda p, name=name: getattr(torch.optim, name)(p))
        for name in ("Adagrad", "RMSprop", "NAdam", "ASGD", "Adafactor")
    },
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_to_the_same_bits(tmp_path: Path, name: str) -> None:
    make = OPTIMIZERS[name]
    assert Run(tmp_path, Odd, torch_training(make, 7)).interrupted
    run = Run(tmp_path, Odd, torch_training(make, None), every=1000)
    assert run.notes == ["resumed from a local checkpoint"]
    assert run.weights == Run(tmp_path, Odd, torch_training(make, None), every=0).weights


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda i: 0.9**i),
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [1, 2, 2]),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on_to_the_same_bits(tmp_path: Path, name: str) -> None:
    make, schedule = OPTIMIZERS["momentum"], SCHEDULERS[name]
    assert Run(tmp_path, Odd, torch_training(make, 7, schedule)).interrupted
    run = Run(tmp_path, Odd, torch_training(make, None, schedule), every=1000)
    assert run.notes == ["resumed from a local checkpoint"]
    assert run.weights == Run(tmp_path, Odd, torch_training(make, None, schedule), every=0).weights


class Noisy(torch.utils.data.Dataset[torch.Tensor]):
    """What its workers draw is in the data."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> torch.Tensor:
        return i + torch.rand(3)


def with_workers(end: int | None, *, persistent: bool, own: bool) -> Train:
    def train(model: Any, ctx: Context) -> None:
        loader = torch.utils.data.DataLoader(
            Noisy(),
            batch_size=2,
            shuffle=True,
            num_workers=2,
            persistent_workers=persistent,
            generator=ctx.generator() if own else None,
        )
        for batch in ctx.batches(loader, epochs=2):
            if ctx.step == end:
                raise Interrupted
            model["w"] = model["w"] * 0.9 + batch.numpy().sum() + torch.rand(1).item()

    return train


@pytest.mark.parametrize(
    ("persistent", "own", "end", "resumed_at"),
    [(False, True, 5, 5), (False, False, 5, 5), (True, True, 2, 2), (True, False, 5, 3), (True, True, 5, 3)],
)
def test_workers_of_a_loader(tmp_path: Path, *, persistent: bool, own: bool, end: int, resumed_at: int) -> None:
    """Those that live on are known in their first epoch alone: what was saved in it is gone on from later, too."""
    first = Run(tmp_path, zeros, with_workers(end, persistent=persistent, own=own))
    assert first.interrupted
    ended = "no further local checkpoint of this training is written: a DataLoader with persistent_workers=True began"
    assert [note.startswith(ended) for note in first.notes] == [True] * (end > resumed_at)
    run = Run(tmp_path, zeros, with_workers(None, persistent=persistent, own=own), every=1000)
    assert run.weights == Run(tmp_path, zeros, with_workers(None, persistent=persistent, own=own), every=0).weights
    assert [report.step for report in run.reports if report.note == "resumed from a local checkpoint"] == [resumed_at]


def test_a_model_that_cannot_be_held_is_told_and_trained_all_the_same(tmp_path: Path) -> None:
    def train(model: Any, ctx: Context) -> None:
        for _ in ctx.steps(3):
            model["bits"].grad = torch.zeros(3).to_sparse()

    run = Run(tmp_path, lambda: nn.ParameterDict({"bits": nn.Parameter(torch.zeros(3))}), train)
    (note,) = run.notes
    assert "the model's gradients/bits is a torch.sparse_coo torch.float32 tensor" in note
    assert run.ctx.step == 3
