"""The built-in workloads on an accelerator; not run, and reported as such, where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedclient.launch import FailReason, Job, JobKind, Progress, Result, Trainer, TrainerFailed
from fedclient.settings import SiteSettings, load_site
from fedlink import failpoints
from tests.support.interrupted import ALWAYS
from tests.support.tiny_models import save_llama, write_jsonl
from tests.support.trainers import ignore, init, raw_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.timeout(300),
]
SITE = """
name = "site-1"
devices = ["cuda:0"]
[workload.w]
trainer = "causal_lm"
model = "llama"
metrics = ["*"]
[workload.w.data]
train = "train.jsonl"
test = "train.jsonl"
text = "text"
max_length = 128
"""
LORA = """
[workload.w.lora]
rank = 8
"""
CHECKPOINTING = """
[workload.w.precision]
gradient_checkpointing = true
weights = "bfloat16"
"""
SETTINGS = {"learning_rate": 0.005, "batch_size": 8, "steps": 40, "schedule": "constant"}
BIG = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}


def site(directory: Path, tables: str) -> SiteSettings:
    save_llama(directory / "llama", **BIG)
    rows = [{"text": f"The patient of ward {i % 7} was seen on day {i % 5} and sent home. " * 4} for i in range(64)]
    write_jsonl(directory / "train.jsonl", rows)
    (directory / "site.toml").write_text(SITE + tables)
    return load_site(directory / "site.toml")


def cuda(site: SiteSettings) -> Trainer:
    return Trainer(site, "w", "cuda:0", site.state_dir)


def training(directory: Path, name: str, **given: Any) -> Job:
    out = directory / name
    out.mkdir()
    table = {"kind": JobKind.TRAIN, "client": "site-1", "run": "r", "round": 1, "rounds": 2, "settings": SETTINGS}
    return Job(**(table | {"model_dir": directory / "model", "out_dir": out} | given))


async def measured(trainer: Trainer, directory: Path) -> Result:
    return await trainer.run(Job(JobKind.EVALUATE, client="site-1", model_dir=directory / "model"), ignore)


@pytest.mark.parametrize("tables", ["", LORA, CHECKPOINTING + LORA], ids=["full", "lora", "checkpointing"])
async def test_it_learns_and_tells_what_it_takes_of_the_device(tmp_path: Path, tables: str):
    trainer = cuda(site(tmp_path, tables))
    try:
        await init(trainer, tmp_path / "model", seed=3)
        before = await measured(trainer, tmp_path)
        result = await trainer.run(training(tmp_path, "out"), ignore)
    finally:
        await trainer.close()
    assert result.steps == 40
    assert result.metrics["loss"] < 0.7 * before.metrics["loss"]
    assert result.metrics["peak_device_memory"] > 1e6
    assert result.metrics["tokens_per_second"] > 0
    assert result.device_memory_bytes > 1_000_000


async def test_killed_at_a_step_it_goes_on_from_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On an accelerator the sums of parallel kernels may differ in their last bits."""
    here = site(tmp_path, LORA)

    def checked(name: str) -> Job:
        return training(tmp_path, name, checkpoint_dir=tmp_path / "checkpoints", checkpoint_every=ALWAYS)

    trainer = cuda(here)
    await init(trainer, tmp_path / "model", seed=3)
    whole = await trainer.run(training(tmp_path, "whole"), ignore)
    await trainer.close()
    with monkeypatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, "trainer.step@17")
        patch.setenv(failpoints.LOG_VARIABLE, str(tmp_path / "failpoints"))
        trainer = cuda(here)
        with pytest.raises(TrainerFailed) as caught:
            await trainer.run(checked("killed"), ignore)
        await trainer.close()
    assert caught.value.reason is FailReason.CRASHED
    notes: list[str] = []

    def heard(progress: Progress) -> None:
        notes.extend([progress.note] if progress.note else [])

    trainer = cuda(here)
    resumed = await trainer.run(checked("resumed"), heard)
    await trainer.close()
    assert notes == ["resumed from a local checkpoint"]
    assert resumed.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-3)
    assert raw_tensors(*resumed.files).keys() == raw_tensors(*whole.files).keys()
