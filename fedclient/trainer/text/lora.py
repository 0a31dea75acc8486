"""Low-rank adapters, through peft: what trains, what it is called, and the configuration that goes with it."""

from __future__ import annotations

import importlib
import json
from typing import Any, Literal

import torch

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


def adapter_names(model: Any) -> dict[str, str]:
    """What peft calls the tensors of an adapter in adapter_model.safetensors, by their names in `state_dict()`."""
    peft: Any = importlib.import_module("peft")
    tensors = model.state_dict()
    named = {_place(tensor): name for name, tensor in tensors.items()}
    saved = peft.get_peft_model_state_dict(model, state_dict=tensors, save_embedding_layers=False)
    return {named[_place(tensor)]: name for name, tensor in saved.items()}


def adapter_file(model: Any, base: str) -> bytes:
    """adapter_config.json, as peft writes it.

    Args:
        model: a model with adapters.
        base: what the base is called there; a site's path is nobody else's business.
    """
    config = next(iter(model.peft_config.values()))
    table = config.to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in table.items()}
    return json.dumps(plain, indent=2, sort_keys=True).encode() + b"\n"


def _place(tensor: torch.Tensor) -> object:
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype
