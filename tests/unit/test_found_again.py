"""What was measured holds until something that it depends on changes, or memory runs out with it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedclient.local_files import import_model
from fedclient.trainer.circumstances import data_files, surroundings
from fedclient.trainer.wire import Device, FailReason, Failure, Job, JobKind, Result, Start
from fedclient.trainer.worker import Worker
from tests.support.classes import measuring

AUTO = {"batch_size": "auto", "learning_rate": "auto"}


class Pipe:
    """The daemon's end: keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def send(self, kind: str, table: Mapping[str, Any]) -> None:
        if kind == "progress" and table["note"]:
            self.notes.append(table["note"])

    def cancelled(self) -> bool:
        return False

    def shard(self, _wait: float) -> str | None:
        raise AssertionError


class Home:
    """A site with data, a class that measures, and a model."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.module = f"measuring_{directory.name}".replace("-", "_")
        shutil.copy(measuring.__file__, directory / f"{self.module}.py")
        (directory / "rows").mkdir()
        (directory / "rows" / "a.csv").write_text("1")
        self.table(learning_rate=0.5, batch_size=9)
        self.worker()
        (directory / "init").mkdir()
        result = self.run(Job(JobKind.INIT, out_dir=directory / "init"))
        assert isinstance(result, Result), result
        self.model = import_model(result.files[0], directory / "m").directory

    def table(self, **table: Any) -> None:
        (self.directory / "measure.json").write_text(json.dumps(table))

    def worker(self) -> None:
        """A fresh process, so to speak."""
        sys.modules.pop(self.module, None)
        self.pipe = Pipe()
        start = Start(
            f"{self.module}:Measuring",
            "w",
            "a",
            str(self.directory),
            {"parts": [{"train": "rows"}], "normalise": "own"},
            "cpu",
            kept=str(self.directory / "kept"),
        )
        self._worker = Worker(start, self.pipe)

    def run(self, job: Job) -> Result | Failure:
        return self._worker.run(job)

    def calibrated(self, **options: Any) -> Mapping[str, float]:
        job = Job(
            JobKind.CALIBRATE, **({"settings": AUTO, "client": "a", "run": "r", "model_dir": self.model} | options)
        )
        result = self.run(job)
        assert isinstance(result, Result), result
        return result.found

    def trained(self, number: int) -> Result | Failure:
        out = self.directory / f"out-{number}"
        out.mkdir()
        job = Job(JobKind.TRAIN, AUTO, client="a", run="r", round=1, model_dir=self.model, out_dir=out)
        return self.run(job)

    @property
    def searches(self) -> int:
        return int((self.directory / "calls").read_text())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setattr(sys, "path", [*sys.path])
    return Home(tmp_path)


def test_data_that_changed_are_measured_again_but_not_within_a_run(home):
    home.calibrated()
    home.calibrated(run="other")
    assert home.searches == 1
    (home.directory / "rows" / "a.csv").write_text("2")
    home.trained(1)
    assert home.searches == 1, "the run goes on with what it began with"
    home.calibrated(run="other")
    assert home.searches == 2
    (home.directory / "rows" / "b.csv").write_text("1")
    home.calibrated()
    assert home.searches == 3
    home.calibrated(rounds=7)
    assert home.searches == 4


def test_another_source_file_is_measured_again(home):
    home.calibrated()
    home.worker()
    home.calibrated()
    assert home.searches == 1
    with (home.directory / f"{home.module}.py").open("a") as file:
        file.write("# takes twice as much memory\n")
    home.worker()
    home.calibrated()
    assert home.searches == 2


def test_memory_that_runs_out_with_the_measured_batch_halves_it(home):
    home.table(learning_rate=0.5, batch_size=9, room=2)
    home.calibrated()
    home.calibrated(run="older")
    for number, size in enumerate((9, 4)):
        failure = home.trained(number)
        assert isinstance(failure, Failure)
        assert failure.reason is FailReason.OUT_OF_MEMORY
        said = f"memory ran out with the measured batch of {size}: from now on {size // 2} are taken"
        assert home.pipe.notes.count(said) == 1
        home.worker()
    result = home.trained(2)
    assert isinstance(result, Result)
    assert result.metrics["loss"] == 2
    assert home.calibrated(run="older") == {"batch_size": 2, "learning_rate": 0.5}
    assert home.searches == 1


def test_what_is_measured_is_a_training_within_the_limits(home):
    home.table(batch_size=1, steps=32)
    assert home.calibrated()["learning_rate"] == 1 / 32
    assert home.calibrated(share={"steps": 8, "max_seconds": 0.0})["learning_rate"] == 1 / 8
    assert home.calibrated(share={"steps": 8}, asked={"steps": 4})["learning_rate"] == 1 / 4
    assert home.calibrated(share={"steps": 8})["learning_rate"] == 1 / 8


def test_a_number_that_the_run_set_is_left_alone(home):
    home.table(learning_rate=0.5, batch_size=9, room=2)
    home.calibrated()
    out = home.directory / "out"
    out.mkdir()
    settings = {"batch_size": 8, "learning_rate": "auto"}
    failure = home.run(Job(JobKind.TRAIN, settings, client="a", run="r", model_dir=home.model, out_dir=out))
    assert isinstance(failure, Failure)
    assert not any("memory ran out" in note for note in home.pipe.notes)
    assert home.calibrated()["batch_size"] == 9


def test_surroundings_tell_devices_apart(home):
    small, large = (surroundings(Home, Device("cuda:0", "some GPU", memory)) for memory in (8 << 30, 80 << 30))
    assert small != large
    assert surroundings(Home, Device("cpu")) == surroundings(Home, Device("cpu"))


def test_files_that_a_table_names(tmp_path):
    inner = tmp_path / "site"
    for name in ("site/a.txt", "site/more/b.txt", "site/more/deep/c.txt", "other/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (inner / "more" / "a-link").symlink_to("gone")
    table = {"a": "a.txt", "more": ["more", "gone"], "far": {"d": str(tmp_path / "other")}, "n": 1}
    # None of these is data: the site itself, what holds it, and what is no path.
    table |= {"self": ".", "above": "..", "root": "/", "zero": "a\0b", "long": "x" * 5000}
    found = data_files(inner, table, lambda: None)
    assert {Path(path).name: size for path, size, _ in found} == {"a.txt": 10, "b.txt": 15, "c.txt": 20, "d.txt": 11}
