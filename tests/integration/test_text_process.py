"""A built-in workload in its real trainer process, from what site.toml says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedclient.checks.finding import Outcome
from fedclient.checks.readiness import readiness
from fedclient.launch import FailReason, Job, JobKind, Progress, Trainer, TrainerFailed
from fedclient.settings import SiteSettings, load_site
from fedlink import failpoints
from tests.support.interrupted import ALWAYS
from tests.support.tiny_models import reviews, save_bert, write_jsonl
from tests.support.trainers import ignore, init, make_trainer, raw_tensors

SITE = """
name = "site-1"
[workload.w]
trainer = "sequence_classification"
model = "bert"
[workload.w.data]
train = ["a.jsonl", "b.jsonl"]
test = "test.jsonl"
labels = ["neg", "pos"]
[workload.w.parameters]
freeze = ["bert.embeddings.*"]
"""
SETTINGS = {"learning_rate": 0.005, "batch_size": 4, "epochs": 2}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteSettings:
    # Threads would wait for each other longer than they compute.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    save_bert(tmp_path / "bert")
    write_jsonl(tmp_path / "a.jsonl", reviews(24))
    write_jsonl(tmp_path / "b.jsonl", reviews(16, first=24))
    write_jsonl(tmp_path / "test.jsonl", reviews(10, first=100))
    (tmp_path / "site.toml").write_text(SITE)
    return load_site(tmp_path / "site.toml")


def training(directory: Path, name: str, **given: Any) -> Job:
    out = directory / name
    out.mkdir()
    table = {"kind": JobKind.TRAIN, "client": "site-1", "run": "r", "round": 1, "rounds": 2, "settings": SETTINGS}
    return Job(**(table | {"model_dir": directory / "model", "out_dir": out} | given))


async def test_described_trained_and_measured_in_one_process(site: SiteSettings, tmp_path: Path):
    trainer = make_trainer(site)
    try:
        assert "learning_rate" in (await trainer.describe()).settings_schema["properties"]
        data = (await trainer.run(Job(JobKind.DESCRIBE), ignore)).data
        assert data["train"]["examples"] == 40
        assert data["train"]["labels"] == {"neg": 20, "pos": 20}
        assert data["in_both"] > 0
        found = readiness("w", data)
        assert found.outcome is Outcome.WARNING
        assert "w: train: 40 examples, 280 tokens (median 7, 95 % up to 7, longest 7)" in found.found
        assert "in train and in test" in found.found
        assert found.details == {"w": data}
        await init(trainer, tmp_path / "model", seed=3)
        result = await trainer.run(training(tmp_path, "out"), ignore)
        assert (result.num_examples, result.steps) == (40, 20)
        assert not any("embeddings" in name for name in raw_tensors(*result.files)), "what is frozen is not sent"
        assert result.metrics["loss"] > 0
        measured = await trainer.run(Job(JobKind.EVALUATE, client="site-1", model_dir=tmp_path / "model"), ignore)
        assert (measured.num_examples, measured.metrics["accuracy"]) == (10, 0.5)
    finally:
        await trainer.close()


@pytest.mark.slow
async def test_killed_at_a_step_it_goes_on_to_the_same_bits(
    site: SiteSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def checked(name: str) -> Job:
        return training(tmp_path, name, checkpoint_dir=tmp_path / "checkpoints", checkpoint_every=ALWAYS)

    trainer: Trainer = make_trainer(site)
    await init(trainer, tmp_path / "model", seed=3)
    whole = await trainer.run(training(tmp_path, "whole"), ignore)
    await trainer.close()
    with monkeypatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, "trainer.step@17")
        patch.setenv(failpoints.LOG_VARIABLE, str(tmp_path / "failpoints"))
        trainer = make_trainer(site)
        with pytest.raises(TrainerFailed) as caught:
            await trainer.run(checked("killed"), ignore)
        await trainer.close()
    assert caught.value.reason is FailReason.CRASHED
    notes: list[str] = []

    def heard(progress: Progress) -> None:
        notes.extend([progress.note] if progress.note else [])

    trainer = make_trainer(site)
    resumed = await trainer.run(checked("resumed"), heard)
    await trainer.close()
    assert notes == ["resumed from a local checkpoint"]
    assert resumed.metrics["loss"] == whole.metrics["loss"]
    assert raw_tensors(*resumed.files) == raw_tensors(*whole.files)


@pytest.mark.slow
async def test_what_is_wrong_with_the_data_is_said_by_file_and_row(site: SiteSettings, tmp_path: Path):
    write_jsonl(tmp_path / "b.jsonl", [{"text": "secret", "label": "posh"}])
    trainer = make_trainer(site)
    with pytest.raises(TrainerFailed) as caught:
        await trainer.run(Job(JobKind.DESCRIBE), ignore)
    await trainer.close()
    assert caught.value.exception_class == "DataError"
    first = caught.value.output.partition("\n")[0]
    assert first.endswith("b.jsonl, row 1: its label is neither one of the 2 labels nor the number of one, from 0")
