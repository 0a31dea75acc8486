"""What every task of a daemon works with."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fedclient.session import Session
from fedclient.spool import Spool
from fedclient.transfer import Transfer

_T = TypeVar("_T")


@dataclass(frozen=True)
class Tools:
    """What every task of a daemon works with."""

    session: Session
    spool: Spool
    transfer: Transfer
    disk: Executor
    """One thread: what is written to the spool is written in the order it was asked for."""
    rng: random.Random
    client: str
    """The site's name."""

    async def on_disk(self, act: Callable[..., _T], *args: Any) -> _T:
        """Do something with the spool."""
        return await asyncio.get_running_loop().run_in_executor(self.disk, partial(act, *args))
