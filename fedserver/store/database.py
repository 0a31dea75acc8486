"""One database, one thread that talks to it: transitions are serial, commits are shared."""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from fedlink.errors import FedlinkError, Reason
from fedserver.store.disk import Disk, disk_full, disk_unwritable, refuse_network_disk

T = TypeVar("T")

SCHEMA_REVISION = "0005"
"""The newest revision in migrations/versions."""
_BATCH = 64
"""Transactions that may share one commit."""
_USE = "the database"

_Job = tuple[Callable[[Connection], Any], "Future[Any]"]


class Database:
    """SQLite in WAL mode by default, PostgreSQL by URL.

    Every call runs as a transaction of its own (a savepoint); calls that wait together
    share one commit, and each returns after its commit is durable.

    Args:
        url: SQLAlchemy's.
        disk: told of what SQLite's disk refuses.
    """

    def __init__(self, url: str, *, disk: Disk | None = None) -> None:
        self._url = url
        self._disk = disk
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._engine = _engine(url)
        self._thread = threading.Thread(target=self._work, name="database", daemon=True)
        self._closed = False

    def open(self) -> None:
        """Bring the tables up to date and start; call once.

        Raises:
            FedlinkError: BAD_CONFIG if the database cannot be opened, is of a newer release, or is SQLite on a network
                file system.
        """
        address = make_url(self._url)
        if address.get_backend_name() == "sqlite" and address.database:
            refuse_network_disk(Path(address.database))
        try:
            self._migrate()
        except SQLAlchemyError as e:
            name = address.render_as_string(hide_password=True)
            raise FedlinkError(Reason.BAD_CONFIG, f"database {name} cannot be opened: {e.__cause__ or e}") from None
        self._thread.start()

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in a transaction; its exception rolls back only its own changes.

        A caller that is cancelled before its turn takes its work along; after that it is carried out.

        Raises:
            FedlinkError: DRAINING if the database is closed; DISK_FULL, DISK_UNWRITABLE.
        """
        if self._closed:
            raise FedlinkError(Reason.DRAINING, "the server is stopping; try again when it is back")
        future: Future[T] = Future()
        self._jobs.put((work, future))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Finish what waits, then stop."""
        self._closed = True
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
        self._engine.dispose()

    def _migrate(self) -> None:
        with self._engine.connect() as connection:
            try:
                found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
            except SQLAlchemyError:
                found = None
            connection.rollback()
            if found == SCHEMA_REVISION:
                return
            if found is not None and found > SCHEMA_REVISION:
                raise FedlinkError(
                    Reason.BAD_CONFIG,
                    f"the database has schema {found}, this release knows {SCHEMA_REVISION}: upgrade fedserver",
                )
        # Imported only when there is something to do: alembic costs a fifth of the start.
        from fedserver.store.migrations import upgrade  # noqa: PLC0415

        upgrade(self._engine)

    def _work(self) -> None:
        with self._engine.connect() as connection:
            while (job := self._jobs.get()) is not None:
                batch = [job]
                stop = False
                while len(batch) < _BATCH and not self._jobs.empty():
                    more = self._jobs.get()
                    if more is None:
                        stop = True
                        break
                    batch.append(more)
                self._note(*_run_batch(connection, batch))
                if stop:
                    return

    def _note(self, trouble: FedlinkError | None, wrote: bool) -> None:
        if self._disk is None:
            return
        if trouble is not None:
            self._disk.failed(_USE, trouble)
        elif wrote:
            self._disk.worked(_USE)


def _run_batch(connection: Connection, batch: list[_Job]) -> tuple[FedlinkError | None, bool]:
    """Carry out what waits.

    Returns:
        What the disk refused, if it did; whether anything was written.
    """
    trouble, wrote = None, False
    # From here on a caller that is cancelled no longer cancels the work.
    batch = [(work, future) for work, future in batch if future.set_running_or_notify_cancel()]
    outcomes: list[tuple[Future[Any], Any, BaseException | None]] = []
    read = 0
    try:
        with connection.begin():
            before = _changes(connection)
            for work, future in batch:
                try:
                    with connection.begin_nested():
                        outcomes.append((future, work(connection), None))
                except Exception as e:
                    if _transaction_lost(connection):
                        # SQLite gave the whole transaction up (disk full, I/O error), the work before this one too.
                        raise
                    outcomes.append((future, None, e))
                wrote = _changes(connection) != before
                if not wrote:
                    read = len(outcomes)
    except Exception as e:  # noqa: BLE001 - the commit failed for all of them; the thread must live
        # All but those that came before the first change, and so have read what is true.
        outcomes = outcomes[:read] + [(future, None, e) for _, future in batch[read:]]
    for future, value, error in outcomes:
        if error is not None:
            named = _named(error)
            trouble = trouble or (named if isinstance(named, FedlinkError) and named is not error else None)
            future.set_exception(named)
        else:
            future.set_result(value)
    return trouble, wrote


def _changes(connection: Connection) -> object:
    """Rows that SQLite has changed so far; for other databases nothing that equals anything."""
    driver: Any = connection.connection.dbapi_connection
    return driver.total_changes if connection.dialect.name == "sqlite" else object()


def _named(error: BaseException) -> BaseException:
    """What SQLite says of its disk, as our error; anything else as it is."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    if not isinstance(cause, sqlite3.Error):
        return error
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        named = disk_full(_USE)
    elif code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
        named = disk_unwritable(_USE, str(cause))
    else:
        return error
    named.__cause__ = error
    return named


def _transaction_lost(connection: Connection) -> bool:
    driver: Any = connection.connection.dbapi_connection
    return connection.dialect.name == "sqlite" and not driver.in_transaction


def _engine(url: str) -> Engine:
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _: object) -> None:
    # sqlite3's own transaction handling breaks savepoints; SQLAlchemy's "begin" event takes over.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
