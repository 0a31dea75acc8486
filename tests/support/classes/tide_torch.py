"""The workload of tide.py as a torch module."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedclient.trainer import Workload

sys.path.insert(0, str(Path(__file__).parent))
from tide import ROW, STEPS, tide


class Tide(Workload):
    @dataclass(frozen=True)
    class Settings:
        steps: int = STEPS

    def build_model(self):
        model = nn.Module()
        for i in range(self.site.data["tensors"]):
            model.register_parameter(f"t{i:02}", nn.Parameter(torch.zeros(self.site.data["rows"], ROW)))
        model.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        return model

    def train(self, model, ctx):
        for step in ctx.steps(ctx.settings.steps):
            with torch.no_grad():
                for i, (_, parameter) in enumerate(sorted(model.named_parameters())):
                    for part in tide(self.site.data["number"], ctx.round, step, i, len(parameter)):
                        parameter.add_(torch.from_numpy(part))
                model.steps += self.site.data["number"]
        ctx.num_examples = self.site.data["examples"]

    def evaluate(self, model, ctx):
        ctx.num_examples = self.site.data["examples"]
        return {"accuracy": float(model.t00[0].mean())}
