"""A script in its real trainer process: what it finds there, what it gives, and every way it can go wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from fedclient import launch
from fedclient.launch import FailReason, Job, JobKind, Progress, Trainer, TrainerFailed
from fedclient.trainer import derive_seed
from tests.support.trainers import arrays, evaluate, ignore, init, make_site, make_trainer, train


@pytest.fixture
async def trainer(tmp_path: Path) -> AsyncIterator[Trainer]:
    site = make_site(tmp_path / "site", "bydaemon.py", args=("--first", "second"))
    (tmp_path / "site" / "helper.py").write_text("runs = 0\n")
    trainer = make_trainer(site)
    yield trainer
    await trainer.close()


@pytest.mark.timeout(300)
async def test_each_training_is_a_run_from_start_to_end(trainer: Trainer, tmp_path: Path) -> None:
    description = await trainer.describe()
    assert description.abilities == ("train", "evaluate")
    assert description.settings_schema["properties"]["steps"] == {"type": "integer", "default": 3}
    model = await init(trainer, tmp_path / "model")
    for number in (1, 2):
        result = await train(trainer, model, tmp_path / f"u{number}", round=number, settings={"steps": 2})
        draw = np.random.default_rng(derive_seed(0, "site-1", number) % (1 << 32)).normal()
        found = arrays(*result.files)
        assert found["w"].tolist() == [np.float32(draw) + np.float32(draw)] * 4
        assert found["count"] == 2
        assert (result.num_examples, result.steps, result.metrics) == (5, 2, {"loss": 0.25})
        assert trainer.log_path.read_text().count("the script's end\n") == number
    measured = await evaluate(trainer, model, tmp_path / "e")
    assert (measured.num_examples, measured.metrics) == (7, {"loss": 0.0})
    # Building and measuring go no further than load; what the script says with `finally` is done.
    assert (tmp_path / "site" / "begun").read_text() == "x" * 4
    assert trainer.log_path.read_text().count("the script's finally") == 2
    limited = await train(trainer, model, tmp_path / "l", max_steps=1)
    assert (limited.steps, arrays(*limited.files)["count"]) == (1, 1)


@pytest.mark.timeout(300)
async def test_what_goes_wrong_is_said_and_the_next_run_is_not_the_worse_for_it(
    trainer: Trainer, tmp_path: Path
) -> None:
    model = await init(trainer, tmp_path / "model")
    expected = {
        "no_load": ("ScriptError", "bydaemon.py ended without calling load (is that behind a condition"),
        "no_save": ("ScriptError", "bydaemon.py ended without calling save"),
        "raise": ("ValueError", "secret patient"),
        "exit": ("ScriptError", "bydaemon.py called sys.exit(3)"),
        "late": ("KeyError", "'late'"),
        "twice": ("ScriptError", "bydaemon.py: load was called before"),
        "other": ("ScriptError", "bydaemon.py: save was given another model than load"),
    }
    for mode, (kind, words) in expected.items():
        with pytest.raises(TrainerFailed) as caught:
            await train(trainer, model, tmp_path / mode, settings={"mode": mode})
        assert (caught.value.reason, caught.value.exception_class) == (FailReason.EXCEPTION, kind), mode
        assert caught.value.output.startswith(words), mode
        assert "secret" not in caught.value.message
    fine = await train(trainer, model, tmp_path / "good")
    assert arrays(*fine.files)["count"] == 3
    log = trainer.log_path.read_text()
    assert 'bydaemon.py", line' in log
    assert "ValueError: secret patient" in log
    job = Job(JobKind.EVALUATE, model_dir=model, settings={"mode": "uncounted"})
    with pytest.raises(TrainerFailed) as caught:
        await trainer.run(job, ignore)
    assert "what load is given as evaluate returns no num_examples" in caught.value.output


async def test_a_script_that_counts_its_steps_can_be_cancelled_and_is_killed_when_it_hangs(
    trainer: Trainer, tmp_path: Path
) -> None:
    model = await init(trainer, tmp_path / "model")
    began, reports = asyncio.Event(), list[Progress]()

    def heard(progress: Progress) -> None:
        reports.append(progress)
        if progress.step > 3:
            began.set()

    (tmp_path / "out").mkdir()
    job = Job(JobKind.TRAIN, model_dir=model, out_dir=tmp_path / "out", settings={"mode": "endless"})
    running = asyncio.create_task(trainer.run(job, heard))
    await began.wait()
    pid = trainer._child._process.pid
    await trainer.cancel()
    with pytest.raises(TrainerFailed) as caught:
        await running
    assert caught.value.reason is FailReason.CANCELLED
    assert reports[-1].metrics.keys() == {"loss"}
    assert (await train(trainer, model, tmp_path / "u")).steps == 3
    assert trainer._child._process.pid == pid
    assert "the script's finally" in trainer.log_path.read_text()
    # It is watched for hangs between two of them.
    trainer._workload = trainer._workload.model_copy(update={"stall_after": 2.0})
    with pytest.raises(TrainerFailed) as caught:
        await train(trainer, model, tmp_path / "hangs", settings={"mode": "hangs"})
    assert caught.value.reason is FailReason.STALLED


async def test_one_that_counts_none_is_not_watched_for_hangs_and_is_killed_when_it_is_cancelled(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "CANCEL_GRACE", 0.5)
    model = await init(trainer, tmp_path / "model")
    # Only now: importing counts, too, and takes long on a busy machine.
    trainer._workload = trainer._workload.model_copy(update={"stall_after": 2.0})
    quiet = await train(trainer, model, tmp_path / "quiet", settings={"mode": "quiet", "pause": 3.0, "steps": 1})
    assert quiet.num_examples == 5
    (tmp_path / "out").mkdir()
    job = Job(JobKind.TRAIN, model_dir=model, out_dir=tmp_path / "out", settings={"mode": "quiet", "pause": 30.0})
    began = asyncio.Event()
    running = asyncio.create_task(trainer.run(job, lambda _: began.set()))
    await began.wait()
    await trainer.cancel()
    with pytest.raises(TrainerFailed) as caught:
        await running
    assert caught.value.reason is FailReason.CANCELLED


async def test_a_script_that_counts_its_steps_keeps_the_sites_share(trainer: Trainer, tmp_path: Path) -> None:
    model = await init(trainer, tmp_path / "model")
    result = await train(trainer, model, tmp_path / "u", settings={"steps": 5}, share={"steps": 2})
    assert (result.steps, result.num_examples, result.cut) == (2, 2, "site steps")
    assert arrays(*result.files)["count"] == 2
