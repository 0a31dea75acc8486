"""A built-in workload in its real trainer process, from what site.toml says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from fedclient.checks.finding import Outcome
from fedclient.checks.readiness import readiness
from fedclient.launch import FailReason, Job, JobKind, Progress, Trainer, TrainerFailed
from fedclient.local import init_model
from fedclient.policy import Terms
from fedclient.settings import SiteSettings, load_site
from fedlink import failpoints
from fedlink.base import read_base
from fedlink.errors import FedlinkError
from fedlink.tensors import read_header
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
# peft 0.21 asks transformers 5 under an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TARGETS = ["query", "value"]
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


@pytest.mark.timeout(300)
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
        of_data = {name: value for name, value in result.metrics.items() if name.startswith("data.")}
        assert of_data["data.examples"] == 40
        assert {n: v for n, v in of_data.items() if "label" in n} == {"data.labels.neg": 20, "data.labels.pos": 20}
        terms = Terms.of("w", site.workload["w"], await trainer.describe())
        assert not terms.let_out(of_data), "it stays at the site unless the site says otherwise"
        measured = await trainer.run(Job(JobKind.EVALUATE, client="site-1", model_dir=tmp_path / "model"), ignore)
        assert (measured.num_examples, measured.metrics["accuracy"]) == (10, 0.5)
    finally:
        await trainer.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_an_adapter_that_peft_saved_begins_a_run(site: SiteSettings, tmp_path: Path):
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=2)
    torch.manual_seed(8)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=32, task_type="SEQ_CLS", target_modules=TARGETS)
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    adapted.save_pretrained(tmp_path / "peft")
    text = (
        SITE.partition("[workload.w.parameters]")[0] + f"[workload.w.lora]\nrank = 4\ntargets = {json.dumps(TARGETS)}\n"
    )
    (tmp_path / "site.toml").write_text(text.replace("rank = 4", "rank = 2"))
    with pytest.raises(FedlinkError, match=r"has rank 4 instead of 2, alpha 32 instead of 16.0: say the same in \[w"):
        await init_model(load_site(tmp_path / "site.toml"), "w", tmp_path / "start", weights=tmp_path / "peft")
    assert not (tmp_path / "start").exists()
    (tmp_path / "site.toml").write_text(text + "alpha = 32\n")
    await init_model(load_site(tmp_path / "site.toml"), "w", tmp_path / "start", weights=tmp_path / "peft")
    written = tmp_path / "start" / "adapter_model.safetensors"
    assert raw_tensors(written) == raw_tensors(tmp_path / "peft" / "adapter_model.safetensors")
    assert read_base(read_header(written)), "and the run will know its base"


@pytest.mark.slow
@pytest.mark.timeout(600)
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
    assert first.endswith(
        "b.jsonl, row 1: its label is neither one of the 2 labels (neg, pos) nor the number of one, from 0"
    )
