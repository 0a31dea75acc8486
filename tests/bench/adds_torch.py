"""The training of `adds.py` with torch: the same names, shapes, numbers and bits, in an nn.Module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from workload import shapes

from fedclient.trainer import Context, Workload


class Adds(Workload):
    """`[workload.bench.data]` says which `model` it is and the client's `number`, from 0."""

    def build_model(self) -> nn.Module:
        model = nn.Module()
        for name, shape in shapes(self.site.data["model"]).items():
            # A parameter's name has no dots: they stand for modules in modules.
            *path, last = name.split(".")
            owner = model
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            # Zeros that nobody touches take no memory; loading replaces them.
            owner.register_parameter(last, nn.Parameter(torch.zeros(shape)))
        return model

    def train(self, model: Any, ctx: Context) -> None:
        with torch.no_grad():
            for _ in ctx.steps(1):
                for parameter in model.parameters():
                    parameter.add_(self.site.data["number"] + 1)
        ctx.num_examples = 100
