"""What the user's code holds of the model, or of what it keeps, is the same object after a resume as before."""

from __future__ import annotations

import tempfile
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedclient.trainer import Context
from fedclient.trainer.aliases import Snapshot
from tests.support.interrupted import MEMORY, Interrupted, Run

Step = Callable[[], int]
"""Called in each step: its number; ends the training in one of them."""


def build() -> dict[str, Any]:
    tied = np.ones(2)
    return {"w": np.arange(2.0), "v": np.full(2, 3.0), "tied": tied, "again": tied}


def replaced_before_and_changed_in_place(model: Any, ctx: Context, step: Step) -> None:
    model["w"] = model["w"].copy()
    w = model["w"]
    for _ in ctx.steps(4):
        w += step()


def replaced_before_and_in_the_loop(model: Any, ctx: Context, step: Step) -> None:
    model["w"] = model["w"] * 2
    start = model["w"]
    for _ in ctx.steps(4):
        model["w"] = model["w"] * 0.5 + start + step()


def replaced_in_a_loop_before(model: Any, ctx: Context, step: Step) -> None:
    for _ in ctx.steps(2):
        model["w"] = model["w"] + step()
        model["v"] += step()
    w, v = model["w"], model["v"]
    for _ in ctx.steps(3):
        w += step()
        v += w


def held_since_before_a_loop(model: Any, ctx: Context, step: Step) -> None:
    start = model["w"]
    for _ in ctx.steps(2):
        model["w"] = model["w"] + step()
    for _ in ctx.steps(3):
        model["w"] *= 2
        model["w"] += start + step()


def replaced_in_each_pass(model: Any, ctx: Context, step: Step) -> None:
    start, v = model["w"], model["v"]
    for i in ctx.steps(3):
        model["w"] = model["w"].copy()
        now = model["w"]
        for _ in ctx.steps(2):
            now += step() + start
        for _ in ctx.batches([1, 2]):
            model["w"] = model["w"] * 0.5 + start + step()
        held = model["w"]
        for _ in ctx.steps(2):
            held += start + step()
            model["v"] = model["v"] + v
        if i != 1:
            model["v"] = model["v"] + held


def only_late_loops_within(model: Any, ctx: Context, step: Step) -> None:
    start = model["w"]
    for i in ctx.steps(4):
        model["w"] = model["w"] + start + step()
        for _ in ctx.steps(2) if i > 1 else ():
            model["w"] += step()


def changed_places(model: Any, ctx: Context, step: Step) -> None:
    w, v = model["w"], model["v"]
    for i in ctx.steps(5):
        model["w"], model["v"] = model["v"], model["w"]
        w += step()
        v *= 0.5
        if i == 1:
            model["again"] = w
        if i == 2:
            model["tied"] = model["v"] = np.ones(2)
        model["tied"] += 1


def parts_of_what_is_kept(model: Any, ctx: Context, step: Step) -> None:
    kept: dict[str, Any] = {
        "w": np.zeros(2),
        "turned": np.asfortranarray(np.zeros((2, 2))),
        "list": [np.zeros(2), 0.0, {"deep": np.zeros(2)}],
        "last": deque(maxlen=2),
        "ordered": OrderedDict(pair=(np.zeros(2), [])),
        "seen": set(),
        "tensor": torch.zeros(2),
    }
    several = [torch.zeros(2), torch.zeros(3, 2).t()]
    ctx.keep(kept=kept, several=several)
    w, turned, items, last, deep = kept["w"], kept["turned"], kept["list"], kept["last"], kept["list"][2]["deep"]
    pair, ordered, seen, tensor, first = (
        kept["ordered"]["pair"],
        kept["ordered"],
        kept["seen"],
        kept["tensor"],
        several[0],
    )
    for _ in ctx.steps(4):
        i = step()
        w += i
        turned += w
        items[1] += i
        deep += items[1]
        last.append(i * 0.5)
        pair[0][:] += i
        pair[1].append(i)
        ordered[f"{i}"] = i
        seen.add(i)
        tensor.add_(i)
        first.add_(tensor)
        several[1] += first.sum()
        model["w"] = model["w"] + kept["w"] + kept["list"][2]["deep"] + sum(kept["last"]) + kept["ordered"]["pair"][0]
        model["v"] += sum(kept["ordered"]["pair"][1]) + len(kept["ordered"]) + sum(kept["seen"]) + kept["turned"][1]
        model["tied"] += kept["tensor"].numpy() + several[0].numpy() + several[1].numpy().sum(axis=1)


