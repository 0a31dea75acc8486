"""A user's class as one writes it for one process: a DataLoader, a loss that is a mean, an optimizer."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedclient.trainer import Workload


class Net(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.name = "mine"
        self.first = nn.Linear(6, 16)
        self.second = nn.Linear(16, 1)
        self.unused = nn.Linear(2, 2)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.second(self.dropout(torch.tanh(self.first(x))))


class Pairs(Workload):
    """`[data]`: rows, dropout, trouble (what rank 1 does once, while no file `marker` is there)."""

    @dataclass(frozen=True)
    class Settings:
        epochs: int = 2
        batch_size: int = 8
        accumulation: int = 1

    def build_model(self):
        return Net(self.site.data.get("dropout", 0.0))

    def data(self):
        generator = torch.Generator().manual_seed(11)
        x = torch.randn(self.site.data.get("rows", 33), 6, generator=generator)
        return TensorDataset(x, x.sum(1, keepdim=True).sin())

    def train(self, model, ctx):
        assert isinstance(model, Net)
        self.model = model
        assert model.name == "mine"
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        ctx.keep(optimizer=optimizer)
        data, settings = self.data(), ctx.settings
        loader = DataLoader(data, settings.batch_size, shuffle=True)
        seen = 0
        for x, y in ctx.batches(loader, epochs=settings.epochs):
            self.trouble(ctx)
            loss = nn.functional.mse_loss(model(x), y)
            (loss / settings.accumulation).backward()
            seen += len(x)
            if (ctx.step + 1) % settings.accumulation == 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            ctx.log(loss=loss, seen=seen)
        ctx.num_examples = len(data)

    def trouble(self, ctx):
        what, marker = self.site.data.get("trouble", ""), Path(self.site.directory, "marker")
        if not what or ctx.rank != min(1, ctx.world_size - 1) or ctx.step != 4 or marker.exists():
            return
        marker.write_text(str(os.getpid()))
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "raise":
            raise LookupError("of its own")
        if what == "differ":
            with torch.no_grad():
                self.model.first.weight += 1

    def evaluate(self, model, ctx):
        data = self.data()
        error = sum(float(nn.functional.mse_loss(model(x), y)) * len(x) for x, y in ctx.batches(DataLoader(data, 8)))
        ctx.num_examples = len(data)
        return {"loss": error / len(data), "ranks": ctx.world_size}

    def gradient(self, model, ctx):
        data = self.data()
        for x, y in ctx.batches(DataLoader(data, 8)):
            (nn.functional.mse_loss(model(x), y, reduction="sum") / len(data)).backward()
        ctx.num_examples = len(data)
