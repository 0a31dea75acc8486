# ruff: noqa: N802 - methods are named by the protocol
"""A server for tests of the client: the generated services on a real socket, a dictionary behind them.

It speaks stock protobuf, so it also is a peer that knows nothing of our fast codec.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Self

import grpc.aio

from fedlink import rpc
from fedlink.blobs import CHUNK_SIZE, MAX_STREAM_BYTES, blob_digest, chunk_digests_of
from fedlink.errors import FedlinkError, Reason
from fedlink.manifest import Manifest
from fedlink.v1 import blob_service_pb2 as blob_pb
from fedlink.v1 import coordination_service_pb2 as pb
from fedlink.v1 import types_pb2 as types_pb
from fedlink.v1.blob_service_pb2_grpc import BlobServiceServicer, add_BlobServiceServicer_to_server
from fedlink.v1.coordination_service_pb2_grpc import (
    CoordinationServiceServicer,
    add_CoordinationServiceServicer_to_server,
)


@dataclass
class Uploading:
    """One upload."""

    token: bytes
    digest: bytes
    size: int
    data: bytearray = field(default_factory=bytearray)


@dataclass
class State:
    """What the server remembers, and what the test may set."""

    lease_term: float = 60.0
    sessions: dict[bytes, bytes] = field(default_factory=dict)
    """Session by instance."""
    tasks: deque[pb.Task] = field(default_factory=deque)
    given: dict[bytes, pb.Task] = field(default_factory=dict)
    released: set[bytes] = field(default_factory=set)
    cancelled: set[bytes] = field(default_factory=set)
    reopened: set[bytes] = field(default_factory=set)
    over: dict[bytes, Reason] = field(default_factory=dict)
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    uploads: dict[bytes, Uploading] = field(default_factory=dict)
    faults: dict[str, deque[FedlinkError | float | grpc.StatusCode]] = field(default_factory=lambda: defaultdict(deque))
    """By method: what the next calls meet; a number is seconds of delay."""
    verdicts: deque[pb.CompleteTaskResponse] = field(default_factory=deque)
    """Answers to CompleteTask; ACCEPTED if there is none."""
    write_delay: float = 0.0
    """Seconds between two chunks received."""
    # What came in.
    registrations: list[pb.RegisterClientRequest] = field(default_factory=list)
    polls: list[tuple[bytes, ...]] = field(default_factory=list)
    waiting: int = 0
    """Polls held right now."""
    beats: list[pb.ExtendLeaseRequest] = field(default_factory=list)
    completed: list[pb.CompleteTaskRequest] = field(default_factory=list)
    failed: list[pb.FailTaskRequest] = field(default_factory=list)
    points: list[pb.ReportMetricsRequest] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    deregistered: int = 0
    announced: set[tuple[bytes, bytes]] = field(default_factory=set)
    """Task and digest of each StartUpload."""
    received: int = 0
    """Bytes of chunks."""
    read: list[bytes] = field(default_factory=list)
    """Digests of blobs asked for."""
    held_back: dict[bytes, asyncio.Event] = field(default_factory=dict)
    """By digest: blobs that are not sent before the event."""
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)


class FakeServer:
    """Starts, stops and starts again on one port; `state` outlives a restart."""

    def __init__(self) -> None:
        self.state = State()
        self.port = 0
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listen."""
        server = grpc.aio.server(options=rpc.server_options())
        add_CoordinationServiceServicer_to_server(Coordination(self.state), server)
        add_BlobServiceServicer_to_server(Blobs(self.state), server)
        self.port = server.add_insecure_port(f"127.0.0.1:{self.port}")
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """Drop every connection."""
        if self._server:
            await self._server.stop(None)
            self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    def add_blob(self, data: bytes) -> types_pb.BlobRef:
        """Make bytes readable."""
        digest = blob_digest(data)
        self.state.blobs[digest] = data
        return types_pb.BlobRef(digest=digest, size=len(data))

    async def give(self, task: pb.Task) -> bytes:
        """Offer a task; returns its token."""
        async with self.state.changed:
            self.state.tasks.append(task)
            self.state.changed.notify_all()
        return task.token

    async def until(self, what: Any, seconds: float = 20.0) -> None:
        """Wait for something to be true of the state."""
        async with asyncio.timeout(seconds):
            while not what(self.state):
                await asyncio.sleep(0.01)

    def hold_back(self, model: types_pb.BlobRef, file: int) -> asyncio.Event:
        """Send a file of a model only once the event is set."""
        digest = Manifest.parse(self.state.blobs[model.digest]).files[file].blob.digest
        return self.state.held_back.setdefault(digest, asyncio.Event())

    def update_of(self, request: pb.CompleteTaskRequest) -> tuple[Manifest, list[bytes]]:
        """The update a completed task refers to."""
        manifest = Manifest.parse(self.state.blobs[request.update.digest])
        return manifest, [self.state.blobs[f.blob.digest] for f in manifest.files]