def replaced_in_what_is_kept(model: Any, ctx: Context, step: Step) -> None:
    kept: dict[str, Any] = {"w": np.ones(2), "pair": (torch.ones(2), np.ones(2)), "list": [1]}
    ctx.keep(kept=kept)
    start, pair, items = kept["w"], kept["pair"], kept["list"]
    for _ in ctx.steps(4):
        i = step()
        kept["w"] = kept["w"] * 2 + start
        kept["pair"] = (kept["pair"][0] + pair[0], kept["pair"][1])
        pair[1][:] += i
        kept["list"] = [*kept["list"], len(items)]
        model["w"] += kept["w"] + kept["pair"][0].numpy() + kept["pair"][1] + sum(kept["list"])


def moved_in_a_list(model: Any, ctx: Context, step: Step) -> None:
    ring, window = [np.zeros(2), np.ones(2)], deque([np.ones(2)], maxlen=4)
    kept = {"ring": ring, "window": window}
    ctx.keep(kept=kept)
    a, b, oldest = *ring, window[0]
    for _ in ctx.steps(6):
        i = step()
        ring.append(ring.pop(0))
        a += i
        b *= 0.5
        window.appendleft(np.full(2, float(i)))
        oldest += 1
        model["w"] += ring[0] - 2 * ring[1] + sum(window) * len(window)


def shared_in_what_is_kept(model: Any, ctx: Context, step: Step) -> None:
    one = np.zeros(2)
    kept: dict[str, Any] = {"a": one, "b": one, "now": [0]}
    ctx.keep(kept=kept, one=one)
    for _ in ctx.steps(6):
        i = step()
        kept["a"] += i
        kept["now"].append(i)
        if i == 1:
            kept["best"], kept["model"], kept["late"], kept["lately"] = kept["now"], model["w"], *[np.ones(2)] * 2
        if i > 1:
            kept["model"] += kept["b"] + len(kept["best"])
            kept["late"] *= 2
            model["v"] += kept["lately"] + one


SCENARIOS = [
    replaced_before_and_changed_in_place,
    replaced_before_and_in_the_loop,
    replaced_in_a_loop_before,
    held_since_before_a_loop,
    replaced_in_each_pass,
    only_late_loops_within,
    changed_places,
    parts_of_what_is_kept,
    replaced_in_what_is_kept,
    moved_in_a_list,
    shared_in_what_is_kept,
]


def training(
    scenario: Callable[[Any, Context, Step], None], end: int | None, seen: set[int] | None = None
) -> Callable[[Any, Context], None]:
    def train(model: Any, ctx: Context) -> None:
        def step() -> int:
            if seen is not None:
                seen.add(ctx.step)
            if ctx.step == end:
                raise Interrupted
            return ctx.step

        scenario(model, ctx, step)

    return train


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_it_is_the_same_object_again(scenario: Callable[[Any, Context, Step], None]) -> None:
    seen: set[int] = set()
    undisturbed = Run(Path(), build, training(scenario, None, seen), every=0)
    steps = sorted(seen)[2:]
    for ends in [*((end,) for end in steps), steps]:
        with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
            for end in ends:
                assert Run(Path(directory), build, training(scenario, end)).interrupted
            run = Run(Path(directory), build, training(scenario, None))
        assert run.notes == ["resumed from a local checkpoint"], ends
        assert run.weights == undisturbed.weights, ends


def test_places_that_cannot_be_brought_back(tmp_path: Path) -> None:
    """An object was moved into a container that is not there before the loop."""

    def train(model: Any, ctx: Context, end: int) -> None:
        kept: dict[str, Any] = {"old": np.zeros(2)}
        ctx.keep(kept=kept)
        for i in ctx.steps(5):
            if i == end:
                raise Interrupted
            kept["new"] = {"old": kept["old"]}

    assert Run(tmp_path, build, lambda model, ctx: train(model, ctx, 3)).interrupted
    run = Run(tmp_path, build, lambda model, ctx: train(model, ctx, 9))
    assert run.unusable
    assert "it cannot be gone on from: KeyError" in run.notes[-1]


class Overlapping(nn.Module):
    """Of its buffers one is a part of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("full", torch.zeros(2))
        self.register_buffer("part", self.full[:1])


def test_a_model_that_is_not_as_it_was_is_not_gone_on_from(tmp_path: Path) -> None:
    def train(model: Any, ctx: Context, end: int) -> None:
        for i in ctx.steps(5):
            if i == end:
                raise Interrupted
            model.part = torch.full((1,), 5.0)
            model.full += 1

    assert Run(tmp_path, Overlapping, lambda model, ctx: train(model, ctx, 3)).interrupted
    run = Run(tmp_path, Overlapping, lambda model, ctx: train(model, ctx, 9))
    assert run.unusable
    assert "the model's tensors/full could not be brought back" in run.notes[-1]


def test_what_was_replaced_is_free() -> None:
    root = {"w": np.zeros(2)}
    gone = weakref.ref(root["w"])
    snapshot = Snapshot({"model": root})
    root["w"] = root["w"] + 1
    assert gone() is None
    assert snapshot.change() == ([(("model", "w"), None)], [])
