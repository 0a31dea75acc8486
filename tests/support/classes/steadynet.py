"""A torch workload with all that has a state: momentum, Adam, schedule, dropout, batch norm, shuffling, workers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedclient.trainer import Workload

torch.set_num_threads(1)


class SteadyNet(Workload):
    @dataclass(frozen=True)
    class Settings:
        pass

    def build_model(self):
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))

    def train(self, model, ctx):
        sgd = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
        adam = torch.optim.Adam([*model[1].parameters(), *model[4].parameters()], lr=0.05)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 12)
        average = torch.optim.swa_utils.AveragedModel(model)
        ctx.keep(sgd=sgd, adam=adam, scheduler=scheduler, average=average)
        data = TensorDataset(torch.linspace(-1, 1, 20 * 6).reshape(20, 6), torch.arange(20) % 3)
        for generator, workers in ((ctx.generator(), 0), (None, 2)):
            loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator, num_workers=workers)
            for x, y in ctx.batches(loader, steps=8):
                model.zero_grad()
                loss = nn.functional.cross_entropy(model(x + 0.1 * torch.randn_like(x)), y)
                loss.backward()
                sgd.step()
                adam.step()
                scheduler.step()
                average.update_parameters(model)
                ctx.log(loss=loss, rate=scheduler.get_last_lr()[0])
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                parameter.copy_(mean)
        ctx.num_examples = 20
