"""A base whose linear layers are held in 8 or 4 bits, by bitsandbytes; adapters train on it.

The weights lie in the model's files and take no memory until they are read. Layer by layer they are read, named by
their content, and quantized: so the run's base is the same whether or not a site quantizes it, and no moment holds
more than a few layers in full. It is done on the CPU, whatever trains, so that every site gets the same values.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from fedclient.trainer.memory import keep_whole
from fedclient.trainer.options import Quantize
from fedclient.trainer.text.pretrained import Pretrained, PretrainedError
from fedclient.trainer.torch_state import keep_original

EXTRA = "pip install 'fedlink[quantized]'"
"""What brings the package that is needed here."""
_THREADS = 2
"""Layers in hand at a time, each with five times its own memory; hashing and quantizing let go of Python's lock."""
_OUTLIERS = 6.0
"""Inputs larger than this are multiplied in full, as in LLM.int8()."""


@dataclass(frozen=True)
class QuantizedBase:
    """A base with quantized layers."""

    model: Any
    lengths: dict[str, torch.Tensor]
    """Of each output's weights before they were quantized, by layer: what DoRA begins with."""


def load(
    pretrained: Pretrained,
    kind: str,
    config: Any,
    dtype: torch.dtype | str,
    quantize: Quantize,
    *,
    new_head: bool,
    spared: Collection[str],
    alive: Callable[[], None],
) -> QuantizedBase:
    """Load a model, and quantize the linear layers of its body.

    Args:
        pretrained: where it lies.
        kind: a class of transformers.
        config: what the model is.
        dtype: what the run's base is held in; what is not quantized stays in it.
        quantize: what the layers are held in.
        new_head: as of `Pretrained.model`.
        spared: ends of the names of modules that stay as they are, because they train whole.
        alive: called between layers.

    Raises:
        PretrainedError: it cannot be loaded, or has no such layer.
    """
    stored = pretrained.stored_dtype()
    # In another dtype than the files have all of it would be copied. What is missing there is drawn in the base's own.
    lazily = stored if dtype is torch.float32 and not new_head else None
    model = pretrained.model(kind, config, lazily or dtype, new_head=new_head)
    held: torch.dtype = model.dtype if isinstance(dtype, str) else dtype
    layers = list(_layers(model, spared))
    if not layers:
        raise PretrainedError(
            f"quantize = {quantize!r} of site.toml: {type(model).__name__} has no linear layer that can be quantized; "
            "leave quantize out"
        )
    lengths: dict[str, torch.Tensor] = {}
    keep_whole()
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "quantize") as pool:
        try:
            for name, layer, found in pool.map(lambda item: _quantized(item[0], item[1], held, quantize), layers):
                alive()
                model.set_submodule(name, layer)
                lengths[name] = found
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    _hold_rest(model, held)
    # It says at every product that inputs are cast.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    # What peft goes by.
    setattr(model, "is_loaded_in_8bit" if quantize == "int8" else "is_loaded_in_4bit", True)
    return QuantizedBase(model, lengths)


def prepare(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Make the quantized layers ready for a job, on the device where they lie.

    Args:
        model: with quantized layers.
        dtype: what the job's autocast computes in; None: there is none.
    """
    bnb = _bitsandbytes()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            layer: Any = module
            # bitsandbytes turns a bias for good into the dtype that it computes in.
            own = layer.weight.quant_state.dtype if layer.bias is None else layer.bias.dtype
            layer.compute_dtype = own if layer.bias is not None else dtype or own
            layer.compute_type_is_set = True
        elif isinstance(module, bnb.nn.Linear8bitLt):
            _restore_scales(module)
            _follow(module)


def _layers(model: Any, spared: Collection[str]) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The linear layers of a model's body; those that share their weights with others stay as they are."""
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, module in model.named_modules():
        parts = name.split(".")
        around = [".".join(parts[: n + 1]) for n in range(len(parts))]
        # A subclass computes in a way of its own.
        if (
            type(module) is torch.nn.Linear
            and parts[0] == model.base_model_prefix
            and owners[id(module.weight)] == 1
            and not any(path.endswith(end) for path in around for end in spared)
        ):
            yield name, module


def _quantized(
    name: str, layer: torch.nn.Linear, held: torch.dtype, quantize: Quantize
) -> tuple[str, Any, torch.Tensor]:
    bnb = _bitsandbytes()
    weight = layer.weight.detach().to(held)
    sizes = {"bias": layer.bias is not None, "device": "meta"}
    if quantize == "int8":
        made = bnb.nn.Linear8bitLt(
            layer.in_features, layer.out_features, has_fp16_weights=False, threshold=_OUTLIERS, **sizes
        )
        made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
        made.register_forward_pre_hook(_before_8bit)
    else:
        made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, quant_type=quantize, **sizes)
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=quantize, module=made).to("cpu")
        # Evaluations would lay the weights out anew, and the next training would not be that of a fresh process.
        made.support_avx512bf16_for_cpu = False
    keep_original(made, "weight", f"{name}.weight", weight)
    if layer.bias is not None:
        made.bias = torch.nn.Parameter(layer.bias.detach().to(held), requires_grad=False)
    made.train(layer.training)
    return name, made, torch.linalg.norm(weight, dim=1)


def _before_8bit(layer: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    _restore_scales(layer)
    # As in `prepare`: what comes in takes the bias' dtype, never the other way round.
    return None if layer.bias is None else (inputs[0].to(layer.bias.dtype), *inputs[1:])


def _restore_scales(layer: Any) -> None:
    """On a CPU, peft's DoRA puts a copy in the place of the weight that has lost its scales."""
    if layer.weight.CB is not None and layer.weight.SCB is None:
        layer.weight.SCB = layer.state.SCB


def _hold_rest(model: Any, held: torch.dtype) -> None:
    """Hold in the base's dtype what was loaded as the files have it."""
    loaded = model.dtype
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.dtype == loaded != held:
            tensor.data = tensor.data.to(held)
    model.config.dtype = held


def _follow(layer: Any) -> None:
    """Have what bitsandbytes keeps of an 8-bit weight lie where the weight lies, which torch alone has moved."""
    if layer.weight.CB is not None:
        # As its first forward pass does: compiled code would be compiled again after that.
        layer.init_8bit_state()
    if layer.state.CB.data_ptr() != layer.weight.data_ptr():
        layer.state.CB = layer.weight.data
    layer.state.SCB = layer.state.SCB.to(layer.weight.device)


def _bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes")
