"""A server that is told to stop in the middle of reading what takes many minutes does not finish reading it."""

from __future__ import annotations

import asyncio
import os
import re
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from fedlink.blobs import CHUNK_SIZE, BlobRef, chunk_digest, digest_of_chunks, ref_of
from fedlink.manifest import FileEntry, Manifest
from fedlink.tensors import Kind
from fedserver.store.blobs import DirectoryBlobStore
from fedserver.store.database import Database
from fedserver.store.queries import models as model_queries
from fedserver.store.queries import tasks as task_queries
from tests.support.federation import Daemon, Federation, program, until

pytestmark = pytest.mark.slow

CHUNKS = 1 << 19
LIST = chunk_digest(bytes(CHUNK_SIZE)) * CHUNKS
VAST = BlobRef(digest_of_chunks(LIST), CHUNK_SIZE * CHUNKS)
"""Half a tebibyte of nothing: it takes no room on the disk, and many minutes to hash."""


@pytest.fixture
def federation(tmp_path: Path):
    with Federation(tmp_path) as made:
        made.start_server()
        made.import_model("small", {"w": np.ones(3, np.float32)})
        yield made


def in_database(federation: Federation, work: Callable[[Database], Awaitable[None]]) -> None:
    database = Database(f"sqlite:///{federation.data_dir}/fedserver.db")
    database.open()
    asyncio.run(work(database))
    database.close()


def make_vast(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, VAST.size)
    return path


def until_read(pid: int, nbytes: int) -> None:
    """Wait until a process has read so much from files."""

    def read() -> int:
        found = re.search(r"^rchar: (\d+)$", Path(f"/proc/{pid}/io").read_text(), re.MULTILINE)
        assert found
        return int(found[1])

    before = read()
    until(lambda: read() > before + nbytes, f"process {pid} to read {nbytes} bytes")


def test_while_it_looks_at_its_models(federation: Federation) -> None:
    store = DirectoryBlobStore(federation.data_dir / "blobs")
    # No file may have so many bytes; what a look reads is what lies on the disk.
    manifest = Manifest(Kind.MODEL, (FileEntry("nothing", BlobRef(VAST.digest, 0)),), (), {}).serialize()
    ref = ref_of(manifest)
    (federation.root / "manifest").write_bytes(manifest)
    store.adopt(federation.root / "manifest", ref, chunk_digest(manifest))
    store.adopt(make_vast(federation.data_dir / "vast"), VAST, LIST)

    async def record(database: Database) -> None:
        row = {"name": "vast", "digest": ref.digest, "manifest_size": ref.size, "size": VAST.size, "tensors": 0}
        await database.run(lambda c: model_queries.insert_model(c, **row, created=time.time()))
        await database.run(lambda c: model_queries.add_refs(c, "model:vast", [ref.digest, VAST.digest]))

    in_database(federation, record)
    command = [program("fedserver"), "model", "verify", "--data-dir", str(federation.data_dir)]
    verify = Daemon(command, federation.root / "verify.log", cwd=federation.root)
    federation.callback(verify.clean)
    assert federation.server is not None
    until_read(federation.server.pid, 64 * CHUNK_SIZE)
    # What it is through with it has told.
    until(lambda: "small  2 files are as they were stored\n" in verify.text(), "the first model to be named")
    assert verify.running
    assert federation.server.stop() == 0
    assert verify.wait() == 3
    assert "Traceback" not in federation.server.text() + verify.text()


def test_while_it_looks_at_what_a_power_loss_may_have_taken(federation: Federation) -> None:
    assert federation.server is not None
    assert federation.server.stop() == 0
    upload_id = b"u" * 16
    slot = federation.data_dir / "spool" / upload_id.hex()
    make_vast(slot / "data")
    (slot / "chunks").write_bytes(LIST)
    (slot / "state").write_bytes(struct.pack("<8s32sQQ", b"FLSPOOL1", VAST.digest, VAST.size, VAST.size))

    async def record(database: Database) -> None:
        row = {"id": upload_id, "import_id": upload_id, "digest": VAST.digest, "size": VAST.size}
        await database.run(lambda c: task_queries.insert_upload(c, **row, created=time.time()))
        await database.run(lambda c: model_queries.set_meta(c, "boot_id", "another boot"))

    in_database(federation, record)
    command = [program("fedserver"), "serve", "--data-dir", str(federation.data_dir), "--listen", "127.0.0.1:0"]
    server = Daemon(command, federation.root / "again.log", cwd=federation.root)
    federation.callback(server.clean)
    until_read(server.pid, 64 * CHUNK_SIZE)
    assert server.stop() == 0
    assert "Traceback" not in server.text()
    # Nothing is known of what was not looked at.
    assert struct.unpack("<8s32sQQ", (slot / "state").read_bytes())[3] == VAST.size
