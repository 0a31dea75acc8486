"""Files that nobody needs any more, kept for a while to be written over.

Writing over a file whose pages are in memory costs a third of writing a new one: no page
is given back and taken anew, and the disk's blocks are there. A federation writes files
of the same few sizes round after round, so each finds one.

What such a file held is never read again: whoever takes one writes all of it, or names
what is in it by hash before believing it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path

SHARE = 4
"""No more is kept than a quarter of what is free on the disk."""
KEPT_SECONDS = 600.0
"""So long a file waits for a use."""
_SMALL = 1 << 20


class Recycler:
    """A directory of files to write over; any thread of one process.

    Args:
        root: the directory, on the same file system as the files; what it holds from before is deleted.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._kept: dict[Path, tuple[int, float]] = {}
        """Size, and since when it has been kept; the oldest first."""
        # Emptied and not made anew, which a full disk might refuse.
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _delete(root.iterdir())

    @property
    def held(self) -> int:
        """Bytes that are kept; they can be had by `clear`."""
        with self._lock:
            return sum(size for size, _ in self._kept.values())

    def give(self, path: Path) -> None:
        """Take a file over, or delete it if it is small, there is no room, or it has a second name.

        Raises:
            OSError: it is not there, or the disk refuses.
        """
        status = path.stat()
        self.expire()
        free = shutil.disk_usage(self._root).free
        # A second name's bytes are somebody's still.
        if status.st_nlink > 1 or status.st_size < _SMALL or (self.held + status.st_size) * SHARE > free:
            path.unlink()
            return
        kept = self._root / str(next(self._numbers))
        try:
            path.rename(kept)
        except OSError:
            # On a file system of its own, as a volume for the blobs would be, it is of no use here.
            path.unlink()
            return
        with self._lock:
            self._kept[kept] = status.st_size, time.monotonic()

    def take(self, target: Path, size: int) -> None:
        """Move the file that is nearest in size to `target`, which is not there; nothing happens if none is near.

        Its content, and its exact size, are whatever they were.
        """
        while kept := self._nearest(size):
            with contextlib.suppress(OSError):
                # Nobody can give it a second name in here, but may have just before it came.
                if kept.stat().st_nlink == 1:
                    kept.rename(target)
                    return
            _delete([kept])

    async def expiring(self) -> None:
        """Delete what has waited too long, for ever."""
        while True:
            await asyncio.sleep(KEPT_SECONDS / 10)
            await asyncio.to_thread(self.expire)

    def expire(self) -> None:
        """Delete what has waited too long."""
        oldest = time.monotonic() - KEPT_SECONDS
        with self._lock:
            late = [path for path, (_, since) in self._kept.items() if since < oldest]
            for path in late:
                del self._kept[path]
        _delete(late)

    def clear(self) -> None:
        """Delete everything that is kept."""
        with self._lock:
            paths = list(self._kept)
            self._kept.clear()
        _delete(paths)

    def _nearest(self, size: int) -> Path | None:
        """A file of at least half and at most twice the size, which is taken out of the books."""
        with self._lock:
            near = [(abs(had - size), path) for path, (had, _) in self._kept.items() if size <= 2 * had <= 4 * size]
            if size < _SMALL or not near:
                return None
            path = min(near)[1]
            del self._kept[path]
            return path


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        # What a disk refuses to delete goes when the next process begins.
        with contextlib.suppress(OSError):
            path.unlink()
