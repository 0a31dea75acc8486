"""LoRA on a base in 8 or 4 bits: the run is that on the whole one, the layers are bitsandbytes' own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from fedclient.launch import FailReason, Job, JobKind, Progress, TrainerFailed
from fedclient.settings import WorkloadSettings, load_site
from fedclient.trainer.files import write_model
from fedclient.trainer.own_base import OwnBase
from fedclient.trainer.state import State, state_of
from fedclient.trainer.text import quantized
from fedclient.trainer.text.finetuning import FineTuning
from fedclient.trainer.text.pretrained import PretrainedError
from fedlink import failpoints
from fedlink.base import BaseTensor
from tests.support.exported import taken_in, written
from tests.support.interrupted import ALWAYS
from tests.support.text_sites import built, job, measured, workload
from tests.support.tiny_models import byte_tokenizer, reviews, save_bert, save_llama, write_jsonl
from tests.support.trainers import arrays, init, make_trainer, raw_tensors, train

pytest.importorskip("bitsandbytes", reason="pip install 'fedlink[quantized]'")
# peft 0.21 asks transformers 5 under an old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]
KINDS = ("int8", "nf4", "fp4")
TEXTS = {"train": "train.jsonl", "test": "train.jsonl", "packing": False, "max_length": 64}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("quantized")
    save_llama(home / "llama")
    half = AutoModelForCausalLM.from_pretrained(save_llama(home / "half"), dtype=torch.bfloat16)
    half.save_pretrained(home / "half")
    save_bert(home / "bert", head=True)
    write_jsonl(home / "train.jsonl", [{"text": "To be, or not to be. " * (1 + i % 3)} for i in range(12)])
    write_jsonl(home / "reviews.jsonl", reviews(24))
    return home


def language(home: Path, quantize: str, *, model: str = "llama", **table: Any) -> FineTuning:
    lora = {"rank": 2} | table.pop("lora", {})
    return workload(
        home, "causal_lm", model=model, data=TEXTS, lora=lora, precision={"quantize": quantize} | table.pop("held", {})
    )


def state(found: FineTuning, model: Any) -> State:
    return state_of(model, found.tensor_names(model), frozen_base=True)


def base(found: FineTuning, model: Any) -> tuple[BaseTensor, ...]:
    return OwnBase(state(found, model)).tensors(lambda: None)


def adapter(found: FineTuning, model: Any, directory: Path) -> dict[str, Any]:
    """What travels of a model, as init-model writes it."""
    directory.mkdir(parents=True)
    write_model(state(found, model), directory / "adapter_model.safetensors", base(found, model))
    for name, data in found.model_files().items():
        (directory / name).write_bytes(data)
    return raw_tensors(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("model", ["llama", "half"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_site_that_quantizes_has_the_base_and_the_start_of_one_that_does_not(
    home: Path, tmp_path: Path, kind: str, model: str
):
    assert language(home, kind, model="half").pretrained.stored_dtype() is torch.bfloat16
    whole, small = (language(home, q, model=model, lora={"dora": True}) for q in ("none", kind))
    one, other = built(whole), built(small)
    assert base(small, other) == base(whole, one)
    assert {t.dtype for t in base(small, other)} == {"F32"}
    # DoRA's magnitudes are those of the weights as they were, too.
    start = adapter(whole, one, tmp_path / "whole")
    assert adapter(small, other, tmp_path / "small") == start
    assert any("lora_magnitude_vector" in name for name in start)
    dtypes = {p.dtype for p in other.parameters()}
    assert dtypes == {torch.float32, torch.int8 if kind == "int8" else torch.uint8}
    assert measured(small, other)["loss"] == pytest.approx(measured(whole, one)["loss"], rel=0.02)


# On a CPU, DoRA of peft fails on the 8-bit layers of transformers.
@pytest.mark.parametrize(("kind", "dora"), [("int8", False), ("nf4", False), ("nf4", True)])
def test_the_update_is_that_of_transformers_own_quantized_model(home: Path, kind: str, dora: bool):
    found = language(home, kind, lora={"dora": dora})
    ours = built(found)
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    )
    plain = AutoModelForCausalLM.from_pretrained(
        home / "llama", quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    settings = peft.LoraConfig(r=2, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=dora)
    theirs = peft.get_peft_model(plain, settings)
    start = peft.get_peft_model_state_dict(ours)
    # They begin alike, with the magnitudes that we have given DoRA.
    peft.set_peft_model_state_dict(theirs, start)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        quantized.prepare(ours, None)
        ours.eval()
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    results = []
    for model in (ours, theirs):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        results.append(peft.get_peft_model_state_dict(model))
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", ["float32", "bf16"])
def test_it_leaves_its_base_alone_and_is_warm_as_it_is_fresh(home: Path, kind: str, autocast: str):
    """The classifier's layers have biases, which bitsandbytes turns into another dtype if it is let."""
    data = {"train": "reviews.jsonl", "test": "reviews.jsonl", "labels": ["neg", "pos"]}
    table = {"model": "bert", "data": data, "lora": {"rank": 2}}
    table["precision"] = {"quantize": kind, "autocast": autocast, "gradient_checkpointing": True}
    found = workload(home, "sequence_classification", **table)
    model = built(found)
    held = state(found, model)
    held.begin(training=True, device="cpu", frozen=())
    measured(found, model)
    marks, start = held.base_marks(), held.parts()
    assert not any("base_layer" in name for name in start), "no checkpoint holds the base"
    start = {name: part.detach().clone() for name, part in start.items() if name.startswith("tensors/")}
    given = {"steps": 4, "learning_rate": 0.01}
    trained = []
    for _ in range(2):
        for name, part in held.parts().items():
            if name in start:
                part.detach().copy_(start[name])
        found.train(model, job(found, **given))
        trained.append({n: p.detach().clone() for n, p in held.parts().items() if n.startswith("tensors/")})
    measured(found, model)
    assert held.base_marks() == marks
    assert any(not torch.equal(part, start[name]) for name, part in trained[0].items())
    assert all(torch.equal(part, trained[1][name]) for name, part in trained[0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(home: Path, kind: str):
    found = language(home, kind, lora={"rank": 8})
    model = built(found)
    before = measured(found, model)["loss"]
    found.train(model, job(found, steps=20, batch_size=4, learning_rate=0.02))
    assert measured(found, model)["loss"] < before - 0.2


def test_what_was_trained_on_a_quantized_base_is_merged_into_the_whole_one(home: Path, tmp_path: Path):
    found = language(home, "nf4", lora={"dora": True})
    model = built(found)
    found.train(model, job(found, steps=4, learning_rate=0.02))
    trained = adapter(found, model, tmp_path / "adapter")
    taken = taken_in(tmp_path / "adapter")
    written(taken, tmp_path / "out")
    assert raw_tensors(tmp_path / "out" / "adapter_model.safetensors") == trained
    whole = AutoModelForCausalLM.from_pretrained(home / "llama")
    reference = peft.PeftModel.from_pretrained(whole, tmp_path / "out").merge_and_unload()
    written(taken, tmp_path / "merged", home / "llama")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_modules_that_train_whole_are_not_quantized(home: Path):
    found = language(home, "nf4", lora={"targets": ["q_proj"], "modules_to_save": ["down_proj"]})
    model = built(found)
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if n.endswith((".default", "up_proj"))}
    assert {k for n, k in kinds.items() if "down_proj.modules_to_save" in n} == {"Linear"}
    assert {k for n, k in kinds.items() if n.endswith("up_proj")} == {"Linear4bit"}
    whole = language(home, "none", lora={"targets": ["q_proj"], "modules_to_save": ["down_proj"]})
    assert base(found, model) == base(whole, built(whole))
    found.train(model, job(found, steps=2))


def test_rate_and_batch_size_are_measured_on_a_quantized_base(home: Path):
    found = language(home, "nf4")
    model = built(found)
    ctx = job(found, batch_size="auto", learning_rate="auto", effective_batch_size=4, steps=2, rounds=1)
    result = found.calibrate(model, ctx)
    assert result["batch_size"] == 4
    assert 1e-6 < result["learning_rate"] <= 10


def test_what_cannot_be_quantized_is_said(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"quantize is for \[lora\]"):
        WorkloadSettings(trainer="causal_lm", model="llama", data=TEXTS, precision={"quantize": "nf4"})
    table = {"trainer": "causal_lm", "model": "llama", "data": TEXTS, "lora": {}}
    with pytest.raises(ValueError, match='say strategy = "ddp"'):
        WorkloadSettings(**table, precision={"quantize": "nf4"}, distributed={"strategy": "fsdp"})
    with pytest.raises(ValueError, match="compile is for one process"):
        WorkloadSettings(**table, precision={"compile": True}, distributed={"processes": 2})
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "train.jsonl").write_text((home / "train.jsonl").read_text())
    with pytest.raises(PretrainedError, match=r"quantize = 'nf4' .* GPT2LMHeadModel has no linear layer"):
        language(tmp_path, "nf4", model="gpt2").build_model()
    path = tmp_path / "gpt2" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(PretrainedError, match="quantized already"):
        language(tmp_path, "none", model="gpt2").build_model()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ImportError, match=r"needs bitsandbytes, .* pip install 'fedlink\[quantized\]'"):
        language(home, "nf4")


