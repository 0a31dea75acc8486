"""A torch workload whose model has every kind of tensor that is easy to get wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fedclient.trainer import Workload


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.strided = nn.Parameter(torch.randn(5, 4).t())
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Parameter(torch.randn(2, dtype=torch.float64))
        self.small = nn.Parameter(torch.randn(4).to(torch.bfloat16))
        self.register_buffer("table", torch.randn(4).to(torch.float8_e4m3fn))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        self.scratch += 1
        x = self.norm(self.embed(tokens)) + self.frozen(self.table.float() * self.mask) + self.scratch
        x = self.drop(x) * self.scale + (self.small.float() @ self.strided).sum()
        return self.head(x)


class Nets(Workload):
    @dataclass(frozen=True)
    class Settings:
        steps: int = 4
        learning_rate: float = 0.1

    def build_model(self):
        return Net()

    def data(self):
        tokens = torch.arange(24) % 6
        return tokens, (tokens * 5 + 1) % 6

    def train(self, model, ctx):
        tokens, labels = self.data()
        optimizer = torch.optim.SGD(model.parameters(), lr=ctx.settings.learning_rate, momentum=0.9)
        for _ in ctx.steps(ctx.settings.steps):
            batch = torch.randperm(24, generator=ctx.generator())[:8]
            batch = batch[torch.randperm(8)]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            ctx.log(loss=loss)
        model.frozen.requires_grad_(True)
        ctx.num_examples = 24

    def gradient(self, model, ctx):
        tokens, labels = self.data()
        nn.functional.cross_entropy(model(tokens), labels).backward()
        ctx.num_examples = 24

    def evaluate(self, model, ctx):
        tokens, labels = self.data()
        assert not torch.is_grad_enabled()
        ctx.num_examples = 24
        return {"accuracy": (model(tokens).argmax(1) == labels).float().mean()}
