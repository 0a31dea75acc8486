"""A head on a frozen backbone; `[data]` says what is to be wrong with it."""

from __future__ import annotations

import torch
from torch import nn

from fedclient.trainer import Workload


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 4, dtype=torch.bfloat16).requires_grad_(False)
        self.head = nn.Linear(4, 2)
        self.register_buffer("seen", torch.tensor(0))


class Backbone(Workload):
    frozen_base = True

    def build_model(self):
        model = Headed()
        with torch.no_grad():
            model.backbone.weight.copy_(torch.arange(16).reshape(4, 4))
            model.backbone.bias.zero_()
            model.backbone.bias[1] += self.site.data.get("shift", 0)
        if self.site.data.get("wide"):
            model.backbone.float()
        return model

    def tensor_names(self, model):
        return {"head.weight": self.site.data.get("name", "classifier.weight"), "backbone.bias": "shift"}

    def model_files(self):
        return {self.site.data.get("file", "config.json"): b"{}"}

    def train(self, model, ctx):
        with torch.no_grad():
            model.head.weight += 1
            model.seen += 1
            if self.site.data.get("touch"):
                model.backbone.weight += 1
        ctx.log(base=model.backbone.weight.float().sum())
        ctx.num_examples = 1


class Whole(Backbone):
    frozen_base = False
