"""How much memory torch takes on a device, and whether an exception means that there was too little."""

from __future__ import annotations

import sys


def peak_device_memory() -> int:
    """Peak memory in bytes that torch took on the current CUDA device; 0 if it uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.max_memory_allocated())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, numpy or torch (any accelerator, or the CPU) says that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    if any(c.__name__ == "OutOfMemoryError" and c.__module__.startswith("torch") for c in type(error).__mro__):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "MPS backend out of memory" in text)
