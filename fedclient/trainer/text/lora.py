"""Low-rank adapters, through peft: what trains."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Literal

import torch

from fedclient.trainer.options import LoraOptions
from fedlink.base import base_name

Task = Literal["CAUSAL_LM", "SEQ_CLS"]
_MAGNITUDE = ".lora_magnitude_vector.default"


def with_adapters(
    model: Any, options: LoraOptions, task: Task, lengths: Mapping[str, torch.Tensor] | None = None
) -> Any:
    """A model with adapters, which alone train, besides `modules_to_save` and a classifier's head.

    Args:
        model: the base, whose parameters are frozen.
        options: `[workload.NAME.lora]`.
        task: what the model is for.
        lengths: of quantized layers, the lengths of each output's weights before they were; DoRA begins with them, as
            it does where nothing is quantized.

    Raises:
        ValueError: a target is not in the model.
    """
    peft: Any = importlib.import_module("peft")
    targets = options.targets if isinstance(options.targets, str) else list(options.targets)
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets,
        modules_to_save=list(options.modules_to_save) or None,
        task_type=task,
        use_dora=options.dora,
    )
    adapted = peft.get_peft_model(model, config)
    for name, module in adapted.named_modules():
        found = (lengths or {}).get(base_name(name.removesuffix(_MAGNITUDE)))
        if found is not None and name.endswith(_MAGNITUDE):
            module.weight.data.copy_(found)
    return adapted
