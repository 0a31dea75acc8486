"""A real trainer process, killed in training: the next one goes on from the checkpoint and gives the same bits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fedclient.launch import FailReason, Job, JobKind, Progress, Result, Trainer, TrainerFailed, Write
from fedlink import failpoints
from tests.support.interrupted import ALWAYS
from tests.support.trainers import init, make_site, make_trainer, raw_tensors

pytestmark = pytest.mark.slow

NAME = "checkpoint.safetensors"


class Bench:
    """A trainer, a model, and a directory for checkpoints.

    Args:
        directory: for everything.
        trainer: MODULE:Class.
    """

    def __init__(self, directory: Path, trainer: str) -> None:
        self.directory = directory
        self.checkpoints = directory / "checkpoints"
        self.control = directory / "site" / "control"
        site = make_site(directory / "site", trainer, data={"control": "control"}, stall_after=100.0)
        self.control.mkdir()
        self.trainer: Trainer = make_trainer(site)
        self.reports: list[Progress] = []
        self._outs = 0

    async def train(self, *, every: float = ALWAYS, **job: Any) -> Result:
        """Train, with checkpoints unless `every` is 0."""
        self._outs += 1
        out = self.directory / f"out-{self._outs}"
        out.mkdir()
        self.reports.clear()
        given = {
            "kind": JobKind.TRAIN,
            "client": "site-1",
            "run": "r",
            "round": 1,
            "model_dir": self.directory / "model",
            "model_key": "k",
            "out_dir": out,
            "checkpoint_dir": self.checkpoints,
            "checkpoint_every": every,
        }
        return await self.trainer.run(Job(**(given | job)), self.reports.append)

    async def killed(self, monkeypatch: pytest.MonkeyPatch, at: str, **job: Any) -> None:
        """Train in a process of its own that is killed at a failpoint."""
        log = self.directory / "failpoints"
        with monkeypatch.context() as patch:
            patch.setenv(failpoints.VARIABLE, at)
            patch.setenv(failpoints.LOG_VARIABLE, str(log))
            trainer, self.trainer = self.trainer, make_trainer(self.trainer._site)
            with pytest.raises(TrainerFailed) as caught:
                await self.train(**job)
            await self.trainer.close()
            self.trainer = trainer
        assert (caught.value.reason, caught.value.exit_code) == (FailReason.CRASHED, -9)
        assert log.read_text() == at + "\n"
        log.unlink()

    @property
    def notes(self) -> list[tuple[str, int]]:
        """What the daemon's log was told, and at which step."""
        return [(report.note, report.step) for report in self.reports if report.note]

    def steps(self) -> list[int]:
        """The steps taken since this was asked last."""
        path = self.control / "steps"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [int(line.split()[1]) for line in lines]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path, "steady:Steady")
    await init(bench.trainer, tmp_path / "model")
    yield bench
    await bench.trainer.close()


RESUMED = "resumed from a local checkpoint"


@pytest.mark.parametrize(
    ("at", "resumes_at"),
    [
        ("trainer.step@2", 1),
        ("trainer.step@8", 7),
        ("checkpoint.written@6", 5),
        ("checkpoint.renamed@6", 6),
        ("trainer.update@1", 10),
    ],
)
async def test_killed_anywhere_it_gives_the_same_bits(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, at: str, resumes_at: int
) -> None:
    whole = await bench.train(every=0)
    assert not bench.checkpoints.exists()
    await bench.killed(monkeypatch, at)
    bench.steps()
    resumed = await bench.train()
    if resumes_at == 10:
        # There was no telling that no batch would come: the name that the loop sets is missing after it.
        assert "going on from it ended in UnboundLocalError" in bench.notes[-1][0]
        resumes_at = 0
    else:
        assert bench.notes == [(RESUMED, resumes_at)]
    assert bench.steps() == list(range(resumes_at, 10)), "what is in the checkpoint is not done again"
    assert raw_tensors(*resumed.files) == raw_tensors(*whole.files)
    assert (resumed.steps, resumed.metrics, resumed.num_examples) == (whole.steps, whole.metrics, whole.num_examples)
    assert resumed.compute_seconds > 0
    assert NAME in [p.name for p in bench.checkpoints.iterdir()]


