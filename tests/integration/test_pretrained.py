"""Pretrained models in and out: what transformers and peft save is taken in, and what comes out they load, the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedclient.trainer.files import write_model
from fedclient.trainer.own_base import OwnBase
from fedclient.trainer.state import state_of
from fedlink import tensors as fedlink_tensors
from fedlink.base import BASE_KEY
from fedlink.errors import FedlinkError, Reason
from fedlink.tensors import read_header
from tests.support.exported import taken_in, written

# What the libraries warn of in each other is not our business.
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]


BERT = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **options))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(2)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def same(a: torch.nn.Module, b: torch.nn.Module, **tolerance: float) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        torch.testing.assert_close(tensor, second[name], **({"rtol": 0, "atol": 0} | tolerance), msg=name)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "single"])
def test_a_whole_model_comes_back_as_transformers_loads_it(tmp_path, monkeypatch, tied, sharded):
    model = llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "m", max_shard_size="4KB" if sharded else "1GB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1 or not sharded
    (tmp_path / "m" / "README.md").write_text("no")
    (tmp_path / "m" / "modeling_evil.py").write_text("no")
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(fedlink_tensors, "SHARD_MIN_BYTES", 3000 if sharded else 1 << 20)
    files = written(taken_in(tmp_path / "m"), tmp_path / "out")
    assert {"config.json", "generation_config.json", "tokenizer.json"} < set(files)
    assert not {"README.md", "modeling_evil.py"} & set(files)
    assert ("model.safetensors.index.json" in files) is sharded
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    same(again, model)
    assert (again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()) is tied


class Adapted:
    """A model, saved, with an adapter on it whose weights are not what they began as."""

    def __init__(self, directory: Path, base: torch.nn.Module, load: Any, config: Mapping[str, Any]) -> None:
        self.base_dir, self.load = directory / "base", load
        base.save_pretrained(self.base_dir, max_shard_size="6KB")
        torch.manual_seed(5)
        self.model = get_peft_model(load(self.base_dir), LoraConfig(**config))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        # As a site's trainer writes it, and as peft does.
        self.ours, self.theirs = directory / "ours", directory / "theirs"
        self.model.save_pretrained(self.theirs)
        self.ours.mkdir()
        own = {t.data_ptr(): name for name, t in self.model.state_dict().items()}
        names = {own[t.data_ptr()]: name for name, t in get_peft_model_state_dict(self.model).items()}
        state = state_of(self.model, names, frozen_base=True)
        write_model(state, self.ours / "adapter_model.safetensors", OwnBase(state).tensors(lambda: None))
        shutil.copy(self.theirs / "adapter_config.json", self.ours)

    def merged(self) -> torch.nn.Module:
        return self.model.merge_and_unload()


LOAD = AutoModelForCausalLM.from_pretrained
PATTERNS = {"r": 3, "lora_alpha": 7, "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 5}}
ADAPTERS: dict[str, tuple[Any, Any, Mapping[str, Any], float]] = {
    "patterns": (llama, LOAD, PATTERNS | {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}, 1e-6),
    "tied": (lambda: llama(tie_word_embeddings=True), LOAD, {"r": 2, "target_modules": "all-linear"}, 1e-6),
    "conv1d": (gpt2, LOAD, {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, 1e-6),
    "embedding": (llama, LOAD, {"r": 2, "target_modules": ["embed_tokens", "k_proj"]}, 1e-6),
    "biases": (gpt2, LOAD, {"r": 2, "target_modules": ["c_fc"], "bias": "all", "fan_in_fan_out": True}, 1e-6),
    "dora": (llama, LOAD, PATTERNS | {"target_modules": "all-linear", "use_dora": True}, 1e-6),
    "dora-conv1d": (
        gpt2,
        LOAD,
        {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
        1e-5,
    ),
    "dora-embedding": (llama, LOAD, {"r": 2, "target_modules": ["embed_tokens", "k_proj"], "use_dora": True}, 1e-6),
    "half": (lambda: llama().bfloat16(), LOAD, {"r": 2, "target_modules": ["q_proj"], "use_rslora": True}, 0.02),
    "head": (
        lambda: BertModel(BertConfig(**BERT)),
        lambda path: AutoModelForSequenceClassification.from_pretrained(path, num_labels=3),
        {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"},
        1e-6,
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_comes_back_as_peft_loads_it_and_merges_as_peft_does(tmp_path, case):
    make, load, config, tolerance = ADAPTERS[case]
    adapted = Adapted(tmp_path, make(), load, config)
    model = taken_in(adapted.ours)
    assert model.manifest.base
    # peft itself also saves the base's embedding where that is adapted.
    assert {n for n in taken_in(adapted.theirs).manifest.by_name if ".base_layer." not in n} <= {
        *model.manifest.by_name
    }
    assert set(written(model, tmp_path / "out")) == {"adapter_model.safetensors", "adapter_config.json"}
    again = PeftModel.from_pretrained(load(adapted.base_dir), tmp_path / "out")
    for name, tensor in get_peft_model_state_dict(adapted.model).items():
        assert torch.equal(tensor, get_peft_model_state_dict(again)[name]), name

    if case == "head":
        # The number of labels is in no file of the base: a site that knows it gives the config along.
        adapted.model.config.save_pretrained(adapted.ours)
        model = taken_in(adapted.ours.rename(tmp_path / "with config"))
    files = written(model, tmp_path / "merged", adapted.base_dir)
    assert {"config.json", "model.safetensors"} <= set(files)
    assert "adapter_config.json" not in files
    loaded = type(adapted.model.get_base_model()).from_pretrained(tmp_path / "merged")
    same(loaded, adapted.merged(), rtol=tolerance, atol=tolerance)


def test_what_peft_saved_elsewhere_is_taken_in_and_merged(tmp_path):
    adapted = Adapted(tmp_path, llama(), LOAD, {"r": 2, "target_modules": ["q_proj", "embed_tokens"]})
    model = taken_in(adapted.theirs)
    assert not model.manifest.base
    written(model, tmp_path / "merged", adapted.base_dir)
    same(LOAD(tmp_path / "merged"), adapted.merged(), rtol=1e-6, atol=1e-6)


def test_a_head_on_a_frozen_body_is_merged_without_peft(tmp_path):
    torch.manual_seed(3)
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model.requires_grad_(False)
    for part in (model.classifier, model.bert.encoder.layer[1]):
        part.requires_grad_(True)
    state = state_of(model, frozen_base=True)
    (tmp_path / "head").mkdir()
    write_model(state, tmp_path / "head" / "adapter_model.safetensors", OwnBase(state).tensors(lambda: None))
    model.config.save_pretrained(tmp_path / "head")
    taken = taken_in(tmp_path / "head")
    assert {n.split(".layer.1.")[0] for n in taken.manifest.by_name} == {
        "classifier.weight",
        "classifier.bias",
        "bert.encoder",
    }
    written(taken, tmp_path / "merged", tmp_path / "base")
    same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"), model)


def test_only_the_run_s_base_is_merged_into(tmp_path):
    adapted = Adapted(tmp_path, llama(), LOAD, {"r": 2, "target_modules": ["q_proj"]})
    model = taken_in(adapted.ours)
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(FedlinkError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' has other values") as e:
        written(model, tmp_path / "merged", tmp_path / "other")
    assert e.value.reason is Reason.BAD_CONFIG
    assert list((tmp_path / "merged").iterdir()) == []
    # A base that the sites hold in float32 and its files in bfloat16 is the same only if it was one.
    llama().bfloat16().save_pretrained(tmp_path / "narrow")
    with pytest.raises(FedlinkError, match="has other values"):
        written(model, tmp_path / "merged", tmp_path / "narrow")
    wide = Adapted(
        tmp_path / "wide",
        llama().bfloat16(),
        lambda p: AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32),
        {"r": 2, "target_modules": ["q_proj"]},
    )
    written(taken_in(wide.ours), tmp_path / "merged", wide.base_dir)
    assert LOAD(tmp_path / "merged").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"use_dora": True}, "lacks a magnitude for 'model"),
        ({"lora_alpha": None}, "no scale"),
        (None, "adapter_config.json"),
    ],
    ids=["kind", "dora", "scale", "no-config"],
)
def test_an_adapter_that_only_peft_merges_is_refused(tmp_path, changed, said):
    adapted = Adapted(tmp_path, llama(), LOAD, {"r": 2, "target_modules": ["q_proj"]})
    path = adapted.ours / "adapter_config.json"
    if changed is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(FedlinkError, match=said) as e:
        written(taken_in(adapted.ours), tmp_path / "merged", adapted.base_dir)
    assert e.value.reason is Reason.BAD_CONFIG


def test_a_base_is_named_by_values_dtypes_and_shapes_and_by_nothing_else(tmp_path):
    """However its tensors lie in memory, and whatever their dtype."""
    module = torch.nn.Module()
    for name, dtype in {"short": torch.bfloat16, "tiny": torch.float8_e4m3fn, "whole": torch.int64}.items():
        value = torch.arange(24).reshape(4, 6).to(dtype)
        module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    module.register_parameter("scalar", torch.nn.Parameter(torch.tensor(2.5), requires_grad=False))
    module.register_parameter("nothing", torch.nn.Parameter(torch.zeros(0, 3), requires_grad=False))
    module.register_parameter("trained", torch.nn.Parameter(torch.ones(2)))
    module.register_parameter("strided", torch.nn.Parameter(torch.randn(3, 5, 2).permute(2, 0, 1), requires_grad=False))

    def named() -> dict[str, bytes]:
        state = state_of(module, frozen_base=True)
        assert [s.name for s in state.specs()[0]] == ["trained"]
        return {t.name: t.digest for t in OwnBase(state).tensors(lambda: None)}

    first = named()
    assert first.keys() == {"short", "tiny", "whole", "scalar", "nothing", "strided"}
    module.strided.data = module.strided.data.contiguous()
    module.short.data = module.short.data.t().contiguous().t()
    assert named() == first
    module.tiny.data = module.tiny.data.view(torch.uint8)
    module.short.data = module.short.data.reshape(6, 4)
    module.strided.data = module.strided.data + 1
    assert {name for name, digest in named().items() if digest != first[name]} == {"tiny", "short", "strided"}


def test_the_base_travels_in_the_metadata_and_is_kept_by_an_export(tmp_path):
    adapted = Adapted(tmp_path, llama(), LOAD, {"r": 2, "target_modules": ["q_proj"]})
    assert BASE_KEY in read_header(adapted.ours / "adapter_model.safetensors").metadata
    model = taken_in(adapted.ours)
    written(model, tmp_path / "out")
    assert taken_in(tmp_path / "out").manifest.base == model.manifest.base
