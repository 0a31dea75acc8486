"""Events: recorded in the transaction that makes them so, streamed to whoever watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fedserver.store.database import Database
from fedserver.store.queries import runs as q
from fedserver.store.rows import EventRow


class EventFeed:
    """Wakes the watchers of a run after a commit; the database is where the events are."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._watchers: dict[int, set[asyncio.Event]] = {}

    def notify(self, run_id: int) -> None:
        """Say that a run has new events or has ended."""
        for news in self._watchers.get(run_id, ()):
            news.set()

    async def follow(self, run_id: int, after: int) -> AsyncIterator[EventRow]:
        """Yield a run's events from `after` on, each once, until the run has ended and all were told."""
        news = asyncio.Event()
        self._watchers.setdefault(run_id, set()).add(news)
        try:
            while True:
                # Before reading, so that nothing committed after the read goes unnoticed.
                news.clear()
                rows, live = await self._db.run(
                    lambda c, after=after: (  # type: ignore[misc]
                        q.events_after(c, run_id, after),
                        q.run_by_id(c, run_id).state in q.LIVE_STATES,
                    )
                )
                for row in rows:
                    yield row
                    after = row.sequence
                if not rows and not live:
                    return
                if not rows:
                    await news.wait()
        finally:
            self._watchers[run_id].discard(news)
            if not self._watchers[run_id]:
                del self._watchers[run_id]
