"""Built-in workloads on small real transformers: what they load, how they learn, and that nothing of it is lost."""

from __future__ import annotations

import json
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedclient.trainer.share import Limits, Share
from fedclient.trainer.state import state_of
from fedclient.trainer.text import calibrating
from fedclient.trainer.text.finetuning import FineTuning
from fedclient.trainer.text.pretrained import PretrainedError
from fedclient.trainer.text.rows import DataError
from fedlink.tensors import Role
from tests.support.interrupted import MEMORY, Run, dying
from tests.support.text_sites import built, job, measured, weights, workload
from tests.support.tiny_models import reviews, save_bert, save_llama, write_jsonl

# peft 0.21 asks transformers 5 under an old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]

TEXT = "To be, or not to be, that is the question. "


CLASSIFIER = {"train": "train.jsonl", "test": "test.jsonl", "labels": ["neg", "pos"]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site's directory with two models and data."""
    home = tmp_path_factory.mktemp("text")
    save_llama(home / "llama")
    save_bert(home / "bert")
    (home / "train.txt").write_text(TEXT * 8)
    (home / "test.txt").write_text(TEXT * 2)
    write_jsonl(home / "train.jsonl", reviews(48))
    write_jsonl(home / "test.jsonl", reviews(20, first=100))
    pairs = [{"prompt": f"{i} plus {i} is ", "completion": str(2 * i)} for i in range(12)]
    write_jsonl(home / "pairs.jsonl", pairs)
    return home


def language(home: Path, **table: Any) -> FineTuning:
    data = {"train": "train.txt", "test": "test.txt", "max_length": 32} | table.pop("data", {})
    return workload(home, "causal_lm", model="llama", data=data, **table)


def classifier(home: Path, **table: Any) -> FineTuning:
    return workload(home, "sequence_classification", model="bert", data=CLASSIFIER | table.pop("data", {}), **table)


# --- What is measured


def test_trials_are_as_long_as_the_sites_share_leaves_trainings(home: Path, monkeypatch: pytest.MonkeyPatch):
    lengths = []

    def find(*_: Any, schedule: list[float], **__: Any) -> float:
        lengths.append(len(schedule))
        return 0.1

    monkeypatch.setattr(calibrating, "find_learning_rate", find)
    found = language(home)
    model = built(found)
    for own, asked in ((Limits(), Limits()), (Limits(steps=3), Limits()), (Limits(steps=3), Limits(examples=4))):
        ctx = job(found, learning_rate="auto", steps=20, batch_size=2)
        ctx.expect(Share(asked, own))
        found.calibrate(model, ctx)
    assert lengths == [20, 3, 2]


# --- What is loaded


def test_the_directory_loads_bit_for_bit_and_stays_tied(home: Path, tmp_path: Path):
    save_llama(tmp_path / "llama", shards=True)
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 1
    found = workload(tmp_path, "causal_lm", model="llama", data={"train": "train.txt"})
    model, reference = built(found), AutoModelForCausalLM.from_pretrained(home / "llama")
    assert weights(model) == weights(reference)
    specs, aliases = state_of(model).specs()
    assert aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert {spec.role for spec in specs} == {Role.PARAMETER}
    (tmp_path / "out").mkdir()
    for name, data in found.model_files().items():
        (tmp_path / "out" / name).write_bytes(data)
    model.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "model.safetensors").rename(tmp_path / "out" / "model.safetensors")
    assert weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == weights(reference)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("be")["input_ids"] == found.tokenizer("be")["input_ids"]
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def test_a_bodys_config_becomes_the_classifiers(home: Path):
    found = classifier(home)
    assert found.config.architectures == ["BertModel"]
    built(found)
    assert json.loads(found.model_files()["config.json"])["architectures"] == ["BertForSequenceClassification"]


def test_a_classifiers_head_is_new_and_the_runs(home: Path):
    one, same, other = (built(classifier(home), seed) for seed in (1, 1, 2))
    assert weights(one) == weights(same)
    differ = {name for name, data in weights(one).items() if data != weights(other)[name]}
    assert differ == {"classifier.weight"}
    assert "bert.embeddings.position_ids" not in weights(one), "the file holds it, the model does not"
    assert one.config.id2label == {0: "neg", 1: "pos"}


