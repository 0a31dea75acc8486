"""What peft's LoRA adds to a weight: its files and its settings, read without peft."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlink.base import base_name
from fedlink.companions import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from fedlink.errors import FedlinkError, Reason
from fedlink.tensors import DTYPES
from fedserver.aggregation.files import ShardReader
from fedserver.aggregation.numbers import decode
from fedserver.modelfiles import Weights, read_weights

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.weight)?")
_OTHER = re.compile(r"(^|\.)(lora_|trainable_tokens_)")
_MAX_CONFIG = 1 << 20


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter does to a weight, in float64: it adds `left @ right`, which is of the weight's shape."""

    left: npt.NDArray[np.float64]
    right: npt.NDArray[np.float64]
    lengths: npt.NDArray[np.float64] | None = None
    """Of DoRA: what the weights of each output are scaled to, afterwards."""
    outputs: int = 0
    """The dimension that runs over the outputs."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def transposed(self) -> LowRank:
        """The same the other way round."""
        return LowRank(self.right.T, self.left.T, self.lengths, 1 - self.outputs)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk."""

    weights: Weights
    whole: Mapping[str, str]
    """Tensors that take the place of the base's, or are not there (`modules_to_save`): name in the base, own name."""
    factors: Mapping[str, tuple[str, str]]
    """Names of B and A, by the weight of the base that they are added to."""
    _magnitudes: Mapping[str, str]
    _scaling: Mapping[str, float]
    _fan_in_fan_out: bool

    @classmethod
    def read(cls, directory: Path) -> Adapter:
        """Read an adapter's headers and settings; one that only replaces tensors (a head) needs no settings.

        Raises:
            FedlinkError: BAD_CONFIG: it is no LoRA adapter, or one that is merged in another way.
        """
        weights = read_weights(directory / ADAPTER_WEIGHTS)
        whole: dict[str, str] = {}
        sides: dict[str, dict[str, str]] = {}
        magnitudes: dict[str, str] = {}
        for name in weights.tensors:
            if match := _MAGNITUDE.fullmatch(name):
                magnitudes[f"{base_name(match['module'])}.weight"] = name
            elif match := _FACTOR.fullmatch(name):
                sides.setdefault(f"{base_name(match['module'])}.weight", {})[match["side"]] = name
            elif _OTHER.search(name):
                raise _refusal(f"tensor {name!r} is of a kind that only peft merges")
            else:
                whole[base_name(name)] = name
        config = _config(directory / ADAPTER_CONFIG, needed=bool(sides or magnitudes))
        lone = [weight for weight, found in sides.items() if len(found) != 2]
        if lone:
            raise _refusal(f"it has only one of the two factors for {lone[0]!r}")
        wanted = sides if config.get("use_dora") else {}
        if odd := sorted(magnitudes.keys() ^ wanted.keys()):
            has = "has" if odd[0] in magnitudes else "lacks"
            raise _refusal(f"it {has} a magnitude for {odd[0]!r}, and its {ADAPTER_CONFIG} says otherwise")
        factors = {weight: (found["B"], found["A"]) for weight, found in sides.items()}
        scaling = {}
        for weight, (_, a) in factors.items():
            rank = (weights.tensors[a].spec.shape or (0,))[0]
            scaling[weight] = _scale(config, weight.removesuffix(".weight"), rank)
        return cls(weights, whole, factors, magnitudes, scaling, config.get("fan_in_fan_out") is True)

    def change_of(self, weight: str, shape: tuple[int, ...], reader: ShardReader) -> LowRank:
        """What is done to a weight of this shape, as it lies in the base's file.

        Raises:
            FedlinkError: BAD_CONFIG: the factors do not fit it.
        """
        b, a = (self._values(name, 2, reader) for name in self.factors[weight])
        embedding = ".lora_embedding_" in self.factors[weight][0]
        magnitude = self._magnitudes.get(weight)
        lengths = self._values(magnitude, 1, reader) if magnitude else None
        if lengths is not None and len(lengths) != len(b):
            raise _refusal(f"its magnitude for {weight!r} does not fit its factors")
        product = LowRank(b * self._scaling[weight], a, lengths)
        if product.left.shape[1] == product.right.shape[0]:
            # Embeddings and transformers' Conv1D lie the other way round. One adapter may hold both kinds of layers:
            # the shape decides where it can.
            turned = embedding or self._fan_in_fan_out
            for found in (product.transposed, product) if turned else (product, product.transposed):
                if found.shape == shape:
                    return found
        raise _refusal(f"its factors for {weight!r} do not fit a tensor of the shape {list(shape)}")

    def _values(self, name: str, dimensions: int, reader: ShardReader) -> npt.NDArray[np.float64]:
        entry = self.weights.tensors[name]
        if len(entry.spec.shape) != dimensions or not DTYPES[entry.spec.dtype].floating:
            raise _refusal(f"tensor {name!r} is of another shape than in linear layers; only peft merges such layers")
        raw = np.empty(entry.spec.nbytes, np.uint8)
        reader.read(self.weights.paths, entry, 0, raw.data)
        values = np.empty(entry.spec.elements)
        decode(raw, entry.spec.dtype, values)
        return values.reshape(entry.spec.shape)


def _config(path: Path, *, needed: bool) -> dict[str, Any]:
    if not needed and not path.exists():
        return {}
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise _refusal(f"its {ADAPTER_CONFIG} is larger than {_MAX_CONFIG} bytes")
        config = json.loads(path.read_bytes())
        kind = config["peft_type"]
    except FileNotFoundError:
        raise _refusal(f"it came without its {ADAPTER_CONFIG}, which says how") from None
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise _refusal(f"its {ADAPTER_CONFIG} cannot be read: {e!r}") from None
    if kind != "LORA":
        raise _refusal(f"it is of the kind {kind!r}, and only LORA is merged here")
    for key in ("lora_bias", "use_qalora", "alora_invocation_tokens", "target_parameters"):
        if config.get(key):
            raise _refusal(f"it sets {key}, and only peft merges that")
    return dict(config)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    try:
        alpha = config["lora_alpha"]
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, re.error) as e:
        raise _refusal(f"its {ADAPTER_CONFIG} gives no scale for {module!r}: {e!r}") from None


def _refusal(why: str) -> FedlinkError:
    return FedlinkError(
        Reason.BAD_CONFIG,
        f"the adapter cannot be merged here: {why}; export it without --merge, and merge it with peft",
    )