async def _refuse(context: Any, reason: Reason, text: str = "said the test", **metadata: str) -> None:
    await context.abort_with_status(rpc.to_status(FedlinkError(reason, text, metadata=metadata)))


class _Base:
    def __init__(self, state: State) -> None:
        self.state = state

    async def enter(self, method: str, context: Any, token: bytes = b"") -> None:
        metadata = dict(context.invocation_metadata())
        self.state.metadata.append(metadata)
        if self.state.faults[method]:
            fault = self.state.faults[method].popleft()
            if isinstance(fault, FedlinkError):
                await context.abort_with_status(rpc.to_status(fault))
            elif isinstance(fault, grpc.StatusCode):
                await context.abort(fault, "said the test")
            else:
                await asyncio.sleep(fault)
        known = metadata.get(rpc.META_SESSION) in self.state.sessions.values()
        if method != "RegisterClient" and not known:
            await _refuse(context, Reason.SESSION_UNKNOWN)
        if token in self.state.over:
            await _refuse(context, self.state.over[token])


class Coordination(_Base, CoordinationServiceServicer):
    """CoordinationService."""

    async def RegisterClient(self, request: Any, context: Any) -> Any:
        await self.enter("RegisterClient", context)
        self.state.registrations.append(request)
        session = self.state.sessions.setdefault(request.instance_id, os.urandom(16))
        answer = pb.RegisterClientResponse(session=session, client_name="site")
        answer.lease_term.FromMilliseconds(int(self.state.lease_term * 1000))
        answer.max_poll_wait.FromSeconds(30)
        return answer

    async def PollTask(self, request: Any, context: Any) -> Any:
        await self.enter("PollTask", context)
        state, held = self.state, set(request.held_tokens)
        state.polls.append(tuple(request.held_tokens))
        released = held & state.released
        async with state.changed:
            state.waiting += 1
            try:
                async with asyncio.timeout(request.wait.ToMilliseconds() / 1000):
                    while not released and not self._next(held):
                        await state.changed.wait()
                        released = held & state.released
            except TimeoutError:
                pass
            finally:
                state.waiting -= 1
            task = self._next(held)
            if task:
                state.reopened.discard(task.token)
                if task in state.tasks:
                    state.tasks.remove(task)
                state.given[task.token] = task
        return pb.PollTaskResponse(task=task, released_tokens=released)

    def _next(self, held: set[bytes]) -> pb.Task | None:
        for token in self.state.reopened & held:
            return self.state.given[token]
        lost = [t for token, t in self.state.given.items() if token not in held and not self._final(token)]
        return (lost or list(self.state.tasks) or [None])[0]

    def _final(self, token: bytes) -> bool:
        return token in self.state.over or any(r.token == token for r in (*self.state.completed, *self.state.failed))

    async def ExtendLease(self, request: Any, context: Any) -> Any:
        self.state.beats.append(request)
        await self.enter("ExtendLease", context, request.token)
        answer = pb.ExtendLeaseResponse(cancel=request.token in self.state.cancelled)
        answer.lease_term.FromMilliseconds(int(self.state.lease_term * 1000))
        return answer

    async def CompleteTask(self, request: Any, context: Any) -> Any:
        await self.enter("CompleteTask", context, request.token)
        if request.HasField("update"):
            needed = [request.update.digest]
            if request.update.digest in self.state.blobs:
                needed += [f.blob.digest for f in Manifest.parse(self.state.blobs[request.update.digest]).files]
            for digest in needed:
                if digest not in self.state.blobs or (request.token, digest) not in self.state.announced:
                    await _refuse(context, Reason.BLOB_MISSING, digest=digest.hex())
        self.state.completed.append(request)
        if self.state.verdicts:
            return self.state.verdicts.popleft()
        return pb.CompleteTaskResponse(outcome=pb.CompleteTaskResponse.OUTCOME_ACCEPTED)

    async def FailTask(self, request: Any, context: Any) -> Any:
        await self.enter("FailTask", context, request.token)
        self.state.failed.append(request)
        return pb.FailTaskResponse()

    async def ReportMetrics(self, request: Any, context: Any) -> Any:
        await self.enter("ReportMetrics", context, request.token)
        self.state.points.append(request)
        return pb.ReportMetricsResponse()

    async def DeregisterClient(self, request: Any, context: Any) -> Any:
        await self.enter("DeregisterClient", context)
        self.state.deregistered += 1
        return pb.DeregisterClientResponse()


