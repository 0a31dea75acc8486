"""Check "disk": the state directory can be written, and has room for what the daemon keeps."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path

from fedclient.aside import off_loop
from fedclient.checks.examination import Examination
from fedclient.checks.finding import Finding, failed, ok, warning

_LEAST_FREE = 100_000_000


async def check_disk(visit: Examination) -> Finding:
    """Write a file, sync it, and compare what is free with what may come."""
    return await off_loop(_look, visit.site.state_dir, visit.site.cache_limit, visit.model_bytes)


def _look(state_dir: Path, cache_limit: int, model_bytes: int) -> Finding:
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(state_dir)
        free = shutil.disk_usage(state_dir).free
    except OSError as e:
        if e.errno == errno.ENOSPC:
            return failed(f"state_dir {state_dir} is on a full disk", "Make room there.")
        return failed(
            f"state_dir {state_dir} cannot be written: {e.strerror}",
            "Give it to the user that runs fedclient, or set another state_dir in site.toml.",
        )
    cached = _cached(state_dir / "cache")
    found = f"{_size(free)} free in {state_dir}"
    # The model, the update, and as much again while the next version comes before the old one goes.
    needed = max(3 * model_bytes, _LEAST_FREE)
    if free < needed:
        return failed(
            f"{found}; a task needs about {_size(needed)}", "Make room, or set state_dir on a larger disk in site.toml."
        )
    to_come = max(0, cache_limit - cached)
    if free < to_come:
        return warning(
            f"{found}; the cache of models may take {_size(to_come)} more",
            f"Set cache_limit in site.toml to at most {_size(cached + free // 2)}, or make room.",
        )
    return ok(f"{found}; the cache of models holds {_size(cached)} of at most {_size(cache_limit)}")


def _write(directory: Path) -> None:
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(1 << 16))
        file.flush()
        os.fsync(file.fileno())


def _cached(directory: Path) -> int:
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(directory):
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat().st_size
    return total


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"