async def test_torch_with_everything_that_has_a_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, "steadynet:SteadyNet")
    await init(bench.trainer, tmp_path / "model")
    whole = await bench.train(every=0)
    await bench.killed(monkeypatch, "trainer.step@15")
    resumed = await bench.train()
    assert bench.notes == [(RESUMED, 14)]
    assert raw_tensors(*resumed.files) == raw_tensors(*whole.files)
    assert resumed.metrics == whole.metrics
    # The process was warm, and it is again: what was brought back leaves nothing behind.
    again = await bench.train(every=0)
    assert raw_tensors(*again.files) == raw_tensors(*whole.files)
    await bench.trainer.close()


@pytest.mark.parametrize(("trainer", "killed_at", "steps"), [("steady:Steady", 4, 6), ("steadynet:SteadyNet", 3, 6)])
async def test_limits_of_the_run_and_of_the_site_reach_a_class_and_outlast_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str, killed_at: int, steps: int
) -> None:
    bench = Bench(tmp_path, trainer)
    await init(bench.trainer, tmp_path / "model")
    # Two loops: of 2 and 8 steps in numpy, of 8 and 8 in torch, where the second makes one pass all the same.
    limits: dict[str, Any] = {"asked": {"steps": 6 if trainer.startswith("steady:") else 5, "max_seconds": 1e6}}
    whole = await bench.train(every=0, **limits)
    assert (whole.steps, whole.cut) == (steps, "run steps")
    await bench.killed(monkeypatch, f"trainer.step@{killed_at}", **limits)
    resumed = await bench.train(**limits)
    assert bench.notes == [(RESUMED, killed_at - 1)]
    assert raw_tensors(*resumed.files) == raw_tensors(*whole.files)
    assert (resumed.steps, resumed.examples_seen, resumed.cut) == (whole.steps, whole.examples_seen, whole.cut)
    own = await bench.train(every=0, share={"steps": 4}, **limits)
    assert (own.steps, own.cut) == (5 if steps == 6 and "net" in trainer else 4, "site steps")
    await bench.trainer.close()


async def test_what_is_no_good_is_put_aside_and_training_begins_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = await bench.train(every=0)
    await bench.killed(monkeypatch, "trainer.step@6")
    good = (bench.checkpoints / NAME).read_bytes()
    at = 8 + int.from_bytes(good[:8], "little")
    damaged = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
    for content, steer, why in (
        (damaged, "", "the local checkpoint is damaged (some of its bytes have changed)"),
        (good[:-1], "", "the local checkpoint is damaged ("),
        (good, "broken", "going on from it ended in LookupError"),
    ):
        (bench.checkpoints / NAME).write_bytes(content)
        if steer:
            (bench.control / steer).touch()
        bench.steps()
        result = await bench.train(every=1000)
        (told,) = bench.notes
        assert told[0].startswith(f"training begins at the round's start: {why}")
        assert told[1] == 0
        assert "4711" not in told[0]
        assert bench.steps() == list(range(10))
        assert raw_tensors(*result.files) == raw_tensors(*whole.files)
        assert (bench.checkpoints / "checkpoint.unusable").read_bytes() == content
        assert not (bench.checkpoints / NAME).exists()
        assert "fedclient: training begins" in bench.trainer.log_path.read_text()
    (bench.checkpoints / NAME).write_bytes(good)
    (bench.control / "other").touch()
    other = await bench.train(every=1000)
    assert "its loops over ctx.steps and ctx.batches are not those" in bench.notes[0][0]
    assert other.steps == 11


async def test_another_job_does_not_go_on_from_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.killed(monkeypatch, "trainer.step@4")
    written = (bench.checkpoints / NAME).read_bytes()
    changes: list[dict[str, Any]] = [{"round": 2}, {"version": 1}, {"run": "q"}, {"seed": 1}, {"model_key": "l"}]
    for change in (*changes, {"settings": {"epochs": 1}}):
        (bench.checkpoints / NAME).write_bytes(written)
        result = await bench.train(every=1000, **change)
        assert bench.notes == [("training begins at the round's start: the local checkpoint was another job's", 0)]
        assert result.steps == (6 if "settings" in change else 10)
        assert list(bench.checkpoints.iterdir()) == []


async def test_a_disk_that_refuses_does_no_harm(bench: Bench) -> None:
    whole = await bench.train(every=0)
    bench.checkpoints.touch()
    result = await bench.train()
    (told,) = bench.notes
    assert told[0].startswith("a checkpoint could not be written: File exists")
    assert raw_tensors(*result.files) == raw_tensors(*whole.files)


async def test_gradients_and_evaluations_have_none(bench: Bench) -> None:
    await bench.train(write=Write.GRADIENT)
    await bench.train(kind=JobKind.EVALUATE)
    assert not bench.checkpoints.exists()
