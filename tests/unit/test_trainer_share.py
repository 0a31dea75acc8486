"""What a site gives in a round: where a training ends, also an interrupted one, and what it then weighs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedclient.trainer import Context
from fedclient.trainer import api as api_module
from fedclient.trainer.share import Limits, Share, rows_of
from fedclient.trainer.text.schedules import Schedule
from tests.support.interrupted import Interrupted, Run

BATCHES = [np.zeros((4, 2)), np.zeros((4, 2)), np.zeros((2, 2))]
"""Ten examples."""


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def context(asked: dict[str, Any] | None = None, own: dict[str, Any] | None = None) -> Context:
    ctx = Context(settings=None)
    ctx.begin(Share(Limits(**asked or {}), Limits(**own or {})))
    return ctx


def ended(ctx: Context, examples: int = 10) -> tuple[int, int, int, str]:
    """Steps, examples, weight, and what has cut it short."""
    ctx.num_examples = examples
    weight = ctx.counted()
    return ctx.step, ctx.examples_seen, weight, ctx.cut


@pytest.mark.parametrize(
    ("asked", "own", "expected"),
    [
        ({}, {}, (6, 20, 10, "")),
        # What the run asks of a site is the whole of its work, whatever the class would do.
        ({"steps": 2}, {}, (2, 8, 10, "run steps")),
        ({"epochs": 1}, {}, (3, 10, 10, "run epochs")),
        ({"examples": 9}, {}, (3, 10, 10, "run examples")),
        # The site does a part of it, and weighs so much less.
        ({}, {"steps": 3}, (3, 10, 5, "site steps")),
        ({"steps": 4}, {"steps": 1}, (1, 4, 3, "site steps")),
        ({}, {"epochs": 1}, (3, 10, 5, "site epochs")),
        ({"epochs": 1}, {"steps": 1}, (1, 4, 3, "site steps")),
        ({}, {"examples": 5}, (2, 8, 3, "site examples")),
        ({"examples": 16}, {"steps": 2}, (2, 8, 5, "site steps")),
        # The tighter one ends it; where both do, it was the run's.
        ({"steps": 3, "examples": 4}, {"steps": 3}, (1, 4, 10, "run examples")),
        ({"steps": 3}, {"steps": 3}, (3, 10, 10, "run steps")),
        # Nothing was cut.
        ({"steps": 6}, {"steps": 6, "epochs": 2, "examples": 20}, (6, 20, 10, "")),
    ],
)
def test_limits_over_batches(asked: dict[str, Any], own: dict[str, Any], expected: tuple[Any, ...]) -> None:
    ctx = context(asked, own)
    for _ in ctx.batches(BATCHES, epochs=2):
        pass
    assert ended(ctx) == expected


def test_limits_over_steps_with_and_without_what_the_class_says_of_its_examples() -> None:
    ctx = context(own={"steps": 3})
    assert list(ctx.steps(12)) == [0, 1, 2]
    assert ended(ctx, 100) == (3, 0, 25, "site steps")
    ctx = context(own={"examples": 9})
    for _ in ctx.steps(12):
        ctx.saw(4)
    assert ended(ctx, 100) == (3, 12, 25, "site examples")


def test_steps_taken_from_data_that_begin_anew() -> None:
    ctx = context(own={"epochs": 2})
    assert len(list(ctx.batches(BATCHES, steps=60))) == 6
    assert ended(ctx) == (6, 20, 1, "site epochs")
    ctx = context(asked={"steps": 7})
    assert len(list(ctx.batches(BATCHES, steps=60))) == 7


def test_nested_loops_and_loops_in_a_row() -> None:
    ctx = context(own={"steps": 5})
    for _ in ctx.steps(2):
        for _ in ctx.batches(BATCHES):
            pass
    # Of the two passes around and the three in each; the limit came in the first one of the second pass around.
    assert ended(ctx, 80)[::2] == (6, 60)
    ctx = context(own={"steps": 2})
    first, second = len(list(ctx.steps(5))), len(list(ctx.batches(BATCHES)))
    assert (first, second) == (2, 1), "each loop makes a pass, so that names set in it are there afterwards"
    assert ended(ctx, 80) == (3, 4, 30, "site steps")


def test_data_of_unknown_length_weigh_what_was_seen() -> None:
    ctx = context(own={"steps": 2})
    assert len(list(ctx.batches(iter(BATCHES)))) == 2
    assert ended(ctx, 10)[2] == 8
    ctx = context(own={"steps": 2})
    list(ctx.batches(iter(BATCHES)))
    assert ended(ctx, 5)[2] == 5


def test_what_the_class_has_counted_in_its_loop_is_what_counts() -> None:
    ctx = context(own={"steps": 2})
    ctx.num_examples = 0
    for batch in ctx.batches(BATCHES, epochs=2):
        ctx.num_examples += len(batch)
    assert (ctx.counted(), ctx.cut) == (8, "site steps")


def test_the_least_training_weighs_something_and_nothing_weighs_nothing() -> None:
    ctx = context(own={"steps": 1})
    list(ctx.steps(1000))
    assert ended(ctx, 3)[2] == 1
    ctx.num_examples = 0
    assert ctx.counted() == 0


def test_a_limit_that_nothing_is_counted_for_fails_by_name_instead_of_being_passed_over() -> None:
    for own, name in (({"examples": 5}, "examples"), ({"epochs": 1}, "epochs")):
        ctx = context(own=own)
        list(ctx.steps(3))
        ctx.num_examples = 1
        with pytest.raises(ValueError, match=f"the limit '{name}' .* cannot be kept"):
            ctx.counted()
    ctx = context(asked={"examples": 5})
    list(ctx.batches([object(), object()]))
    ctx.num_examples = 1
    with pytest.raises(ValueError, match=r"call ctx\.saw"):
        ctx.counted()


def test_time_ends_a_training_after_the_step_that_passes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(api_module, "time", clock)
    for asked, own, whose in (({"max_seconds": 10.0}, {"max_seconds": 99}, "run"), ({}, {"max_seconds": 10}, "site")):
        ctx = context(asked, own)
        for _ in ctx.steps(8):
            clock.now += 3
        assert ended(ctx, 80) == (4, 0, 40, f"{whose} max_seconds")
    ctx = context(own={"max_seconds": 0.001})
    for _ in ctx.batches(BATCHES):
        clock.now += 3
    assert ended(ctx)[0] == 1, "one step is always done"


def test_examples_in_a_batch() -> None:
    tensors = torch.zeros(5, 3), torch.zeros(5)
    for batch in (tensors, list(tensors), {"x": tensors[0], "y": tensors[1]}, [{"x": tensors[0]}], tensors[0]):
        assert rows_of(batch) == 5
    assert rows_of(["a", "b", "c"]) == 3
    assert (rows_of(7), rows_of("text"), rows_of(np.float32(2)), rows_of([]), rows_of({})) == (1, 1, 1, 0, 0)
    assert rows_of(object()) is None


# --- Interrupted


def limited(end: int | None, own: dict[str, Any], clock: Clock | None = None) -> Any:
    """A training over batches in two epochs that ends, if it is to, in a step; with its own limits."""

    def train(model: Any, ctx: Context) -> None:
        ctx.begin(Share(own=Limits(**own)))
        for _ in ctx.batches([np.full((2, 4), i) + np.random.random() for i in range(4)], epochs=3):  # noqa: NPY002
            if ctx.step == end:
                raise Interrupted
            if clock:
                clock.now += 3
            model["w"] += np.random.random(4)  # noqa: NPY002
        ctx.num_examples = 24

    return train


@pytest.mark.parametrize("own", [{"steps": 7}, {"epochs": 2}, {"examples": 13}, {}])
@pytest.mark.parametrize("end", [1, 4, 6])
def test_an_interrupted_training_ends_where_the_other_one_does(tmp_path: Path, own: dict[str, Any], end: int) -> None:
    whole = Run(tmp_path / "a", zeros, limited(None, own), every=0)
    assert Run(tmp_path / "b", zeros, limited(end, own)).interrupted
    resumed = Run(tmp_path / "b", zeros, limited(None, own))
    assert "resumed" in "".join(resumed.notes)
    assert resumed.weights == whole.weights
    for run in (whole, resumed):
        assert (run.ctx.step, run.ctx.examples_seen, run.ctx.cut, run.ctx.counted()) == (
            whole.ctx.step,
            2 * whole.ctx.step,
            f"site {next(iter(own))}" if own else "",
            2 * whole.ctx.step,
        )


def test_seconds_from_before_an_interruption_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(api_module, "time", clock)
    own = {"max_seconds": 20.0}
    assert Run(tmp_path, zeros, limited(5, own, clock)).interrupted
    clock.now += 1000  # it was away
    resumed = Run(tmp_path, zeros, limited(None, own, clock))
    assert "resumed" in "".join(resumed.notes)
    assert (resumed.ctx.step, resumed.ctx.cut) == (7, "site max_seconds")
    assert resumed.ctx.seconds == 21.0


def test_an_interrupted_training_whose_time_is_over_makes_a_step_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that names which its loop sets are there when the loop is over."""
    clock = Clock()
    monkeypatch.setattr(api_module, "time", clock)
    assert Run(tmp_path, zeros, limited(5, {"max_seconds": 20.0}, clock)).interrupted
    resumed = Run(tmp_path, zeros, limited(None, {"max_seconds": 3.0}, clock))
    assert (resumed.ctx.step, resumed.unusable) == (6, False)


def zeros() -> dict[str, Any]:
    return {"w": np.zeros(4)}


# --- A schedule over the whole run


def test_a_schedule_knows_how_many_steps_the_limits_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    assert context().expected_steps(50, epoch=10, examples=4) == 50
    assert context({"steps": 30}, {"epochs": 2}).expected_steps(50, epoch=10, examples=4) == 20
    assert context({"steps": 30}, {"examples": 41}).expected_steps(50, epoch=10, examples=4) == 11
    clock = Clock()
    monkeypatch.setattr(api_module, "time", clock)
    ctx, rates = context(own={"max_seconds": 10.0}), []
    schedule = Schedule("linear", 1.0, total=100)
    for _ in ctx.steps(ctx.expected_steps(100)):
        rates.append(schedule.rate(ctx.place(100)))
        clock.now += 2.5
    # Four steps of a hundred, and yet the rate falls as it would have over all.
    assert rates == [1.0, 0.75, 0.5, 0.25]
