"""The server's database without a thread: every transaction is carried out where it is asked for."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import StaticPool

from fedlink.run_file import Cohort
from fedserver.store.queries import runs as run_queries
from fedserver.store.rows import RunRow
from fedserver.store.tables import metadata

T = TypeVar("T")


class Ledger:
    """The tables in memory; stands in for `fedserver.store.database.Database`."""

    def __init__(self) -> None:
        self._engine = create_engine("sqlite://", poolclass=StaticPool)
        metadata.create_all(self._engine)
        self._runs = 0

    def do(self, work: Callable[[Connection], T]) -> T:
        """Carry out a transaction."""
        with self._engine.begin() as connection:
            return work(connection)

    async def run(self, work: Callable[[Connection], T]) -> T:
        """The same, in the database's words."""
        return self.do(work)

    def add_run(self, policy: Cohort | None = None, *, seed: int = 0) -> RunRow:
        """A run of its own."""
        self._runs += 1
        name = f"run{self._runs}"
        spec: dict[str, Any] = {"name": name, "workload": "w", "rounds": 9, "model": "m", "seed": seed}
        spec["cohort"] = (policy or Cohort()).model_dump()
        values = {"spec": json.dumps(spec), "request_id": name.encode(), "state": "active", "rounds": 9, "version": 0}
        return self.do(lambda c: run_queries.insert_run(c, name=name, created=0.0, **values))

    def close(self) -> None:
        """Let it go."""
        self._engine.dispose()


@contextlib.contextmanager
def ledger() -> Iterator[Ledger]:
    """A ledger for some tests."""
    made = Ledger()
    try:
        yield made
    finally:
        made.close()
