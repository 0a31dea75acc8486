"""A model of which one notices in memory whether it is there, and a step or two."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from fedclient.trainer import Workload
from fedlink.memory import peak_memory


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2048, 2048, bias=False) for _ in range(24))

    def forward(self, x):
        for block in self.blocks:
            x = block(x) / 1024
        return x


class Blocks(Workload):
    def tell(self, name, rank):
        Path(self.site.directory, f"{name}-{rank}").write_text(str(peak_memory()))

    def build_model(self):
        self.tell("before", os.environ["RANK"])
        return Whole()

    def train(self, model, ctx):
        """`[data] learns`: by AdamW, with a checkpoint before each step but the first; else by an addition."""
        if self.site.data.get("learns"):
            self.learn(model, ctx)
        else:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.25)
        self.tell("after", ctx.rank)
        ctx.num_examples = 1

    def learn(self, model, ctx):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
        ctx.keep(optimizer=optimizer)
        for x in ctx.batches([torch.full((2, 2048), 1e-3)] * 2):
            # Falling outputs have the gradients of one sign.
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
