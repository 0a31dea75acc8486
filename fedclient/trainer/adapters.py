"""A model with adapters of peft: what they are called in peft's files, and the configuration that goes with them."""

from __future__ import annotations

import importlib
import json
from typing import Any

import torch


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