SITE = """
name = "site-1"
[workload.w]
trainer = "causal_lm"
model = "llama"
[workload.w.data]
train = "train.jsonl"
[workload.w.lora]
rank = 2
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_killed_at_a_step_it_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Begun at a site that does not quantize."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    save_llama(tmp_path / "llama")
    write_jsonl(tmp_path / "train.jsonl", [{"text": "To be, or not to be. " * (1 + i % 3)} for i in range(12)])
    path = tmp_path / "site.toml"
    path.write_text(SITE)
    trainer = make_trainer(load_site(path))
    await init(trainer, tmp_path / "model", seed=3)
    await trainer.close()
    path.write_text(SITE + '[workload.w.precision]\nquantize = "nf4"\n')
    site, notes = load_site(path), []

    def training(name: str, **given: Any) -> Job:
        (tmp_path / name).mkdir()
        table = {"kind": JobKind.TRAIN, "client": "site-1", "run": "r", "round": 1, "model_dir": tmp_path / "model"}
        return Job(**table, out_dir=tmp_path / name, settings={"batch_size": 1, "steps": 8}, **given)

    def heard(progress: Progress) -> None:
        notes.extend([progress.note] if progress.note else [])

    checked = {"checkpoint_dir": tmp_path / "checkpoints", "checkpoint_every": ALWAYS}
    trainer = make_trainer(site)
    whole = await trainer.run(training("whole"), heard)
    again = await trainer.run(training("again"), heard)
    await trainer.close()
    assert raw_tensors(*again.files) == raw_tensors(*whole.files)
    with monkeypatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, "trainer.step@6")
        patch.setenv(failpoints.LOG_VARIABLE, str(tmp_path / "failpoints"))
        trainer = make_trainer(site)
        with pytest.raises(TrainerFailed) as caught:
            await trainer.run(training("killed", **checked), heard)
        await trainer.close()
    assert caught.value.reason is FailReason.CRASHED
    trainer = make_trainer(site)
    resumed = await trainer.run(training("resumed", **checked), heard)
    await trainer.close()
    assert notes == ["resumed from a local checkpoint"]
    assert raw_tensors(*resumed.files) == raw_tensors(*whole.files)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_two_processes_on_quantized_bases_give_the_update_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    save_llama(tmp_path / "llama")
    write_jsonl(tmp_path / "train.jsonl", [{"text": "To be, or not to be. " * (1 + i % 3)} for i in range(12)])
    settings, found = {"steps": 3, "batch_size": 4, "optimizer": "sgd", "learning_rate": 0.1}, []
    for name, more in {"one": "", "two": "[workload.w.distributed]\nprocesses = 2\n"}.items():
        (tmp_path / "site.toml").write_text(SITE + '[workload.w.precision]\nquantize = "nf4"\n' + more)
        trainer = make_trainer(load_site(tmp_path / "site.toml"))
        if not found:
            await init(trainer, tmp_path / "model", seed=3)
        result = await train(trainer, tmp_path / "model", tmp_path / name, settings=settings)
        await trainer.close()
        found.append(arrays(*result.files))
    assert max(abs(array).max() for array in found[0].values()) > 0.01
    for name, array in found[0].items():
        assert abs(array - found[1][name]).max() < 1e-6, name


LOADING = """
import sys, threading, time
from pathlib import Path
import bitsandbytes, peft, torch, transformers
from fedclient.trainer.text.pretrained import Pretrained
from fedclient.trainer.text import quantized

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

torch.nn.Linear(8, 8)(torch.zeros(1, 8))
before, seen, over = anonymous(), [0], threading.Event()
def watch():
    while not over.wait(0.002):
        seen.append(anonymous())
threading.Thread(target=watch, daemon=True).start()
found = Pretrained(Path(sys.argv[1]))
model = quantized.load(found, "AutoModelForCausalLM", found.config(), torch.float32, "nf4",
    new_head=False, spared=(), alive=lambda: None).model
print(max(seen) - before, sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_moment_holds_a_whole_copy_of_the_base(tmp_path: Path):
    """404 MB in float32; in four bits it is an eighth, and two layers of 17 MB are in hand, with five times as much."""
    save_llama(tmp_path / "big", hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8)
    full = (tmp_path / "big" / "model.safetensors").stat().st_size
    assert full > 400e6
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(tmp_path / "big")], capture_output=True, text=True, check=True
    )
    peak, _ = map(int, done.stdout.splitlines()[-1].split())
    print(f"peak {peak / 1e6:.0f} MB of {full / 1e6:.0f} MB")
    assert peak < full / 2
