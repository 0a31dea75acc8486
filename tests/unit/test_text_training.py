"""Schedules, decay groups, optimizers, metrics and precision of the built-in workloads."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

import numpy as np
import pytest
import torch

from fedclient.settings import WorkloadSettings
from fedclient.text_settings import (
    CausalSettings,
    ClassificationSettings,
    LoraSettings,
    ParameterSettings,
    PrecisionSettings,
)
from fedclient.trainer.options import (
    CausalOptions,
    ClassificationOptions,
    LoraOptions,
    ParameterOptions,
    PrecisionOptions,
)
from fedclient.trainer.schema import parse_settings, settings_schema
from fedclient.trainer.text.causal_lm import CausalLm
from fedclient.trainer.text.classification import SequenceClassification
from fedclient.trainer.text.metrics import Name, confusion, further_metrics, macro_f1
from fedclient.trainer.text.optimizers import Name as Optimizer
from fedclient.trainer.text.optimizers import decay_groups, make_optimizer
from fedclient.trainer.text.precision import Precision, resolved
from fedclient.trainer.text.schedules import Schedule
from fedlink.config import explain
from fedlink.settings_schema import parse_schema

# --- Schedules


def test_warm_up_and_linear_decay_by_hand():
    schedule = Schedule("linear", 8.0, total=10, warmup=0.2)
    assert [schedule.rate(step) for step in range(11)] == [4, 8, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert schedule.rate(1000) == 0


def test_cosine_by_hand_and_its_floor():
    schedule = Schedule("cosine", 4.0, total=4, floor=0.5)
    assert [round(schedule.rate(step), 6) for step in range(5)] == [4, 3.707107, 3, 2.292893, 2]


def test_constant_and_a_run_of_unknown_length():
    assert {Schedule("constant", 2.0, total=5).rate(step) for step in range(9)} == {2.0}
    assert Schedule("cosine", 2.0, total=0, warmup=0.5).rate(7) == 2.0


def test_a_warm_up_of_the_whole_run():
    schedule = Schedule("cosine", 2.0, total=2, warmup=1.0)
    assert [schedule.rate(step) for step in range(3)] == [1, 2, 0]


# --- Optimizers


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(3, 2)
        self.norm = torch.nn.LayerNorm((2, 2))
        self.linear = torch.nn.Linear(2, 2)
        self.frozen = torch.nn.Linear(2, 2).requires_grad_(requires_grad=False)
        self.head = torch.nn.Linear(2, 3, bias=False)
        self.head.weight = self.embed.weight


def names(model: torch.nn.Module, group: dict) -> list[str]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [by_id[id(p)] for p in group["params"]]


def test_biases_and_norms_do_not_decay_and_tied_weights_are_there_once():
    model = Net()
    decayed, spared = decay_groups(model, 0.3)
    assert names(model, decayed) == ["embed.weight", "linear.weight"]
    assert names(model, spared) == ["norm.weight", "norm.bias", "linear.bias"]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    with pytest.raises(ValueError, match="no parameter"):
        decay_groups(model.requires_grad_(requires_grad=False), 0.1)


@pytest.mark.parametrize("name", get_args(Optimizer))
def test_every_optimizer_takes_a_step(name: str):
    settings = CausalLm.Settings(optimizer=name, learning_rate=0.1)
    model = Net()
    before = model.linear.weight.detach().clone()
    optimizer = make_optimizer(model, settings)
    model.head(model.linear(model.norm(model.embed(torch.tensor([0, 1]))))).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.linear.weight)


# --- Metrics


def test_macro_f1_by_hand():
    counts = confusion(np.array([0, 1, 1, 2]), np.array([0, 0, 1, 1]), 4)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert macro_f1(counts) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert macro_f1(np.zeros((2, 2), np.int64)) == 0.0


def test_metrics_of_torchmetrics():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 1, 1, 1])
    found = further_metrics(get_args(Name), logits, labels)
    assert set(found) == set(get_args(Name))
    assert found["auroc"] == 1.0
    assert found["balanced_accuracy"] == pytest.approx((1 + 2 / 3) / 2)


# --- Settings


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (CausalSettings, CausalOptions),
        (ClassificationSettings, ClassificationOptions),
        (LoraSettings, LoraOptions),
        (ParameterSettings, ParameterOptions),
        (PrecisionSettings, PrecisionOptions),
    ],
)
def test_what_site_toml_takes_is_what_the_trainer_reads(settings, options):
    assert set(settings.model_fields) == {field.name for field in fields(options)}
    for field in fields(options):
        if field.name != "train" or settings is ParameterSettings:
            assert settings.model_fields[field.name].default == field.default, field.name


@pytest.mark.parametrize("workload", [CausalLm, SequenceClassification])
def test_settings_are_of_the_closed_subset_and_have_defaults(workload):
    schema = settings_schema(workload.Settings)
    assert "required" not in schema
    parse_schema(__import__("json").dumps(schema))
    parsed = parse_settings(workload.Settings, {"steps": 3, "optimizer": "adafactor", "learning_rate": 1})
    assert (parsed.steps, parsed.optimizer, parsed.learning_rate) == (3, "adafactor", 1.0)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"trainer": "causal-lm"}, "neither module:Class nor one of causal_lm, sequence_classification"),
        ({"trainer": "causal_lm", "data": {"train": "a"}}, "needs model"),
        ({"trainer": "causal_lm", "model": "m"}, "needs a table data with train"),
        ({"trainer": "causal_lm", "model": "m", "data": {"train": []}}, "data: train: neither a text nor"),
        ({"trainer": "causal_lm", "model": "m", "data": {"train": "a", "txt": "b"}}, "txt: unknown key"),
        ({"trainer": "causal_lm", "model": "m", "data": {"train": "a", "prompt": "b"}}, "prompt needs completion"),
        ({"trainer": "causal_lm", "model": "m", "data": {"train": "a", "completion": "b"}}, "completion needs prompt"),
        (
            {"trainer": "causal_lm", "model": "m", "data": {"train": "a", "text": "b", "messages": "c"}},
            "text and messages contradict each other",
        ),
        (
            {"trainer": "causal_lm", "model": "m", "data": {"train": "a", "messages": "c", "packing": True}},
            "packing cuts texts anywhere",
        ),
        ({"trainer": "causal_lm", "model": "m", "data": {"train": "a", "template": "{a.b}"}}, "as {name}"),
        ({"trainer": "causal_lm", "model": "m", "data": {"train": "a", "template": "{a"}}, "template:"),
        (
            {"trainer": "sequence_classification", "model": "m", "data": {"train": "a", "labels": ["x", "x"]}},
            "at least two, each once",
        ),
        ({"trainer": "m:C", "lora": {"rank": 0}}, "lora.rank"),
        ({"trainer": "m:C", "lora": {}, "parameters": {}}, "contradict each other"),
        ({"trainer": "m:C", "precision": {"autocast": "fp8"}}, "precision.autocast"),
    ],
)
def test_what_is_wrong_with_a_workload_is_said(table, words):
    with pytest.raises(ValueError) as caught:
        WorkloadSettings.model_validate(table)
    assert words in explain(caught.value, WorkloadSettings)


def test_a_class_of_ones_own_keeps_its_free_table_and_gets_the_others():
    settings = WorkloadSettings.model_validate(
        {"trainer": "m:C", "model": "m", "data": {"any": [1]}, "lora": {"rank": 4}, "precision": {"autocast": "bf16"}}
    )
    assert settings.data == {"any": [1]}
    assert settings.options == {"model": "m", "lora": {"rank": 4}, "precision": {"autocast": "bf16"}}


# --- Precision


def test_what_auto_means(monkeypatch: pytest.MonkeyPatch):
    for able, meant in (({"avx512_bf16": True}, "bf16"), ({}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert resolved("auto", "cpu") == meant
    assert resolved("auto", "mps") == "float32"
    assert resolved("fp16", "cpu") == "fp16"


def test_autocast_computes_in_what_is_asked_for():
    product = torch.nn.Linear(4, 4)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("float32", torch.float32)):
        precision = Precision(name, "cpu")
        with precision.autocast():
            assert product(torch.zeros(1, 4)).dtype is dtype
        assert not precision.scaler.is_enabled()
