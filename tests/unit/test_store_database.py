"""The database: transactions that do not disturb each other, and a schema that is what the tables say."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from fedlink.errors import FedlinkError, Reason
from fedserver.services import views
from fedserver.store import migrations
from fedserver.store.database import SCHEMA_REVISION, Database
from fedserver.store.queries import clients as client_queries
from fedserver.store.queries import models as q
from fedserver.store.queries import runs as run_queries
from fedserver.store.tables import metadata


@pytest.fixture
def database(tmp_path: Path):
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    database.open()
    yield database
    database.close()


async def test_an_error_rolls_back_its_own_work_only(database: Database):
    def broken(c):
        q.set_meta(c, "bad", "1")
        raise RuntimeError("no")

    results = await asyncio.gather(
        *(database.run(lambda c, i=i: q.set_meta(c, f"k{i}", str(i))) for i in range(50)),
        database.run(broken),
        *(database.run(lambda c, i=i: q.set_meta(c, f"k{i}", str(i))) for i in range(50, 100)),
        return_exceptions=True,
    )
    assert [r for r in results if r is not None] == [results[50]]
    assert isinstance(results[50], RuntimeError)
    assert await database.run(lambda c: q.get_meta(c, "bad")) is None
    values = await database.run(lambda c: [q.get_meta(c, f"k{i}") for i in range(100)])
    assert values == [str(i) for i in range(100)]


async def test_a_caller_that_is_cancelled_does_not_stop_the_thread(database: Database):
    slow = asyncio.ensure_future(database.run(lambda c: (time.sleep(0.2), q.set_meta(c, "slow", "1"))))
    queued = asyncio.ensure_future(database.run(lambda c: q.set_meta(c, "queued", "1")))
    await asyncio.sleep(0.05)
    slow.cancel()
    queued.cancel()
    for task in (slow, queued):
        with pytest.raises(asyncio.CancelledError):
            await task
    # What had begun is finished, and the thread goes on.
    assert await database.run(lambda c: q.get_meta(c, "slow")) == "1"


async def test_nothing_is_acknowledged_of_a_transaction_that_sqlite_gave_up(database: Database):
    def lost(c):
        # What SQLite does by itself on a full disk or an I/O error.
        c.exec_driver_sql("ROLLBACK")
        raise ValueError("disk")

    gate = threading.Event()
    held = asyncio.ensure_future(database.run(lambda _: gate.wait(10)))
    await asyncio.sleep(0.05)
    # These two wait together, so they share a transaction.
    waiting = [asyncio.ensure_future(database.run(w)) for w in (lambda c: q.set_meta(c, "before", "1"), lost)]
    await asyncio.sleep(0)
    gate.set()
    await held
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert await database.run(lambda c: q.get_meta(c, "before")) is None
    assert all(isinstance(o, Exception) for o in outcomes)
    await database.run(lambda c: q.set_meta(c, "after", "1"))
    assert await database.run(lambda c: q.get_meta(c, "after")) == "1"


async def test_a_locked_database_fails_the_call_and_not_the_thread(database: Database, tmp_path: Path):
    await database.run(lambda c: c.exec_driver_sql("PRAGMA busy_timeout=50"))
    other = sqlite3.connect(tmp_path / "test.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(OperationalError):
        await database.run(lambda c: q.set_meta(c, "a", "1"))
    other.execute("ROLLBACK")
    other.close()
    await database.run(lambda c: q.set_meta(c, "b", "1"))
    assert await database.run(lambda c: (q.get_meta(c, "a"), q.get_meta(c, "b"))) == (None, "1")


async def test_a_closed_database_says_so_at_once(tmp_path: Path):
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    database.open()
    database.close()
    with pytest.raises(FedlinkError) as caught:
        await asyncio.wait_for(database.run(lambda c: q.set_meta(c, "a", "1")), 5)
    assert caught.value.reason is Reason.DRAINING


async def test_what_returned_is_on_disk(database: Database, tmp_path: Path):
    await database.run(lambda c: q.set_meta(c, "a", "1"))
    with sqlite3.connect(tmp_path / "test.db") as other:
        assert other.execute("SELECT value FROM meta").fetchall() == [("1",)]
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()


def test_migrations_lead_to_the_tables(tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'test.db'}"
    database = Database(url)
    database.open()
    database.close()
    engine = create_engine(url)
    with engine.connect() as c:
        assert compare_metadata(MigrationContext.configure(c), metadata) == []
        assert c.execute(text("SELECT version_num FROM alembic_version")).scalar() == SCHEMA_REVISION
    engine.dispose()


async def test_a_database_of_the_first_schema_is_brought_up_to_date(tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'test.db'}"
    engine = create_engine(url)
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with engine.begin() as c:
        config.attributes["connection"] = c
        command.upgrade(config, "0001")
        values = "'r', x'01', '{}', 'active', 1, 1, '', 0.0"
        c.exec_driver_sql(
            f"INSERT INTO runs (name, request_id, spec, state, rounds, version, reason, created) VALUES ({values})"
        )
        c.exec_driver_sql(
            "INSERT INTO rounds (run_id, number, attempt, phase, reason, opened) VALUES (1, 1, 1, 'committed', '', 0.0)"
        )
        c.exec_driver_sql("INSERT INTO versions VALUES (1, 1, x'02', 1, 1, 1, NULL, '{}', 0, 1, 0.0)")
        for name, session in (("here", "x'03'"), ("gone", "NULL")):
            c.exec_driver_sql(
                f"INSERT INTO clients (name, revoked, session, created) VALUES ('{name}', 0, {session}, 0.0)"
            )
    engine.dispose()
    database = Database(url)
    database.open()
    version = await database.run(lambda c: run_queries.version(c, 1, 1))
    assert version is not None
    assert (version.digest, version.kept, version.pinned) == (b"\2", True, False)
    run, rounds = await database.run(lambda c: (run_queries.run_by_id(c, 1), run_queries.list_rounds(c, 1)))
    assert run.prediction is None
    assert views.run_message(run, "").HasField("prediction") is False
    assert [r.used for r in rounds] == [None]
    assert views.use_messages(run, rounds) == []
    clients = await database.run(client_queries.all_clients)
    assert {c.name: c.present for c in clients} == {"here": True, "gone": False}
    database.close()


def test_a_database_of_a_newer_release_is_refused(tmp_path: Path):
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    database.open()
    database.close()
    with sqlite3.connect(tmp_path / "test.db") as c:
        c.execute("UPDATE alembic_version SET version_num = '9999'")
    c.close()
    with pytest.raises(FedlinkError, match="upgrade fedserver") as caught:
        Database(f"sqlite:///{tmp_path / 'test.db'}").open()
    assert caught.value.reason is Reason.BAD_CONFIG


def test_a_file_that_is_no_database_is_refused_in_a_sentence(tmp_path: Path):
    (tmp_path / "test.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(FedlinkError, match="cannot be opened"):
        Database(f"sqlite:///{tmp_path / 'test.db'}").open()
