"""Sums over the first updates of a round: with them or without, whatever became of them, the bits are the same.

`test_fold.py` compares both with plain arithmetic.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlink.errors import FedlinkError, Reason
from fedlink.recycle import Recycler
from fedlink.tensors import Kind, Role
from fedserver.aggregation import reading
from fedserver.aggregation.fold import aggregate
from fedserver.aggregation.optimizers.sgd import Sgd
from fedserver.aggregation.pipeline import Contribution, ModelFiles, Pipeline, Window
from fedserver.aggregation.prefix import DamagedSumsError, PrefixSums
from fedserver.aggregation.reducers.mean import WeightedMean
from tests.support.shards import T, contribution, put, read_safetensors

MEAN = WeightedMean()
FEDAVG = Pipeline(Kind.DELTA, MEAN, Sgd(1.0))
WEIGHTS = (7, 0, 199, 1, (1 << 53) - 1, 0)
"""The donor of what is not averaged is the fifth."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WINDOW", 100)


def case(tmp: Path, weights: tuple[int, ...] = WEIGHTS) -> tuple[ModelFiles, list[Contribution]]:
    """A model in four shards, one of them frozen and one not averaged, and updates whose order of adding shows."""
    rng = np.random.default_rng(3)

    def numbers() -> np.ndarray:
        # In any other order the sums round otherwise.
        return rng.normal(size=250) * 10.0 ** rng.integers(-6, 3, 250)

    def shards(wire: str) -> list[list[T]]:
        return [
            [T.of("w", "F32", numbers()), T.of("n", "I64", rng.integers(0, 99, 3), Role.BUFFER)],
            [T.of("half", wire or "BF16", numbers()), T.of("mean", "F32", numbers(), Role.BUFFER)],
            [T.of("count", "I64", rng.integers(0, 99, 5), Role.BUFFER)],
        ]

    model = put(tmp / "model", Kind.MODEL, [*shards(""), [T.of("base", "F32", [1.0], Role.FROZEN)]])
    return model, [contribution(tmp, f"c{i}", n, Kind.DELTA, shards("F32")) for i, n in enumerate(weights)]


def made(tmp: Path, model: ModelFiles, updates: list[Contribution], sums: PrefixSums | None = None) -> list[bytes]:
    """Every byte of the next version, and of its master."""
    out = tmp / f"out{len(list(tmp.glob('out*')))}"
    out.mkdir()
    version = aggregate(model, None, updates, FEDAVG, out, sums=sums)
    assert version.master
    return [f.path.read_bytes() for f in version.files]


@pytest.mark.usefixtures("small")
def test_wherever_it_was_split_the_bits_are_those_of_one_pass(tmp_path: Path) -> None:
    model, updates = case(tmp_path)
    single = made(tmp_path, model, updates)
    assert made(tmp_path, model, updates[::-1]) == single
    ends = range(len(updates) + 1)
    for number, (first, second) in enumerate(itertools.combinations_with_replacement(ends, 2)):
        sums = PrefixSums(tmp_path / f"sums{number}")
        for stop in (first, second):
            sums.add(model.manifest, updates[sums.count : stop], MEAN)
        assert sums.count == second
        assert made(tmp_path, model, updates, sums) == single


def test_what_is_written_is_a_float64_sum(tmp_path: Path) -> None:
    model, updates = case(tmp_path, (3, 0, 5))
    sums = PrefixSums(tmp_path / "sums", Recycler(tmp_path / "recycled"))
    sums.add(model.manifest, updates[:1], MEAN)
    sums.add(model.manifest, updates[1:], MEAN)
    files = sorted(p for p in (tmp_path / "sums").iterdir() if p.suffix != ".chunks")
    # Those of before are gone; what is not averaged is in none.
    assert [p.name for p in files] == ["0-3", "1-3"]
    assert sums.size == sum(p.stat().st_size for p in files)
    found = {k: np.frombuffer(v[2]) for path in files for k, v in read_safetensors(path).items()}
    assert set(found) == {"w", "half", "mean"}
    for name, of_shard in (("w", 0), ("half", 1), ("mean", 1)):
        values = [read_safetensors(u.files[of_shard])[name][2] for u in updates]
        flat = [np.frombuffer(v, np.float32).tolist() for v in values]
        assert found[name].tolist() == [3 * a + 0 * b + 5 * c for a, b, c in zip(*flat, strict=True)]
    sums.drop()
    assert not (tmp_path / "sums").exists()


