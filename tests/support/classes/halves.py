"""A torch workload in bfloat16 with tied, frozen and integer tensors, whose updates a test can foretell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fedclient.trainer import Workload

FROZEN = (500, 600)


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 8, dtype=torch.bfloat16)
        self.head = nn.Linear(8, 4, bias=False, dtype=torch.bfloat16)
        self.base = nn.Parameter(torch.randn(FROZEN), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("mask", torch.tensor([False, False]))
        self.register_buffer("running", torch.zeros(2))
        nn.init.ones_(self.embed.weight)
        self.head.weight = self.embed.weight


class Training(Workload):
    """The site's `step` is added to the tied weight once a round, and its `examples` are counted."""

    @dataclass(frozen=True)
    class Settings:
        pass

    def build_model(self):
        return Halves()

    def train(self, model, ctx):
        assert model.head.weight is model.embed.weight
        step, examples = self.site.data["step"], self.site.data["examples"]
        for _ in ctx.steps(1):
            with torch.no_grad():
                model.head.weight.add_(step)
                model.scale.sub_(step)
            model.seen += examples
            model.mask[0] = examples > 5
            model.running.fill_(examples)
            # What is frozen stays, whatever a training does to it.
            model.base.zero_()
        ctx.num_examples = examples

    def evaluate(self, model, ctx):
        assert model.head.weight is model.embed.weight
        ctx.num_examples = 1
        return {"accuracy": float(model.base.abs().sum() > 0)}
