"""The site's own base in a trainer: not part of what travels, compared before anything trains, and left alone."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedclient.local_files import import_model
from fedclient.trainer.wire import FailReason, Failure, Job, JobKind, Result, Start
from fedclient.trainer.worker import Worker
from tests.support.trainers import SITE_FILES, arrays, raw_tensors


class Silence:
    """The daemon's end of the pipe, which hears everything and says nothing."""

    def send(self, kind: str, table: Mapping[str, Any]) -> None:
        pass

    def cancelled(self) -> bool:
        return False


Make = Callable[..., Worker]


@pytest.fixture(autouse=True)
def few_objects() -> Iterator[None]:
    """A worker collects garbage before it builds: it need not look through everything that pytest holds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.syspath_prepend(str(SITE_FILES))

    def work(kind: str = "Backbone", **data: Any) -> Worker:
        start = Start(f"backbone:{kind}", "w", "site-1", str(SITE_FILES), data, "cpu")
        pipe: Any = Silence()
        return Worker(start, pipe)

    return work


def begun(worker: Worker, directory: Path, seed: int = 0) -> Path:
    """What `init-model` writes, as a model directory."""
    out = directory / "init"
    out.mkdir(parents=True)
    result = worker.run(Job(JobKind.INIT, seed=seed, out_dir=out))
    assert isinstance(result, Result), result
    return import_model(
        out if result.files[0].name.startswith("adapter") else result.files[0], directory / "m"
    ).directory


def trained(worker: Worker, model: Path, out: Path) -> Result | Failure:
    out.mkdir()
    return worker.run(Job(JobKind.TRAIN, client="c", run="r", round=1, model_dir=model, out_dir=out))


def test_the_base_is_not_in_what_travels(make, tmp_path):
    model = begun(make(), tmp_path)
    assert {p.name for p in (tmp_path / "init").iterdir()} == {"adapter_model.safetensors", "config.json"}
    assert arrays(tmp_path / "init" / "adapter_model.safetensors").keys() == {"classifier.weight", "head.bias", "seen"}
    result = trained(make(), model, tmp_path / "out")
    assert isinstance(result, Result), result
    update = arrays(*result.files)
    assert update.keys() == {"classifier.weight", "head.bias", "seen"}
    np.testing.assert_allclose(update["classifier.weight"], 1, rtol=1e-6)
    assert update["seen"] == 1


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"shift": 1}, "tensor 'shift' has other values"),
        ({"wide": True}, "tensor 'backbone.weight' is F32 [4, 4] here and BF16 [4, 4] in the run's"),
    ],
    ids=["values", "dtype"],
)
def test_another_base_is_refused_by_name_before_training(make, tmp_path, data, said):
    model = begun(make(), tmp_path)
    failure = trained(make(**data), model, tmp_path / "out")
    assert isinstance(failure, Failure)
    assert failure.reason is FailReason.BASE_MISMATCH
    assert f"this site's base differs from the run's: {said}; " in failure.text
    assert list((tmp_path / "out").iterdir()) == []


def test_a_base_on_one_side_alone_is_refused(make, tmp_path):
    adapter, whole = begun(make(), tmp_path / "a"), begun(make("Whole"), tmp_path / "w")
    for worker, model, said in (
        (make(), whole, "names no frozen base"),
        (make("Whole"), adapter, "a frozen base of 2 tensors, and this site's workload has none"),
    ):
        failure = trained(worker, model, tmp_path / said[:3])
        assert isinstance(failure, Failure)
        assert failure.reason is FailReason.BASE_MISMATCH
        assert said in failure.text


def test_a_base_that_training_wrote_to_is_built_anew(make, tmp_path):
    """A warm process gives what a fresh one does."""
    worker = make(touch=True)
    model = begun(worker, tmp_path)
    first, second = (trained(worker, model, tmp_path / name) for name in ("1", "2"))
    assert isinstance(first, Result)
    assert isinstance(second, Result)
    assert first.metrics == second.metrics == {"base": 120 + 16}
    assert raw_tensors(*first.files) == raw_tensors(*second.files)


def test_the_base_is_hashed_once(make, tmp_path, monkeypatch):
    hashed: list[str] = []
    worker = make()
    model = begun(worker, tmp_path)
    monkeypatch.setattr("fedclient.trainer.own_base.base_tensor", lambda spec, _: hashed.append(spec.name))
    for name in ("1", "2"):
        assert isinstance(trained(worker, model, tmp_path / name), Result)
    assert hashed == []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"name": "head.bias"}, "would both travel as 'head.bias'"),
        ({"file": "model.py"}, "model_files gave 'model.py'"),
    ],
    ids=["name", "file"],
)
def test_names_that_cannot_be_are_refused(make, tmp_path, data, said):
    failure = make(**data).run(Job(JobKind.INIT, out_dir=tmp_path))
    assert isinstance(failure, Failure)
    assert said in failure.text


def test_weights_of_the_same_seed_are_the_same_bits(make, tmp_path):
    one, two = (begun(make(), tmp_path / name, seed=3) for name in ("1", "2"))
    assert raw_tensors(*one.glob("*.safetensors")) == raw_tensors(*two.glob("*.safetensors"))
