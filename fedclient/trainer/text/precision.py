"""What is computed and held in which dtype, on which device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fedclient.trainer.memory import NUMBERED
from fedclient.trainer.options import Autocast, Dtype

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weights_dtype(name: Dtype) -> torch.dtype | str:
    """The dtype to load weights in, as transformers takes it."""
    return _WEIGHTS.get(name, "auto")


def resolved(name: Autocast, device: str) -> Autocast:
    """What `auto` means on a device: the half-width dtype that it multiplies fast, or float32."""
    if name != "auto":
        return name
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.startswith("xpu"):
        return "bf16" if torch.xpu.is_bf16_supported(including_emulation=False) else "fp16"
    if device == "cpu":
        able = dict[str, Any](getattr(torch.cpu, "get_capabilities", dict)())
        return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"
    return "float32"


class Precision:
    """How a job computes.

    Args:
        name: what site.toml says.
        device: the job's.
    """

    def __init__(self, name: Autocast, device: str) -> None:
        self.dtype = _AUTOCAST.get(resolved(name, device))
        """What autocast computes in; None: there is none."""
        self._kind = device.partition(":")[0]
        # Gradients in float16 vanish below 6e-8; other dtypes reach as far down as float32.
        scaled = self.dtype is torch.float16 and self._kind in NUMBERED
        self.scaler = torch.amp.GradScaler(self._kind, enabled=scaled)
        """Scales the loss where it must be; elsewhere it does nothing."""

    def autocast(self) -> AbstractContextManager[object]:
        """Around a forward pass."""
        return nullcontext() if self.dtype is None else torch.autocast(self._kind, self.dtype)
