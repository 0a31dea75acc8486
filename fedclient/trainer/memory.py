"""How much memory the trainer process uses, and whether an exception means that there was too little."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss counts what the daemon held when it forked; VmHWM begins anew with the program.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


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