class Blobs(_Base, BlobServiceServicer):
    """BlobService."""

    async def ReadBlob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.enter("ReadBlob", context, request.task_token)
        if request.digest in self.state.held_back:
            self.state.read.append(request.digest)
            await self.state.held_back[request.digest].wait()
        data = self.state.blobs.get(request.digest)
        if data is None:
            await _refuse(context, Reason.BLOB_NOT_FOUND)
            return
        self.state.read.append(request.digest)
        chunks = chunk_digests_of(data) if request.include_chunk_digests else b""
        yield blob_pb.ReadBlobResponse(size=len(data), chunk_digests=chunks)
        stop = min(len(data), request.offset + (request.limit or MAX_STREAM_BYTES))
        for at in range(request.offset, stop, CHUNK_SIZE):
            yield blob_pb.ReadBlobResponse(offset=at, payload=data[at : min(stop, at + CHUNK_SIZE)])

    async def FindMissingBlobs(self, request: Any, context: Any) -> Any:
        await self.enter("FindMissingBlobs", context, request.task_token)
        return blob_pb.FindMissingBlobsResponse(missing=[d for d in request.digests if d not in self.state.blobs])

    async def StartUpload(self, request: Any, context: Any) -> Any:
        await self.enter("StartUpload", context, request.task_token)
        self.state.announced.add((request.task_token, request.blob.digest))
        digest, uploads = request.blob.digest, self.state.uploads
        if digest in self.state.blobs:
            return blob_pb.StartUploadResponse(upload_id=digest[:16], committed_size=request.blob.size, complete=True)
        upload = uploads.setdefault(digest[:16], Uploading(request.task_token, digest, request.blob.size))
        return blob_pb.StartUploadResponse(
            upload_id=digest[:16], committed_size=len(upload.data), complete=self._complete(upload)
        )

    async def WriteBlob(self, request_iterator: Any, context: Any) -> Any:
        await self.enter("WriteBlob", context)
        upload = None
        async for message in request_iterator:
            if upload is None:
                upload = self.state.uploads[message.upload_id]
                continue
            if message.offset != len(upload.data):
                await _refuse(context, Reason.OFFSET_MISMATCH, committed_size=str(len(upload.data)))
            if self.state.write_delay:
                await asyncio.sleep(self.state.write_delay)
            upload.data += message.payload
            self.state.received += len(message.payload)
        assert upload is not None
        return blob_pb.WriteBlobResponse(committed_size=len(upload.data), complete=self._complete(upload))

    def _complete(self, upload: Uploading) -> bool:
        if len(upload.data) != upload.size:
            return False
        assert blob_digest(upload.data) == upload.digest
        self.state.blobs[upload.digest] = bytes(upload.data)
        return True
