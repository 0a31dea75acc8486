"""Names and sizes in sentences. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable

_MAX_NAMES = 20


def listed(items: Collection[object], separator: str = ", ") -> str:
    """Some names; a thousand of them make no sentence."""
    shown: Iterable[object] = list(items)[:_MAX_NAMES]
    rest = len(items) - _MAX_NAMES
    return separator.join(map(str, shown)) + (f" and {rest} more" if rest > 0 else "")


def size(nbytes: float) -> str:
    """Bytes for people, e.g. "498.1 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError
