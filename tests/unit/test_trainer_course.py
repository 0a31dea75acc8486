"""Trainings with any loops, interrupted anywhere: they give the bits of one that was not."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedclient.trainer import Context
from tests.support.interrupted import MEMORY, Interrupted, Run


@dataclass(frozen=True)
class Plan:
    """A loop, the loops in each of its passes, and whether they come before or after the pass's own work."""

    kind: str
    n: int
    epochs: int
    inner: tuple[Plan, ...] = ()


LEAF = st.builds(
    Plan, st.sampled_from(["steps", "batches", "stream", "refilled"]), st.integers(0, 4), st.integers(1, 3)
)
PLANS = st.lists(
    st.recursive(
        LEAF,
        lambda inner: st.builds(
            Plan, st.just("steps"), st.integers(0, 3), st.just(1), st.lists(inner, max_size=2).map(tuple)
        ),
        max_leaves=4,
    ),
    min_size=1,
    max_size=3,
)


class Data:
    """Batches in an order that is drawn anew each epoch, changed by draws as they are taken."""

    def __init__(self, n: int, rng: np.random.Generator) -> None:
        self.n = n
        self.rng = rng

    def __iter__(self):
        for i in self.rng.permutation(self.n):
            yield i + np.random.random() + self.rng.random()  # noqa: NPY002

    def __len__(self) -> int:
        return self.n


