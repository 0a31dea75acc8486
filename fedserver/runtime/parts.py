"""What the drivers of runs have in common."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from fedserver.runtime.board import TaskBoard
from fedserver.runtime.events import EventFeed
from fedserver.runtime.integrity import Integrity
from fedserver.runtime.sites import SiteRegistry
from fedserver.runtime.uploads import TaskBlobAccess
from fedserver.runtime.versions import Versions
from fedserver.store.database import Database
from fedserver.store.disk import Disk


@dataclass(frozen=True)
class Parts:
    """What every driver works with."""

    database: Database
    board: TaskBoard
    sites: SiteRegistry
    versions: Versions
    access: TaskBlobAccess
    feed: EventFeed
    integrity: Integrity
    disk: Disk
    adding_up: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the one run that adds updates up while others are out."""