@pytest.mark.usefixtures("small")
def test_sums_over_anything_else_are_passed_over(tmp_path: Path) -> None:
    model, updates = case(tmp_path)
    single = made(tmp_path, model, updates)
    (tmp_path / "late").mkdir()
    others = {
        "another came before": contribution(tmp_path, "b", 5, Kind.DELTA, shards_of(updates[3])),
        "another update of the first": contribution(tmp_path / "late", "c0", 7, Kind.DELTA, shards_of(updates[3])),
        "another weight of the first": replace(updates[0], num_examples=8),
    }
    for name, other in others.items():
        sums = PrefixSums(tmp_path / name)
        sums.add(model.manifest, [other, updates[1]], MEAN)
        assert made(tmp_path, model, updates, sums) == single
    # Nor those over one that is not in it, whose site was asked again in vain.
    sums = PrefixSums(tmp_path / "sums")
    sums.add(model.manifest, updates[:3], MEAN)
    assert made(tmp_path, model, updates[1:], sums) == made(tmp_path, model, updates[1:])


def shards_of(update: Contribution) -> list[list[T]]:
    roles = {t.spec.name: t.spec.role for t in update.manifest.tensors}
    return [[T(k, *v, roles[k]) for k, v in read_safetensors(p).items()] for p in update.files]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("after", [0, 1, 8, 13, 20])
def test_a_pass_that_was_given_up_half_way_leaves_sums_that_are_right(tmp_path: Path, after: int) -> None:
    model, updates = case(tmp_path)
    single = made(tmp_path, model, updates)
    sums = PrefixSums(tmp_path / "sums")
    sums.add(model.manifest, updates[:2], MEAN)
    asked = itertools.count()
    with pytest.raises(FedlinkError) as e:
        sums.add(model.manifest, updates[2:5], MEAN, unwanted=lambda: next(asked) >= after)
    assert e.value.reason is Reason.DRAINING
    assert sums.count == 2
    assert made(tmp_path, model, updates, sums) == single
    # What one shard has already is not added to it twice.
    sums.add(model.manifest, updates[2:5], MEAN)
    assert sums.count == 5
    assert made(tmp_path, model, updates, sums) == single


def turn(path: Path, at: int = -4) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["bit", "list", "gone", "short"])
def test_damaged_sums_are_nobodys_fault(tmp_path: Path, what: str) -> None:
    model, updates = case(tmp_path)
    sums = PrefixSums(tmp_path / "sums")
    sums.add(model.manifest, updates[:4], MEAN)
    path = tmp_path / "sums" / "1-4"
    if what == "gone":
        path.unlink()
    elif what == "short":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        turn(path if what == "bit" else path.with_suffix(".chunks"))
    error = FileNotFoundError if what == "gone" else DamagedSumsError
    with pytest.raises(error):
        made(tmp_path, model, updates, sums)
    with pytest.raises(error):
        sums.add(model.manifest, updates[4:], MEAN)


@pytest.mark.usefixtures("small")
def test_a_damaged_update_is_found_and_never_in_the_sums(tmp_path: Path) -> None:
    model, updates = case(tmp_path)
    sums = PrefixSums(tmp_path / "sums")
    turn(updates[1].files[1])
    with pytest.raises(FedlinkError, match="client 'c1'") as e:
        sums.add(model.manifest, updates[:3], MEAN)
    assert (e.value.reason, e.value.metadata["client"]) == (Reason.BLOB_CORRUPT, "c1")
    turn(updates[1].files[1])
    assert made(tmp_path, model, updates, sums) == made(tmp_path, model, updates)


class Median:
    """A rule that needs all values at once."""

    def reduce(self, updates: Iterable[tuple[int, Window]], out: Window) -> None:
        out[:] = np.median([values.copy() for _, values in updates], axis=0)


def test_a_rule_without_sums_reads_every_update(tmp_path: Path) -> None:
    model, updates = case(tmp_path)
    sums = PrefixSums(tmp_path / "sums")
    sums.add(model.manifest, updates[:3], MEAN)
    (tmp_path / "out").mkdir()
    version = aggregate(model, None, updates, Pipeline(Kind.DELTA, Median(), Sgd(1.0)), tmp_path / "out", sums=sums)
    assert version.folded_early == 0
    before = np.frombuffer(read_safetensors(model.files[0])["w"][2], np.float32).astype(float)
    values = [np.frombuffer(read_safetensors(u.files[0])["w"][2], np.float32) for u in updates]
    expected = (before + np.median(np.array(values, float), axis=0)).astype(np.float32)
    assert read_safetensors(version.files[0].path)["w"][2] == expected.tobytes()