class Stream:
    """The same without a length."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __iter__(self):
        return iter(self.data)


class Training:
    """Works through plans, each step drawing from every generator; raises at the steps of `ends`."""

    def __init__(self, plans: list[Plan], end: int | None = None) -> None:
        self.plans = plans
        self.left = end
        self.steps = 0

    def __call__(self, model: dict[str, Any], ctx: Context) -> None:
        self.ctx, self.model = ctx, model
        self.rng, self.own = ctx.rng(), np.random.default_rng(3)
        self.memory: dict[str, Any] = {"seen": 0, "sum": 0.0, "last": []}
        ctx.keep(memory=self.memory, own=self.own)
        self.weights = model["w"]
        for i, plan in enumerate(self.plans):
            between = ctx.rng(i)
            self.go(plan, between)
        ctx.num_examples = self.memory["seen"]

    def go(self, plan: Plan, between: np.random.Generator) -> None:
        data = Data(plan.n, self.rng)
        if plan.kind == "steps":
            passes = self.ctx.steps(plan.n)
        elif plan.kind == "refilled":
            passes = self.ctx.batches(data, steps=plan.epochs * plan.n)
        else:
            passes = self.ctx.batches(data if plan.kind == "batches" else Stream(data), epochs=plan.epochs)
        for item in passes:
            self.steps += 1
            if self.left is not None and self.steps > self.left:
                raise Interrupted
            fresh = self.ctx.rng(99).random()
            drawn = item + fresh + np.random.normal() + random.random()  # noqa: NPY002
            drawn += self.rng.random() + self.own.random() + between.random()
            self.weights += np.float32(drawn)
            self.model["v"] = self.model["v"] * np.float32(0.9) + np.float32(drawn)
            self.memory["seen"] += 1
            self.memory["sum"] += drawn
            self.memory["last"] = [*self.memory["last"][-2:], drawn]
            self.ctx.log(loss=drawn)
            for inner in plan.inner:
                self.go(inner, between)


def build() -> dict[str, Any]:
    return {"w": np.ones(3, np.float32), "v": np.zeros((2, 2), np.float32)}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PLANS, st.lists(st.integers(0, 12), max_size=3))
def test_interrupted_anywhere_it_gives_the_same_bits(plans: list[Plan], ends: list[int]) -> None:
    whole = Training(plans)
    undisturbed = Run(Path(), build, whole, every=0)
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        for end in [*ends, None]:
            training = Training(plans, end)
            run = Run(Path(directory), build, training)
            assert not run.unusable, run.notes
            if not run.interrupted:
                break
        assert run.weights == undisturbed.weights
        assert training.memory == whole.memory
        assert (run.ctx.step, run.ctx.metrics) == (undisturbed.ctx.step, undisturbed.ctx.metrics)
        assert training.own.random() == whole.own.random()


def run_after(directory: Path, plans: list[Plan], end: int) -> tuple[Run, Training]:
    """Interrupt a training in a step, and go on."""
    assert Run(directory, build, Training(plans, end)).interrupted
    training = Training(plans)
    return Run(directory, build, training), training


@pytest.mark.parametrize("kind", ["steps", "batches", "stream", "refilled"])
def test_what_was_done_is_not_done_again(tmp_path: Path, kind: str) -> None:
    run, training = run_after(tmp_path, [Plan("steps", 3, 1), Plan(kind, 4, 2)], 6)
    assert training.steps == run.ctx.step - 6
    assert run.notes == ["resumed from a local checkpoint"]
    note = next(report for report in run.reports if report.note)
    assert (note.step, note.total) == (6, {"steps": 7, "stream": 3}.get(kind, 11))


def test_in_a_loop_within_a_loop_only_its_step_is_begun_again(tmp_path: Path) -> None:
    plans = [Plan("steps", 3, 1, (Plan("steps", 2, 1), Plan("batches", 4, 1)))]
    # Two passes of 1 + 2 + 4 steps, then the outer one's, both of the first inner loop and one of the second.
    _, training = run_after(tmp_path, plans, 14 + 4)
    assert training.steps == 1 + 3


def test_within_a_batch_it_waits_for_the_next_one(tmp_path: Path) -> None:
    def train(model: Any, ctx: Context, end: int) -> int:
        done = 0
        for batch in ctx.batches(range(4)):
            for i in ctx.steps(3):
                if (batch, i) == divmod(end, 3):
                    raise Interrupted
                model["w"] += batch + i
                done += 1
        return done

    done = []
    assert Run(tmp_path, build, lambda model, ctx: train(model, ctx, 8)).interrupted
    run = Run(tmp_path, build, lambda model, ctx: done.append(train(model, ctx, 99)))
    undisturbed = Run(tmp_path, build, lambda model, ctx: train(model, ctx, 99), every=0)
    assert done == [6], "the batch that was under way is begun again, and no other"
    assert run.weights == undisturbed.weights


def test_loops_that_run_into_each_other_are_not_kept(tmp_path: Path) -> None:
    def train(model: Any, ctx: Context) -> None:
        for a, b in zip(ctx.steps(5), ctx.steps(5), strict=True):
            model["w"] += a * b

    run = Run(tmp_path, build, train)
    assert run.notes == [
        "there are no local checkpoints of this training: two loops over ctx.steps or ctx.batches run into each other"
    ]
    assert list(tmp_path.iterdir()) == []
    assert np.frombuffer(run.weights["w"], np.float32).tolist() == [31.0] * 3


STEPS = Plan("steps", 5, 1)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([STEPS], [Plan("steps", 6, 1)]),
        ([STEPS], [Plan("batches", 5, 1)]),
        ([Plan("steps", 2, 1), STEPS], [Plan("steps", 2, 1), Plan("steps", 3, 1), STEPS]),
        ([Plan("steps", 3, 1, (STEPS,))], [Plan("steps", 3, 1)]),
        ([Plan("batches", 5, 1)], [Plan("batches", 2, 1)]),
    ],
)
def test_other_loops_than_before_begin_anew(tmp_path: Path, before: list[Plan], after: list[Plan]) -> None:
    assert Run(tmp_path, build, Training(before, 4)).interrupted
    run = Run(tmp_path, build, Training(after))
    assert run.unusable
    assert "training begins at the round's start" in run.notes[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.unusable"]


def test_fewer_data_than_before_begin_anew(tmp_path: Path) -> None:
    assert Run(tmp_path, build, Training([Plan("stream", 5, 1)], 4)).interrupted
    assert Run(tmp_path, build, Training([Plan("stream", 2, 1)])).unusable


def test_an_abandoned_loop_is_over(tmp_path: Path) -> None:
    def train(model: Any, ctx: Context, end: int) -> None:
        for i in ctx.steps(10):
            model["w"] += i
            if i == 2:
                break
        for i in ctx.steps(4):
            if i == end:
                raise Interrupted
            model["w"] *= 2

    assert Run(tmp_path, build, lambda model, ctx: train(model, ctx, 2)).interrupted
    run = Run(tmp_path, build, lambda model, ctx: train(model, ctx, 9))
    assert run.notes == ["resumed from a local checkpoint"]
    assert run.weights == Run(tmp_path, build, lambda model, ctx: train(model, ctx, 9), every=0).weights


def test_nothing_is_written_when_it_is_not_time(tmp_path: Path) -> None:
    assert Run(tmp_path, build, Training([Plan("steps", 5, 1)], 4), every=1000).interrupted
    assert list(tmp_path.iterdir()) == []


def test_without_batches_there_are_no_steps_to_take() -> None:
    with pytest.raises(ValueError, match="no batches"):
        list(Context(settings=None).batches([], steps=3))
    assert list(Context(settings=None).batches([])) == []


def test_a_rehearsal_takes_few_batches() -> None:
    ctx = Context(settings=None, max_steps=2)
    assert list(ctx.batches([1, 2, 3])) == [1, 2]
    assert list(ctx.batches([1], steps=9)) == [1, 1]


def test_saving_changes_nothing(tmp_path: Path) -> None:
    plans = [Plan("batches", 4, 2), Plan("steps", 3, 1)]
    saving = Run(tmp_path, build, Training(plans))
    assert (tmp_path / "checkpoint.safetensors").exists()
    assert saving.weights == Run(tmp_path, build, Training(plans), every=0).weights
