"""How much memory a process has had."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """The most resident memory of this process since it began, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss counts what the parent held when it forked; VmHWM begins anew with the program.
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
