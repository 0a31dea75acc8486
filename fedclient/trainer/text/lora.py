"""Low-rank adapters, through peft: what trains."""

from __future__ import annotations

import importlib
from typing import Any, Literal

from fedclient.trainer.options import LoraOptions

Task = Literal["CAUSAL_LM", "SEQ_CLS"]


def with_adapters(model: Any, options: LoraOptions, task: Task) -> Any:
    """A model with adapters, which alone train, besides `modules_to_save` and a classifier's head.

    Args:
        model: the base, whose parameters are frozen.
        options: `[workload.NAME.lora]`.
        task: what the model is for.

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
    )
    return peft.get_peft_model(model, config)
