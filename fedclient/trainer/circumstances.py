"""What a measurement depends on besides the run and its model: the site's files, its device, packages and code."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from fedclient.trainer.wire import Device

FILES = 10_000
"""Data files that are looked at, of each path that the data table names."""
PACKAGES = ("numpy", "torch", "transformers", "peft", "bitsandbytes")
"""Whose versions tell how much memory a step takes, and how well it learns."""


def surroundings(found: type, device: Device) -> list[Any]:
    """What a workload's class runs on and with, as JSON: the device, packages, and a digest of the class's own file.

    Args:
        found: the class.
        device: where it trains.
    """
    memory = device.memory_bytes or _machine_memory()
    return [device.name, device.model, memory, versions(PACKAGES), _source_digest(found)]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    known = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            known[name] = importlib.metadata.version(name)
    return known


def data_files(directory: Path, data: Mapping[str, Any], alive: Callable[[], None]) -> list[tuple[str, int, int]]:
    """Path, size and time of change (in ns) of the files that a data table names, and of those in its directories.

    What a text names that holds `directory` itself is passed over: it is no data.

    Args:
        directory: where site.toml lies, which relative paths are relative to.
        data: `[workload.NAME.data]`.
        alive: called now and then: directories may be large.
    """
    known = []
    for name in sorted(set(_texts(data))):
        with contextlib.suppress(OSError, ValueError):
            path = directory / name
            if directory.resolve().is_relative_to(path.resolve()):
                continue
            for file in islice(_files(path), FILES):
                alive()
                # What a link names may be gone.
                with contextlib.suppress(OSError):
                    status = file.stat()
                    known.append((str(file), status.st_size, status.st_mtime_ns))
    return known


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for root, directories, files in os.walk(path):
        directories.sort()
        yield from (Path(root, name) for name in sorted(files))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _machine_memory() -> int:
    """In whole GiB: what a kernel keeps of it for itself varies."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30


def _source_digest(found: type) -> str:
    path = getattr(sys.modules.get(found.__module__), "__file__", None)
    with contextlib.suppress(OSError):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""
    return ""
