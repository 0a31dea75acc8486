"""What the options of the text demos' trainings come to: site files, run files, how many trainers at a time."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from examples.classify import demo as classify
from examples.classify.sites import Sites as ClassifySites
from examples.classify.sites import Workload
from examples.llm import demo as llm
from examples.llm.sites import Sites as LanguageSites
from examples.training import PLAIN, Training
from fedclient.settings import load_site

ROOT = Path(__file__).parents[2]
TWO = Training(processes=2, learning_rate="auto")


def site_of(demo: str, root: Path, training: Training) -> Path:
    if demo == "llm":
        return LanguageSites(root, training).site("comedies", ["comedies"], ["comedies"])
    return ClassifySites(root).site("site-1", [Workload("topics", "seed-1", 48, training.tables)])


def settings_of(demo: str, root: Path, rate: float | str) -> dict[str, Any]:
    path = (
        LanguageSites(root).run_file("a", 2, 4, rate=rate)
        if demo == "llm"
        else classify.write_run_file(root, "a", 4, rate)
    )
    found: dict[str, Any] = tomllib.loads(path.read_text())["settings"]
    return found


@pytest.mark.parametrize("demo", ["llm", "classify"])
def test_every_trainer_has_the_processes_and_the_rate_that_were_asked_for(tmp_path: Path, demo: str) -> None:
    for training, processes in ((PLAIN, None), (TWO, 2)):
        (workload,) = load_site(site_of(demo, tmp_path, training)).workload.values()
        found = workload.distributed.processes if workload.distributed else None
        assert found == processes
    assert settings_of(demo, tmp_path, "auto")["learning_rate"] == "auto"
    assert settings_of(demo, tmp_path, 0.5)["learning_rate"] == 0.5


def test_as_many_trainers_compute_at_a_time_as_there_are_cores_for_their_processes() -> None:
    assert [TWO.lanes(4, cores) for cores in (1, 2, 4, 16)] == [1, 1, 2, 4]
    assert [PLAIN.lanes(4, cores) for cores in (1, 2, 4, 16)] == [1, 2, 4, 4]


@pytest.mark.parametrize("demo", ["llm", "classify"])
def test_make_hands_the_options_to_the_demo(monkeypatch: pytest.MonkeyPatch, demo: str) -> None:
    # Within `make test` it would be another make's child, which says more.
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
        monkeypatch.delenv(name, raising=False)
    command = ["make", "--dry-run", f"demo-{demo}", "PROCESSES=2", "LEARNING_RATE=auto", "SECONDS=7"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()[-1]
    program, given = printed.split(f"-m examples.{demo}.demo ")
    assert program.endswith("python ")
    monkeypatch.setattr(sys, "argv", ["demo", *given.split()])
    if demo == "llm":
        asked = llm.arguments()
        assert (llm.training_of(asked), asked.seconds, asked.directory) == (TWO, 7, Path(".demo/llm"))
    else:
        directory, seconds, training = classify.arguments()
        assert (training, seconds, directory.parts[-2:]) == (TWO, 7, (".demo", "classify"))
