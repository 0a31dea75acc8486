"""How batches are shared out among processes, and what each of them draws."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from fedclient.settings import DistributedSettings, SiteSettings, WorkloadSettings
from fedclient.trainer import Context
from fedclient.trainer.replicas import OwnDraws
from fedclient.trainer.team import CannotShareError, share_of
from fedclient.trainer.text.batches import Batch

Pair = namedtuple("Pair", "x y")  # noqa: PYI024 - as users have them


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_parts_are_the_batch_and_none_is_empty(world_size: int, count: int) -> None:
    batch = torch.arange(count)
    shares = [share_of(batch, rank, world_size) for rank in range(world_size)]
    assert torch.cat([share.part[: share.own] for share in shares]).tolist() == batch.tolist()
    assert sum(share.weight for share in shares) == pytest.approx(1)
    assert all(len(share.part) >= 1 for share in shares)
    assert max(share.own for share in shares) - min(share.own for share in shares) <= 1


def _halves(kind: str) -> tuple[Any, Any]:
    x, y = torch.arange(8).reshape(4, 2), np.arange(4)
    known: dict[str, tuple[Any, Any]] = {
        "tuple": ((x, y), (x[2:], y[2:])),
        "list": ([x, y], [x[2:], y[2:]]),
        "named": (Pair(x, y), Pair(x[2:], y[2:])),
        "dict": ({"a": x, "b": {"c": y}}, {"a": x[2:], "b": {"c": y[2:]}}),
        "encoding": (BatchEncoding({"a": x}), BatchEncoding({"a": x[2:]})),
        "dataclass": (Batch({"a": x}, x), Batch({"a": x[2:]}, x[2:])),
        "texts": ((["a", "b", "c", "d"], x), (["c", "d"], x[2:])),
        "numbers": ([5, 6, 7, 8], [7, 8]),
        "range": (range(4), range(2, 4)),
    }
    return known[kind]


@pytest.mark.parametrize(
    "kind", ["tuple", "list", "named", "dict", "encoding", "dataclass", "texts", "numbers", "range"]
)
def test_what_a_batch_may_be(kind: str) -> None:
    batch, second = _halves(kind)
    found = share_of(batch, 1, 2)
    assert (found.own, found.of) == (2, 4)
    assert type(found.part) is type(batch)
    assert repr(found.part) == repr(second)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ((torch.zeros(3), torch.zeros(4)), "tensors of 3 and 4 examples"),
        ({"x": torch.zeros(3), "scale": 2.0}, "a batch with a float"),
        (torch.tensor(1.0), "without dimensions"),
        (object(), "a batch with a object"),
        ((), "no tensors"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_advice(batch: Any, text: str) -> None:
    with pytest.raises(CannotShareError, match=text) as caught:
        share_of(batch, 0, 2)
    assert "split=False" in str(caught.value)


def test_inside_of_the_model_each_rank_draws_its_own_and_outside_the_same() -> None:
    def drawn(rank: int) -> tuple[list[bytes], bytes]:
        model, ctx = torch.nn.Dropout(0.5), Context(settings=None, seed=4)
        torch.manual_seed(1)
        draws = OwnDraws(model, rank, ctx)
        draws.begin()
        inside = [model(torch.ones(64)).numpy().tobytes() for _ in range(2)]
        draws.end()
        return inside, torch.rand(4).numpy().tobytes()

    (first, outside), (second, same) = drawn(0), drawn(1)
    assert outside == same
    assert len({*first, *second}) == 4
    assert drawn(1) == (second, same), "and the same again when the step is done again"


def test_one_process_is_no_matter_of_several() -> None:
    assert DistributedSettings(processes=1).alone
    assert not DistributedSettings().alone
    assert not DistributedSettings(processes=1, strategy="fsdp").alone, "it holds shares, if all of them"
    with pytest.raises(ValueError, match="nodes and rendezvous belong together"):
        DistributedSettings(nodes=2)


def test_a_script_takes_one_process() -> None:
    WorkloadSettings.model_validate({"trainer": "train.py", "distributed": {"processes": 1}})
    for several in ({}, {"processes": 2}, {"processes": 1, "nodes": 2, "rendezvous": "a:1"}):
        with pytest.raises(ValueError, match=r"not for a script.*leave the table out"):
            WorkloadSettings.model_validate({"trainer": "train.py", "distributed": several})


def test_mps_takes_one_process() -> None:
    def site(**distributed: Any) -> SiteSettings:
        workload = {"trainer": "a:B", "distributed": distributed}
        return SiteSettings.model_validate({"name": "a", "devices": ["mps"], "workload": {"w": workload}})

    assert site().devices == ("mps",), "one for each GPU is one"
    for several in ({"processes": 2}, {"processes": 1, "strategy": "fsdp"}):
        with pytest.raises(ValueError, match='"mps" is for one alone'):
            site(**several)
