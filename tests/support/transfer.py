"""A blob server on loopback with a dict for its authority."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc.aio

from fedlink import rpc
from fedlink.blobs import BlobRef, chunk_digests_of, ref_of
from fedlink.errors import FedlinkError, Reason
from fedlink.transfer import Purpose, TaskPurpose
from fedserver.runtime.access import Caller
from fedserver.services.blob import BlobServicer, BulkLimits
from fedserver.services.status import Context
from fedserver.store.blobs import DirectoryBlobStore
from fedserver.store.spool import Spool

QUICK: dict[str, Any] = {"base": 0.01, "cap": 0.05}
"""Waits short enough for a test."""


def some_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


class DictAccess:
    """`BlobAccess` over dicts: a task token is `b"task-" + client`, and may read what is published."""

    def __init__(self, store: DirectoryBlobStore, spool: Spool) -> None:
        self.store = store
        self.spool = spool
        self.published: dict[bytes, BlobRef] = {}
        self.uploads: dict[bytes, tuple[str, Purpose]] = {}
        self.closed = False
        self.found_damaged: list[bytes] = []
        self.read = 0
        self.written = 0
        self.starts = 0

    def publish(self, data: bytes, directory: Path) -> BlobRef:
        ref = ref_of(data)
        path = directory / secrets.token_hex(8)
        path.write_bytes(data)
        self.store.adopt(path, ref, chunk_digests_of(data))
        self.published[ref.digest] = ref
        return ref

    def _check(self, caller: Caller, token: bytes) -> None:
        if not caller.operator and token != b"task-" + caller.name.encode():
            raise FedlinkError(Reason.TASK_NOT_FOUND, "no such task")
        if self.closed:
            raise FedlinkError(Reason.ROUND_CLOSED, "the round is over")

    async def readable(self, caller: Caller, task_token: bytes, digest: bytes) -> BlobRef:
        self._check(caller, task_token)
        if digest not in self.published:
            raise FedlinkError(Reason.BLOB_NOT_FOUND, "no such blob")
        return self.published[digest]

    async def missing(self, caller: Caller, purpose: Purpose, digests: Sequence[bytes]) -> list[bytes]:
        self._check(caller, purpose.token if isinstance(purpose, TaskPurpose) else b"")
        return [d for d in digests if d not in self.published]

    async def start_upload(self, caller: Caller, purpose: Purpose, ref: BlobRef, chunk_digests: bytes) -> bytes:
        self.starts += 1
        self._check(caller, purpose.token if isinstance(purpose, TaskPurpose) else b"")
        for upload_id, owner in self.uploads.items():
            with contextlib.suppress(FedlinkError):
                if owner == (caller.name, purpose) and self.spool.ref(upload_id) == ref:
                    return upload_id
        upload_id = secrets.token_bytes(16)
        if ref.digest in self.published:
            self.spool.link(upload_id, self.store.local_path(ref.digest), ref, chunk_digests)
        else:
            self.spool.create(upload_id, ref, chunk_digests)
        self.uploads[upload_id] = (caller.name, purpose)
        return upload_id

    async def owned(self, caller: Caller, upload_id: bytes) -> None:
        if self.closed:
            raise FedlinkError(Reason.ROUND_CLOSED, "the round is over")
        if upload_id not in self.uploads or self.uploads[upload_id][0] != caller.name:
            raise FedlinkError(Reason.UPLOAD_NOT_FOUND, "no such upload")

    async def damaged(self, caller: Caller, digest: bytes, error: FedlinkError) -> FedlinkError:
        self.found_damaged.append(digest)
        return error

    def count_read(self, task_token: bytes, nbytes: int) -> None:
        self.read += nbytes

    def count_written(self, upload_id: bytes, nbytes: int) -> None:
        self.written += nbytes


async def identify(context: Context) -> Caller:
    """Whoever the metadata says; "root" is an operator."""
    name = rpc.metadata_value(context.invocation_metadata(), rpc.META_CLIENT)
    if not isinstance(name, str):
        raise FedlinkError(Reason.BAD_CREDENTIALS, "who are you")
    return Caller(name, operator=name == "root")


class BlobServer:
    """A real grpc.aio server with a BlobServicer; can stop, and start again on its port."""

    def __init__(self, root: Path, limits: BulkLimits | None = None) -> None:
        self.root = root
        self.limits = limits
        self.port = 0
        self.executor = ThreadPoolExecutor(4)
        self.open_disk()

    def open_disk(self) -> None:
        self.store = DirectoryBlobStore(self.root / "blobs")
        self.spool = Spool(self.root / "spool")
        self.access = DictAccess(self.store, self.spool)
        # After a restart every slot there is belongs to client a's task.
        self.access.uploads = {upload_id: ("a", TaskPurpose(b"task-a")) for upload_id in self.spool.ids()}

    async def start(self) -> None:
        self.server = grpc.aio.server(options=rpc.server_options())
        servicer = BlobServicer(
            self.access, self.store, self.spool, identify=identify, executor=self.executor, limits=self.limits
        )
        servicer.add_to_server(self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.server.start()

    async def stop(self) -> None:
        await self.server.stop(None)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


@contextlib.asynccontextmanager
async def blob_server(root: Path, limits: BulkLimits | None = None) -> AsyncIterator[BlobServer]:
    server = BlobServer(root, limits)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
        server.executor.shutdown()


@contextlib.asynccontextmanager
async def channel_to(address: str) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(address, options=rpc.channel_options()) as channel:
        yield channel


def as_client(name: str) -> Callable[[], rpc.Metadata]:
    return lambda: ((rpc.META_CLIENT, name),)


async def serve(root: Path, port: int) -> None:
    """A blob server as a process of its own, to be killed; says "ready" when it is."""
    rpc.tune_malloc()
    server = BlobServer(root)
    server.port = port
    await server.start()
    print(f"ready {server.port}", flush=True)
    await server.server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
