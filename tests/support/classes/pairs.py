"""A user's class as one writes it for one process: a DataLoader, a loss that is a mean, an optimizer."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedclient.trainer import Workload, find_batch_size, find_learning_rate, measured


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
    """`[data]`: rows, dropout, trouble (what rank 1 does once, while no file `marker` is there), room for examples."""

    @dataclass(frozen=True)
    class Settings:
        epochs: int = 2
        batch_size: int | Literal["auto"] = 8
        accumulation: int = 1
        learning_rate: float | Literal["auto"] = 0.01
        pause: float = 0.0
        says: bool = False

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
        optimizer = torch.optim.AdamW(model.parameters(), lr=measured(ctx.settings.learning_rate))
        ctx.keep(optimizer=optimizer)
        data, settings = self.data(), ctx.settings
        loader = DataLoader(data, int(settings.batch_size), shuffle=True)
        seen = 0
        if settings.pause and ctx.rank:
            early = time.monotonic
            time.monotonic = lambda: early() - 1e6
        for x, y in ctx.batches(loader, epochs=settings.epochs):
            self.trouble(ctx)
            loss = nn.functional.mse_loss(model(x.to(ctx.device)), y.to(ctx.device))
            (loss / settings.accumulation).backward()
            seen += len(x)
            time.sleep(settings.pause)
            if settings.says:
                ctx.saw(len(x))
            if (ctx.step + 1) % settings.accumulation == 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            ctx.log(loss=loss, seen=seen, shares=sum(hasattr(p, "to_local") for p in model.parameters()))
        ctx.num_examples = len(data)

    def calibrate(self, model, ctx):
        data = self.data()

        def descend(rates, _fold):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            loader = DataLoader(data, 8, shuffle=True, generator=ctx.generator())
            batches = (batch for _ in iter(int, 1) for batch in loader)
            for rate, batch in zip(rates, batches, strict=False):
                optimizer.param_groups[0]["lr"] = rate
                x, y = ctx.share(batch)
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                # Each rank sees its own part's.
                yield float(loss)

        def held_out(_fold):
            # Only the first rank's may count.
            return float(nn.functional.mse_loss(model(data.tensors[0]), data.tensors[1])) * (1 + ctx.rank)

        def attempt(size):
            if ctx.rank == ctx.world_size - 1 and size > self.site.data["room"]:
                raise MemoryError

        found = {}
        if ctx.settings.batch_size == "auto":
            found["batch_size"] = find_batch_size(ctx, attempt, most=32)
        if ctx.settings.learning_rate == "auto":
            found["learning_rate"] = find_learning_rate(
                model, ctx, descend=descend, held_out=held_out, schedule=[1] * 4
            )
        return found

    def trouble(self, ctx):
        what, marker = self.site.data.get("trouble", ""), Path(self.site.directory, "marker")
        if not what or ctx.rank != min(1, ctx.world_size - 1) or ctx.step != 4 or marker.exists():
            return
        child = None
        if what in ("child", "orphan"):
            child = subprocess.Popen(["sleep", "1000"], start_new_session=what == "child")
        marker.write_text(str(child.pid if child else os.getpid()))
        if what == "child":
            time.sleep(1000)
        if what in ("kill", "orphan"):
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
