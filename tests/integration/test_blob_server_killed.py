"""SIGKILL of the server in the middle of an upload: nothing that was acknowledged is lost."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from fedlink import bulk
from fedlink.blobs import chunk_digests_of, ref_of
from fedlink.transfer import Retry, TaskPurpose
from fedlink.v1 import blob_service_pb2 as pb
from fedlink.v1 import blob_service_pb2_grpc as pb_grpc
from fedserver.store.spool import Spool
from tests.support.transfer import QUICK, as_client, channel_to, some_bytes

MIB = 1 << 20
TASK = TaskPurpose(b"task-a")


@contextlib.asynccontextmanager
async def process(root: Path, port: int = 0) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.transfer", str(root), str(port), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert server.stdout
        word, _, number = (await server.stdout.readline()).decode().partition(" ")
        assert word == "ready"
        yield server, int(number)
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.kill()
        await server.wait()


async def test_acknowledged_bytes_survive_sigkill(tmp_path: Path) -> None:
    data = some_bytes(48 * MIB + 5)
    ref, digests = ref_of(data), chunk_digests_of(data)
    source = tmp_path / "source"
    source.write_bytes(data)
    root = tmp_path / "server"
    rng = random.Random(1)
    async with process(root) as (server, port), channel_to(f"127.0.0.1:{port}") as channel:
        upload = asyncio.create_task(
            bulk.upload_file(channel, source, ref, digests, TASK, metadata=as_client("a"), retry=Retry(**QUICK))
        )
        acknowledged = 0
        while not (ids := list((root / "spool").glob("[!.]*"))):
            await asyncio.sleep(0.001)
        upload_id = bytes.fromhex(ids[0].name)
        query = pb.QueryUploadRequest(upload_id=upload_id)
        while acknowledged < rng.randrange(2, 20) * MIB and not upload.done():
            answer = await pb_grpc.BlobServiceStub(channel).QueryUpload(query, metadata=as_client("a")())
            acknowledged = answer.committed_size
        server.send_signal(signal.SIGKILL)
        await server.wait()
        spool = Spool(root / "spool")
        assert spool.committed(upload_id) >= acknowledged
        assert spool.reverify(upload_id) == spool.committed(upload_id)
        async with process(root, port):
            await upload
        assert spool.path(upload_id).read_bytes() == data
