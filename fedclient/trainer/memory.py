"""How much memory torch takes on a device, and whether an exception means that there was too little."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NUMBERED = ("cuda", "xpu")
"""Kinds of accelerators of which there may be several, and whose memory torch counts."""
_SHARE = 0.9
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGE = 1 << 20
_FIRST_TO_GO = "1000"
_GROUP_FILES = ("memory.max", "memory.current", "inactive_file")
_OLD_GROUP_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def peak_device_memory() -> int:
    """Peak memory in bytes that torch took on the current accelerator; 0 if it uses none, or does not count."""
    accelerator = _counting_accelerator()
    return int(accelerator.max_memory_allocated()) if accelerator else 0


def free_device_memory() -> None:
    """Give back what torch holds of the accelerator's memory and does not use."""
    if accelerator := _counting_accelerator():
        accelerator.empty_cache()


def _counting_accelerator() -> Any:
    """`torch.accelerator`, if there is one whose memory it knows of: of others (MPS) it raises when it is asked."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.accelerator.is_available():
        return None
    return torch.accelerator if torch.accelerator.current_accelerator().type in NUMBERED else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, numpy or torch (any accelerator, or the CPU) says that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    if any(c.__name__ == "OutOfMemoryError" and c.__module__.startswith("torch") for c in type(error).__mro__):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


_SIGNS = ("DefaultCPUAllocator", "MPS backend out of memory", "could not create a memory object", "std::bad_alloc")


@contextlib.contextmanager
def within_free_memory(device: str, *, among: int = 1, ready: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Have allocations on a CPU fail beyond nine tenths of the memory that is free, instead of the system killing.

    Of Linux; elsewhere, and for accelerators, whose allocations fail by themselves, nothing is done. What limits the
    process already stays in force. It also becomes the first that the system kills for want of memory.

    Args:
        device: where tensors lie.
        among: how many processes share what is free.
        ready: called when this one has seen how much that is.
    """
    free = free_memory() if device == "cpu" else None
    ready()
    if free is None:
        yield
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO, encoding="ascii")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    allowed = pages * resource.getpagesize() + int(free * _SHARE / among)
    if soft != resource.RLIM_INFINITY:
        allowed = min(allowed, soft)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def keep_whole() -> None:
    """Have large blocks go back to the system as soon as they are freed, where the C library can be told to.

    Else it keeps them for smaller ones, and what fits depends on what was there before. It costs some time.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_TRIM_THRESHOLD, _LARGE)
        library.malloc_trim(0)


def free_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that may still be taken: of the machine, and of each control group that this process is in.

    Args:
        proc: where Linux tells of processes.
        groups: where it tells of control groups, of either version.

    Returns:
        None where that cannot be known.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
        return max(min([free, *_free_in_groups(proc, groups)]), 0)
    return None


def _free_in_groups(proc: Path, groups: Path) -> Iterator[int]:
    """What is left below each limit. It may be one of a group above: of a service, of a job, of a container."""
    told = ""
    with contextlib.suppress(OSError):
        told = (proc / "self" / "cgroup").read_text(encoding="utf-8")
    for line in told.splitlines():
        _, controllers, place = line.split(":", 2)
        if not controllers:
            top, names = groups, _GROUP_FILES
        elif "memory" in controllers.split(","):
            top, names = groups / "memory", _OLD_GROUP_FILES
        else:
            continue
        own = top / place.lstrip("/")
        # A group outside of what is seen here is told by "..": only the top is known then.
        for group in [top] if ".." in own.parts else [own, *(p for p in own.parents if p.is_relative_to(top))]:
            # Most have no limit: a file is not there, or says "max".
            with contextlib.suppress(OSError, ValueError):
                limit, used = (int((group / name).read_text(encoding="ascii")) for name in names[:2])
                yield limit - used + _let_go(group, names[2])


def _let_go(group: Path, name: str) -> int:
    """Bytes of files that were read and are not in use: these go before memory runs out."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(f"{name} "))
    return 0