def test_weights_are_held_in_what_site_toml_says(home: Path):
    model = built(language(home, precision={"weights": "bfloat16"}))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_only_safetensors_of_a_whole_model_are_opened(home: Path, tmp_path: Path):
    def refusal(directory: Path, **table: Any) -> str:
        with pytest.raises(PretrainedError) as caught:
            built(workload(tmp_path, "causal_lm", model=directory.name, data={"train": "t.txt"}, **table))
        return str(caught.value)

    save_llama(tmp_path / "m")
    assert "is no directory" in refusal(tmp_path / "gone")
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    assert "a model and an adapter" in refusal(tmp_path / "m")
    (tmp_path / "m" / "config.json").rename(tmp_path / "config.json")
    assert "holds an adapter" in refusal(tmp_path / "m")
    (tmp_path / "m" / "adapter_config.json").unlink()
    assert "no config.json" in refusal(tmp_path / "m")
    (tmp_path / "config.json").rename(tmp_path / "m" / "config.json")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    assert "neither model.safetensors" in refusal(tmp_path / "m")
    save_bert(tmp_path / "b")
    assert "do not have" in refusal(tmp_path / "b"), "a body without its language model's head is none"


def test_code_beside_a_model_is_not_executed(tmp_path: Path):
    save_llama(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(PretrainedError, match="trust_remote_code"):
        built(workload(tmp_path, "causal_lm", model="m", data={"train": "t.txt"}))
    assert not (tmp_path / "ran").exists()


def test_patterns_choose_what_trains(home: Path):
    patterns = {"train": ["classifier.*", "bert.encoder.layer.1.*"], "freeze": ["*.bias"]}
    found = classifier(home, parameters=patterns)
    model = built(found)
    before = weights(model)
    found.train(model, job(found, steps=2, learning_rate=0.01))
    changed = {name for name, data in weights(model).items() if data != before[name]}
    assert changed
    assert all(n.startswith(("classifier.", "bert.encoder.layer.1.")) and not n.endswith(".bias") for n in changed)
    with pytest.raises(PretrainedError, match=r"'bert\.\*\.99\.\*' fits no parameter"):
        built(classifier(home, parameters={"freeze": ["bert.*.99.*"]}))


# --- Adapters


def test_an_adapter_is_called_what_peft_calls_it(home: Path, tmp_path: Path):
    found = classifier(home, lora={"rank": 4, "targets": ["query", "value"]})
    model = built(found)
    model.save_pretrained(tmp_path / "peft")
    saved = peft.utils.load_peft_weights(str(tmp_path / "peft"))
    names = found.tensor_names(model)
    assert set(names.values()) == set(saved)
    assert {names[n]: d for n, d in weights(model).items() if n in names} == {
        n: t.cpu().numpy().tobytes() for n, t in saved.items()
    }
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(names), "what trains is what peft saves"
    assert found.frozen_base
    files = found.model_files()
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (
        json.loads(files["adapter_config.json"]).items()
        >= {
            k: v for k, v in written.items() if k not in ("base_model_name_or_path", "target_modules", "inference_mode")
        }.items()
    )
    assert str(home) not in files["adapter_config.json"].decode()


def test_the_base_is_the_same_for_every_seed_and_the_adapter_is_the_runs(home: Path):
    one, other = (built(classifier(home, lora={}), seed) for seed in (1, 2))
    differ = {name for name, data in weights(one).items() if data != weights(other)[name]}
    assert differ
    assert all(".lora_A." in name for name in differ)


def test_an_adapter_learns_and_its_base_stays(home: Path, tmp_path: Path):
    found = classifier(home, lora={"rank": 4, "dropout": 0.1}, precision={"gradient_checkpointing": True})
    model = built(found)
    before = weights(model)
    found.train(model, job(found, epochs=6, learning_rate=0.005))
    names = found.tensor_names(model)
    assert {name for name, data in weights(model).items() if data != before[name]} <= set(names)
    assert measured(found, model)["accuracy"] == 1.0
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_bytes(found.model_files()["adapter_config.json"])
    tensors = {names[name]: tensor for name, tensor in model.state_dict().items() if name in names}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    base = AutoModelForSequenceClassification.from_pretrained(home / "bert", num_labels=2)
    again = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    inputs = found.tokenizer("the film was good very", return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(again.eval()(**inputs).logits, model.eval()(**inputs).logits, atol=1e-5)


# --- Learning


def test_a_classifier_learns(home: Path):
    found = classifier(home)
    model = built(found)
    before = measured(found, model)
    ctx = job(found, epochs=4, learning_rate=5e-3, batch_size=4, accumulation=2)
    found.train(model, ctx)
    after = measured(found, model)
    assert (before["accuracy"], after["accuracy"], after["macro_f1"]) == (0.5, 1.0, 1.0)
    assert (ctx.counted(), after["num_examples"], ctx.step) == (48, 20, 4 * 6)
    assert measured(found, model, eval_limit=7)["num_examples"] == 7
    logged = ctx.metrics
    assert logged["tokens_per_second"] > 0
    assert logged["steps_per_second"] > 0
    assert 0 <= logged["data_wait"] < 1
    assert logged["peak_memory"] > 1 << 20


def test_a_language_model_learns_and_its_loss_is_that_over_all_tokens(home: Path):
    found = language(home)
    model = built(found)
    before = measured(found, model)
    blocks = [found.test_corpus.tokens(i) for i in range(len(found.test_corpus))]
    total, count = 0.0, 0
    with torch.no_grad():
        for block in blocks:
            ids = torch.tensor(block.astype("int64"))[None]
            total += float(model(input_ids=ids, labels=ids).loss) * (len(block) - 1)
            count += len(block) - 1
    assert before["num_examples"] == count
    assert before["loss"] == pytest.approx(total / count, rel=1e-5)
    assert before["perplexity"] == pytest.approx(math.exp(before["loss"]))
    ctx = job(found, epochs=3, learning_rate=0.02)
    found.train(model, ctx)
    assert measured(found, model)["perplexity"] < before["perplexity"] / 4
    assert ctx.counted() == int(found.train_corpus.targets.sum())


def rate_in(metrics: dict[str, float]) -> list[float]:
    return [value for name, value in metrics.items() if name == "learning_rate"]


def test_the_schedule_goes_over_the_whole_run(home: Path):
    found = language(home)
    rates: list[float] = []
    for number in (1, 2):
        ctx = job(found, round=number, rounds=2, steps=2, learning_rate=0.01, schedule="linear", warmup=0, floor=0)
        log = ctx.log
        ctx.log = lambda log=log, **m: (rates.extend(rate_in(m)), log(**m))  # type: ignore[method-assign]
        found.train(built(found), ctx)
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_the_schedule_and_the_weight_follow_what_a_site_is_to_do(home: Path):
    found = language(home)
    rates: list[float] = []
    for number, asked in ((1, 3), (2, 6)):
        ctx = job(found, round=number, rounds=2, epochs=50, learning_rate=0.01, schedule="linear", warmup=0, floor=0)
        ctx.begin(Share(Limits(steps=asked), Limits(steps=2 if number == 1 else None)))
        log = ctx.log
        ctx.log = lambda log=log, **m: (rates.extend(rate_in(m)), log(**m))  # type: ignore[method-assign]
        found.train(built(found), ctx)
        assert ctx.step == (2 if number == 1 else 6)
        whole = int(found.train_corpus.targets.sum())
        assert ctx.counted() == ((4 * whole + 3) // 6 if number == 1 else whole)
    # The first round goes down its half in two steps, the second one in six.
    assert rates == pytest.approx([0.01, 0.0075, *(0.005 * (1 - step / 6) for step in range(6))])
    ctx = job(found, epochs=50, batch_size=2, accumulation=2, optimizer="sgd")
    ctx.begin(Share(own=Limits(examples=9)))
    found.train(built(found), ctx)
    assert ctx.cut == "site examples"
    assert 9 <= ctx.examples_seen < 9 + 4


def test_accumulated_batches_are_one_batch(home: Path):
    data = {"train": "pairs.jsonl", "prompt": "prompt", "completion": "completion"}
    results = []
    for batch_size, accumulation in ((12, 1), (5, 3)):
        found = language(home, data=data)
        model = built(found)
        ctx = job(found, optimizer="sgd", learning_rate=0.5, batch_size=batch_size, accumulation=accumulation)
        found.train(model, ctx)
        assert ctx.step == 1
        results.append({n: p.detach().clone() for n, p in model.named_parameters()})
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], atol=1e-6), name


def test_the_gradient_is_of_the_mean_over_everything(home: Path):
    gradients = []
    for size in (3, 12):
        found = language(home, data={"train": "pairs.jsonl", "prompt": "prompt", "completion": "completion"})
        model = built(found)
        ctx = job(found, batch_size=size)
        found.gradient(model, ctx)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        assert ctx.counted() == int(found.train_corpus.targets.sum())
    for name, value in gradients[0].items():
        assert torch.allclose(value, gradients[1][name], atol=1e-6), name


def test_a_site_without_test_data_measures_nothing(home: Path):
    found = workload(home, "causal_lm", model="llama", data={"train": "train.txt"})
    assert measured(found, built(found)) == {"num_examples": 0}


def test_nothing_to_learn_is_an_error(home: Path):
    (home / "empty.jsonl").write_text("")
    found = classifier(home, data={"train": "empty.jsonl"})
    with pytest.raises(DataError, match="nothing to learn"):
        found.train(built(found), job(found))


def test_samples_are_written_at_the_site_and_nowhere_else(home: Path):
    found = language(home, data={"prompts": ["To be", "or"], "sample_tokens": 3})
    model = built(found)
    plain = measured(found, model)
    assert not (home / "kept" / "samples").exists()
    assert measured(found, model, samples=1) == plain
    (path,) = (home / "kept" / "samples").iterdir()
    (line,) = path.read_text().splitlines()
    assert json.loads(line).keys() == {"run", "version", "prompt", "text"}
    assert json.loads(line)["prompt"] == "To be"


# --- Interrupted, repeated


@pytest.mark.parametrize("kind", ["language", "adapter"])
def test_killed_at_any_step_it_ends_with_the_same_bits(home: Path, kind: str):
    def fresh() -> FineTuning:
        if kind == "language":
            return language(home)
        return classifier(home, lora={"rank": 2, "dropout": 0.2})

    given = {"epochs": 2, "batch_size": 2, "accumulation": 2, "learning_rate": 0.01}

    def trained(directory: Path, die_at: int | None, *, every: float = 1e-9) -> Run:
        found = fresh()
        return Run(directory, found.build_model, dying(found, die_at, **given), every=every)

    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        whole = trained(Path(scratch), None, every=0)
        die_at = random.Random(kind).randint(3, len(fresh().train_corpus) - 1)
        killed = trained(Path(scratch), die_at)
        assert killed.interrupted
        resumed = trained(Path(scratch), None)
    assert resumed.notes == ["resumed from a local checkpoint"]
    assert resumed.ctx.metrics["loss"] == whole.ctx.metrics["loss"]
    assert resumed.weights == whole.weights
    assert killed.weights != whole.weights


def test_a_kept_optimizer_outlasts_the_process_and_a_repeated_round_begins_as_the_first_time(
    home: Path,
):
    def after_two(kept: bool, *, fresh: bool, run: str) -> list[dict[str, bytes]]:
        found = language(home)
        results = []
        for number in (1, 2, 2):
            if fresh:
                found = language(home)
            model = built(found)
            ctx = job(found, seed=number, round=number, run=run, steps=2, learning_rate=0.01, keep_optimizer=kept)
            found.train(model, ctx)
            results.append(weights(model))
        return results

    warm, cold, without = after_two(True, fresh=False, run="a"), after_two(True, fresh=True, run="b"), after_two(
        False, fresh=False, run="c"
    )  # fmt: skip
    assert warm == cold
    assert warm[1] == warm[2]
    assert warm[0] == without[0]
    assert warm[1] != without[1]
    assert len(list((home / "kept" / "optimizer").iterdir())) == 4, "two of each run"


def test_a_warm_workload_gives_the_bits_of_a_fresh_one(home: Path):
    found = classifier(home)
    first = built(found)
    found.train(first, job(found, steps=3))
    second, third = built(found), built(classifier(home))
    found.train(second, job(found, seed=6, steps=3))
    other = classifier(home)
    other.train(third, job(other, seed=6, steps=3))
    assert weights(second) == weights(third) != weights(first)
