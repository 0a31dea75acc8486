"""The built-in workloads on a GPU; not run, and reported as such, where there is none."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedclient.launch import FailReason, Job, JobKind, Progress, Result, Trainer, TrainerFailed
from fedclient.settings import SiteSettings, load_site
from fedclient.trainer.torch_state import best_device
from fedlink import failpoints
from tests.support import gpu
from tests.support.interrupted import ALWAYS
from tests.support.tiny_models import save_llama, write_jsonl
from tests.support.trainers import arrays, ignore, init, make_site, raw_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
]
SITE = """
name = "site-1"
devices = ["auto"]
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
HALF = """
[workload.w.precision]
autocast = "bf16"
weights = "bfloat16"
"""
CHECKPOINTING = HALF + "gradient_checkpointing = true\n"
QUANTIZED = """
[workload.w.precision]
autocast = "bf16"
gradient_checkpointing = true
quantize = "{}"
"""
COMPILED = """
[workload.w.precision]
compile = true
"""
ONE_GPU_FSDP = """
[workload.w.distributed]
strategy = "fsdp"
"""
CASES = {
    "float32": '[workload.w.precision]\nautocast = "float32"\n',
    "full": "",
    "bf16": HALF,
    "lora": LORA,
    "dora": LORA + "dora = true\n",
    "checkpointing": CHECKPOINTING + LORA,
    "int8": QUANTIZED.format("int8") + LORA,
    "nf4": QUANTIZED.format("nf4") + LORA,
    "nf4-dora": QUANTIZED.format("nf4") + LORA + "dora = true\n",
    "compile": COMPILED,
    "compile-nf4": QUANTIZED.format("nf4") + "compile = true\n" + LORA,
    "one-gpu-fsdp": ONE_GPU_FSDP,
}
WIDE = {"float32", "full", "lora", "dora", "compile", "one-gpu-fsdp"}
"""Those whose loss is that in float32 nearly; the others round."""
SETTINGS = {"learning_rate": 0.005, "batch_size": 8, "steps": 40, "schedule": "constant"}
BIG = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}


def site(directory: Path, tables: str) -> SiteSettings:
    save_llama(directory / "llama", **BIG)
    rows = [{"text": f"The patient of ward {i % 7} was seen on day {i % 5} and sent home. " * 4} for i in range(64)]
    write_jsonl(directory / "train.jsonl", rows)
    (directory / "site.toml").write_text(SITE + tables)
    return load_site(directory / "site.toml")


def on_gpu(site: SiteSettings) -> Trainer:
    return Trainer(site, "w", best_device(), site.state_dir)


def training(directory: Path, name: str, **given: Any) -> Job:
    out = directory / name
    out.mkdir()
    table = {"kind": JobKind.TRAIN, "client": "site-1", "run": "r", "round": 1, "rounds": 2, "settings": SETTINGS}
    return Job(**(table | {"model_dir": directory / "model", "out_dir": out} | given))


async def measured(trainer: Trainer, directory: Path) -> Result:
    return await trainer.run(Job(JobKind.EVALUATE, client="site-1", model_dir=directory / "model"), ignore)


@pytest.mark.parametrize("case", CASES)
async def test_it_learns_and_tells_what_it_takes_of_the_device(
    tmp_path: Path, case: str, record_property: Callable[[str, object], None]
):
    if "quantize" in CASES[case] and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("pip install 'fedlink[quantized]'")
    trainer = on_gpu(site(tmp_path, CASES[case]))
    try:
        await init(trainer, tmp_path / "model", seed=3)
        before = await measured(trainer, tmp_path)
        first = await trainer.run(training(tmp_path, "out"), ignore)
        # What begins slowly is over by then: kernels are loaded, and compiled.
        second = await trainer.run(training(tmp_path, "again"), ignore)
    finally:
        await trainer.close()
    gpu.record(record_property, best_device(), dict(first.metrics) | dict(second.metrics))
    for result in (first, second):
        assert result.steps == 40
        assert result.metrics["loss"] < 0.7 * before.metrics["loss"]
        assert result.metrics["peak_device_memory"] > 1e6
        assert result.metrics["tokens_per_second"] > 0
        assert result.device_memory_bytes > 1_000_000
    # The order of sums in parallel kernels alone differs.
    assert second.metrics["loss"] == pytest.approx(first.metrics["loss"], rel=1e-3 if case in WIDE else 1e-2)
    assert ("compile_seconds" in first.metrics) is ("compile" in case)
    assert "compile_seconds" not in second.metrics


async def test_killed_at_a_step_it_goes_on_from_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On an accelerator the sums of parallel kernels may differ in their last bits."""
    here = site(tmp_path, LORA)

    def checked(name: str) -> Job:
        return training(tmp_path, name, checkpoint_dir=tmp_path / "checkpoints", checkpoint_every=ALWAYS)

    trainer = on_gpu(here)
    await init(trainer, tmp_path / "model", seed=3)
    whole = await trainer.run(training(tmp_path, "whole"), ignore)
    await trainer.close()
    with monkeypatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, "trainer.step@17")
        patch.setenv(failpoints.LOG_VARIABLE, str(tmp_path / "failpoints"))
        trainer = on_gpu(here)
        with pytest.raises(TrainerFailed) as caught:
            await trainer.run(checked("killed"), ignore)
        await trainer.close()
    assert caught.value.reason is FailReason.CRASHED
    notes: list[str] = []

    def heard(progress: Progress) -> None:
        notes.extend([progress.note] if progress.note else [])

    trainer = on_gpu(here)
    resumed = await trainer.run(checked("resumed"), heard)
    await trainer.close()
    assert notes == ["resumed from a local checkpoint"]
    assert resumed.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-3)
    assert raw_tensors(*resumed.files).keys() == raw_tensors(*whole.files).keys()


async def moved(directory: Path, model: Path, **distributed: Any) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The update of a class of one's own, and what it logged."""
    directory.mkdir()
    site = make_site(directory / "site", "pairs:Pairs", data={}, distributed=distributed, stall_after=300.0)
    site = site.model_copy(update={"devices": ("auto",)})
    trainer = on_gpu(site)
    try:
        if not model.exists():
            await init(trainer, model, seed=3)
        out = directory / "out"
        out.mkdir()
        job = Job(JobKind.TRAIN, client="site-1", run="r", round=1, seed=5, model_dir=model, out_dir=out)
        result = await trainer.run(job, ignore)
    finally:
        await trainer.close()
    return arrays(*result.files), dict(result.metrics)


async def test_fsdp_on_one_gpu_holds_shares_and_gives_the_update_of_plain_training(tmp_path: Path):
    wanted, plain = await moved(tmp_path / "plain", tmp_path / "model", processes=1)
    found, shares = await moved(tmp_path / "fsdp", tmp_path / "model", processes=1, strategy="fsdp")
    assert (plain["shares"], shares["shares"]) == (0, 6)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
async def test_two_gpus_give_the_update_of_one(tmp_path: Path, strategy: str):
    if torch.accelerator.device_count() < 2:
        pytest.skip("fewer than two GPUs")
    wanted, _ = await moved(tmp_path / "one", tmp_path / "model", processes=1)
    found, logged = await moved(tmp_path / "two", tmp_path / "model", processes=2, strategy=strategy)
    assert logged["seen"] < 40, "each has seen its part alone"
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=2e-5, err_msg=name)
