"""LoRA on a tiny language model that lies in a directory of the site's own."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from fedclient.trainer import Workload


class TinyLora(Workload):
    frozen_base = True

    @dataclass(frozen=True)
    class Settings:
        steps: int = 2

    def build_model(self):
        base = AutoModelForCausalLM.from_pretrained(self.site.path("base"))
        # What the module alone decides: the base's own head is random where a task brings its own.
        torch.nn.init.normal_(base.lm_head.weight)
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head"])
        return get_peft_model(base, config)

    def tensor_names(self, model):
        own = {tensor.data_ptr(): name for name, tensor in model.state_dict().items()}
        return {own[tensor.data_ptr()]: name for name, tensor in get_peft_model_state_dict(model).items()}

    def model_files(self):
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}
        config |= {"modules_to_save": ["lm_head"], "task_type": None, "base_model_name_or_path": None}
        return {"adapter_config.json": json.dumps(config).encode()}

    def train(self, model, ctx):
        with Path(self.site.path("control"), "trained").open("a") as f:
            f.write(f"{ctx.round} {os.getpid()}\n")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        tokens = torch.arange(16).reshape(2, 8) % 32
        for _ in ctx.steps(ctx.settings.steps):
            optimizer.zero_grad()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            ctx.log(loss=loss, rounds=ctx.rounds)
        ctx.num_examples = len(tokens)

    def evaluate(self, model, ctx):
        ctx.num_examples = 2
        tokens = torch.arange(16).reshape(2, 8) % 32
        return {"loss": model(input_ids=tokens, labels=tokens).loss}
