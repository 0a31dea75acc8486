"""Blobs over gRPC: the asyncio binding of `fedlink.transfer`.

Both sides that move files use it: the client daemon (models down, updates up) and the
operator's command line (`fedserver model import` and `export`). What is sent again, from
which offset and after how long is decided in `fedlink.transfer`; here are the calls, and
the files, which are read and written in between, as long as the disk is quick.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from fedlink import log
from fedlink.batches import BATCH_CHUNKS, settled
from fedlink.blobs import CHUNK_SIZE, MAX_INLINE_SIZE, BlobRef, ChunkHasher, blob_digest, chunk_spans, first_bad_chunk
from fedlink.errors import FedlinkError, Reason
from fedlink.failpoints import reach
from fedlink.files import Buffer, read_at
from fedlink.part import PartFile
from fedlink.quickdisk import QuickDisk
from fedlink.recycle import Recycler
from fedlink.rpc import Chunk, Metadata, chunk_message, decode_read_response, encode_bulk, from_rpc_error
from fedlink.stall import stalling
from fedlink.transfer import (
    FOREVER,
    STALL,
    Done,
    Download,
    Event,
    Failed,
    Failures,
    Fetch,
    Fetched,
    GiveUp,
    ImportPurpose,
    Purpose,
    Retry,
    Send,
    Start,
    Started,
    TaskPurpose,
    Upload,
    Wait,
    Waited,
    Written,
)
from fedlink.v1 import blob_service_pb2 as pb
from fedlink.v1 import blob_service_pb2_grpc as pb_grpc
from fedlink.v1 import types_pb2

MAX_DIGESTS = 4096
"""Digests in one FindMissingBlobs."""

_SERVICE = "/fedlink.v1.BlobService/"

OnProgress = Callable[[int, int], None]
"""Told the bytes moved so far (a resumed part counts) and the size of the blob."""


def hash_file(path: Path) -> tuple[BlobRef, bytes]:
    """Name a file: its BlobRef and the concatenated chunk digests. Blocking; run it in a thread.

    Raises:
        OSError: the file cannot be read.
    """
    hasher = ChunkHasher()
    buffer = memoryview(bytearray(BATCH_CHUNKS * CHUNK_SIZE))
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            hasher.update(buffer[:n])
    return hasher.finish(), hasher.chunk_digests


async def find_missing(
    channel: grpc.aio.Channel,
    purpose: Purpose,
    digests: Sequence[bytes],
    *,
    metadata: Callable[[], Metadata],
    stall: float = STALL,
    retry: Retry = FOREVER,
    rng: random.Random | None = None,
) -> list[bytes]:
    """The digests that would have to be sent for a purpose, in the order given.

    Raises:
        FedlinkError: the server refuses (TASK_NOT_FOUND, ROUND_CLOSED, SESSION_*), or `retry` has come to its limit.
    """
    stub: pb_grpc.BlobServiceAsyncStub = pb_grpc.BlobServiceStub(channel)
    rng = rng or random.SystemRandom()
    missing: list[bytes] = []
    failures = Failures()
    waits = _Waits("FindMissingBlobs")
    while asked := digests[:MAX_DIGESTS]:
        request = pb.FindMissingBlobsRequest(digests=asked, **_purpose_field(purpose))
        try:
            answer = await stub.FindMissingBlobs(request, metadata=metadata(), timeout=stall)
        except grpc.RpcError as e:
            failures, action = failures.after(from_rpc_error(e), retry, rng)
            if isinstance(action, GiveUp):
                raise action.error from e
            await waits.sleep(action)
            continue
        missing += answer.missing
        digests = digests[MAX_DIGESTS:]
        failures = Failures()
    return missing


async def upload_file(
    channel: grpc.aio.Channel,
    path: Path,
    ref: BlobRef,
    chunk_digests: bytes,
    purpose: Purpose,
    *,
    metadata: Callable[[], Metadata],
    on_progress: OnProgress | None = None,
    stall: float = STALL,
    retry: Retry = FOREVER,
    rng: random.Random | None = None,
) -> None:
    """Send a file; returns when the server has all of it. Goes on where an earlier call stopped.

    Args:
        channel: to the server; best one that carries no control calls.
        path: the bytes; must not change meanwhile.
        ref: name and size, from `hash_file` or `ChunkHasher`.
        chunk_digests: 32 bytes for each chunk, likewise.
        purpose: the task or the import it belongs to.
        metadata: gives the metadata of each call, so that a new session is used as soon as there is one.
        on_progress: told how far it is, on the event loop.
        stall: seconds in which at least one chunk must move, or the call is taken for broken.
        retry: how long to wait after failures, and when to give up.
        rng: source of jitter.

    Raises:
        FedlinkError: fatal for this upload: ROUND_CLOSED, TASK_NOT_FOUND, TOO_LARGE, DIGEST_MISMATCH, SESSION_*,
            BLOB_CORRUPT (the file no longer has the bytes it was named by), or `retry` has come to its limit.
        OSError: the file cannot be read.
    """
    rng = rng or random.SystemRandom()
    report = on_progress or _ignore
    sending = _Sending(channel, ref, chunk_digests, purpose, metadata, report, stall)
    waits = _Waits(f"upload of blob {ref}")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        state, action = Upload(ref, retry).begin()
        while not isinstance(action, Done):
            match action:
                case Start():
                    event: Event = await sending.start(fd)
                case Send():
                    if state.failures.count:
                        await asyncio.to_thread(_check_unchanged, fd, ref, chunk_digests, action.start)
                    event = await sending.send(fd, action)
                case Wait():
                    event = await waits.sleep(action)
                case GiveUp(error):
                    raise error
                case Fetch():
                    raise TypeError(f"an upload never asks for {action}")
            state, action = state.after(event, rng)
            report(state.committed, ref.size)
    finally:
        os.close(fd)


async def download_blob(
    channel: grpc.aio.Channel,
    ref: BlobRef,
    target: Path,
    *,
    task_token: bytes,
    metadata: Callable[[], Metadata],
    on_progress: OnProgress | None = None,
    stall: float = STALL,
    retry: Retry = FOREVER,
    rng: random.Random | None = None,
    recycler: Recycler | None = None,
) -> None:
    """Fetch a blob to a file; returns when `target` is whole and every byte checked.

    Until then the bytes are in `<target>.part` and the list of chunk digests in
    `<target>.chunks`; both are picked up by the next call for the same target, which
    hashes what is there before it believes it, and are gone when `target` is there.
    The file is not synced: whoever keeps it over a power loss hashes it again.

    Args:
        channel: to the server; best one that carries no control calls.
        ref: what to fetch.
        target: where; its directory exists, and only one call at a time works on it.
        task_token: the task under which the blob may be read; empty for operators.
        metadata: gives the metadata of each call.
        on_progress: told how far it is, on the event loop.
        stall: seconds in which at least one chunk must move, or the call is taken for broken.
        retry: how long to wait after failures, and when to give up.
        rng: source of jitter.
        recycler: may have a file to write over.

    Raises:
        FedlinkError: fatal for this download: BLOB_NOT_FOUND, ROUND_CLOSED, TASK_NOT_FOUND, SESSION_*, BLOB_CORRUPT
            (what comes is again and again not what the digest names), or `retry` has come to its limit.
        OSError: the file cannot be written.
    """
    rng = rng or random.SystemRandom()
    report = on_progress or _ignore
    with PartFile(target, ref, recycler) as part:
        resuming = asyncio.ensure_future(asyncio.to_thread(part.resume))
        await settled(resuming)
        resuming.result()
        fetching = _Fetching(channel, ref, part, task_token, metadata, report, stall)
        waits = _Waits(f"download of blob {ref}")
        state, action = Download(ref, retry, part.verified, part.has_list).begin()
        while not isinstance(action, Done):
            report(part.verified, ref.size)
            match action:
                case Fetch():
                    event: Event = await fetching.fetch(action)
                case Wait():
                    event = await waits.sleep(action)
                case GiveUp(error):
                    raise error
                case Start() | Send():
                    raise TypeError(f"a download never asks for {action}")
            state, action = state.after(event, rng)
        part.finish()
    report(ref.size, ref.size)


@dataclass(frozen=True, slots=True)
class _Sending:
    """The calls of one upload."""

    channel: grpc.aio.Channel
    ref: BlobRef
    chunk_digests: bytes
    purpose: Purpose
    metadata: Callable[[], Metadata]
    report: OnProgress
    stall: float

    async def start(self, fd: int) -> Started | Failed:
        content = os.pread(fd, self.ref.size, 0) if self.ref.size <= MAX_INLINE_SIZE else b""
        if content and blob_digest(content) != self.ref.digest:
            return Failed(_changed(self.ref))
        stub: pb_grpc.BlobServiceAsyncStub = pb_grpc.BlobServiceStub(self.channel)
        blob = types_pb2.BlobRef(digest=self.ref.digest, size=self.ref.size)
        request = pb.StartUploadRequest(
            blob=blob, chunk_digests=self.chunk_digests, content=content, **_purpose_field(self.purpose)
        )
        try:
            answer = await stub.StartUpload(request, metadata=self.metadata(), timeout=self.stall)
        except grpc.RpcError as e:
            return Failed(from_rpc_error(e))
        return Started(answer.upload_id, answer.committed_size, answer.complete)

    async def send(self, fd: int, action: Send) -> Written | Failed:
        method = self.channel.stream_unary(
            _SERVICE + "WriteBlob",
            request_serializer=encode_bulk,
            response_deserializer=pb.WriteBlobResponse.FromString,
        )
        call = method(metadata=self.metadata())
        try:
            with _peer_cancels():
                # The server may answer before it has read everything; then writing fails, and the answer says why
                # (or INTERNAL, where grpc.aio lets the failed write hide it; StartUpload then says what is the matter).
                with contextlib.suppress(asyncio.InvalidStateError, grpc.RpcError):
                    await self._send_chunks(call, fd, action)
                async with asyncio.timeout(self.stall):
                    answer = await call
        except FedlinkError as e:
            return Failed(e)
        except EOFError:
            return Failed(_changed(self.ref))
        except TimeoutError:
            return Failed(_stalled(self.stall))
        except grpc.RpcError as e:
            return Failed(from_rpc_error(e))
        finally:
            call.cancel()
        return Written(answer.committed_size, answer.complete)

    async def _send_chunks(self, call: Any, fd: int, action: Send) -> None:
        async with stalling(self.stall) as moved:
            await call.write(pb.WriteBlobRequest(upload_id=action.upload_id))
            disk, buffer = QuickDisk(), memoryview(bytearray(CHUNK_SIZE))
            for at, length in chunk_spans(action.start, action.stop):
                await disk.do(read_at, fd, buffer[:length], at)
                reach("upload.sending")
                await call.write(chunk_message(at, buffer[:length]))
                moved()
                self.report(at + length, self.ref.size)
            await call.done_writing()


@dataclass(frozen=True, slots=True)
class _Fetching:
    """The calls of one download."""

    channel: grpc.aio.Channel
    ref: BlobRef
    part: PartFile
    task_token: bytes
    metadata: Callable[[], Metadata]
    report: OnProgress
    stall: float

    async def fetch(self, action: Fetch) -> Fetched:
        error = None
        try:
            with _peer_cancels():
                await self._fetch(action)
        except FedlinkError as e:
            error = e
        except TimeoutError:
            error = _stalled(self.stall)
        except grpc.RpcError as e:
            error = from_rpc_error(e)
        return Fetched(self.part.verified, self.part.has_list, error)

    async def _fetch(self, action: Fetch) -> None:
        request = pb.ReadBlobRequest(
            task_token=self.task_token,
            digest=self.ref.digest,
            offset=action.start,
            limit=action.stop - action.start,
            include_chunk_digests=action.with_list,
            verify=action.verify,
        )
        method = self.channel.unary_stream(
            _SERVICE + "ReadBlob",
            request_serializer=pb.ReadBlobRequest.SerializeToString,
            response_deserializer=decode_read_response,
        )
        call = method(request, metadata=self.metadata())
        try:
            async with stalling(self.stall) as moved:
                await self._take_head(await call.read(), with_list=action.with_list)
                disk, position = QuickDisk(), action.start
                while (message := await call.read()) is not grpc.aio.EOF:
                    moved()
                    chunk = self._checked(message, position, action.stop)
                    position = await disk.do(self.part.write, position, chunk)
                    self.report(position, self.ref.size)
        finally:
            call.cancel()

    async def _take_head(self, head: Any, *, with_list: bool) -> None:
        if not isinstance(head, pb.ReadBlobResponse) or head.size != self.ref.size:
            text = f"The server's answer for blob {self.ref} does not begin with its size."
            raise FedlinkError(Reason.CHUNK_CORRUPT, text)
        if with_list:
            await asyncio.to_thread(self.part.take_list, head.chunk_digests)

    def _checked(self, message: Any, position: int, stop: int) -> Buffer:
        length = min(CHUNK_SIZE, stop - position)
        if not isinstance(message, Chunk) or message.offset != position or len(message.payload) != length:
            text = f"The server's answer for blob {self.ref} does not go on at {position}."
            raise FedlinkError(Reason.CHUNK_CORRUPT, text)
        return message.payload


def _check_unchanged(fd: int, ref: BlobRef, chunk_digests: bytes, offset: int) -> None:
    """Look whether the chunk at which an upload does not get on is still the one that was hashed."""
    chunk = bytearray(min(CHUNK_SIZE, ref.size - offset))
    try:
        read_at(fd, memoryview(chunk), offset)
        changed = first_bad_chunk(chunk, offset, chunk_digests) is not None
    except EOFError:
        changed = True
    if changed:
        raise _changed(ref)


def _changed(ref: BlobRef) -> FedlinkError:
    return FedlinkError(Reason.BLOB_CORRUPT, f"The file of blob {ref} was changed after it was hashed; make it again.")


class _Waits:
    """The waits of one transfer; an outage may make many of them, so each reason is said seldom."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._seldom = log.Seldom()

    async def sleep(self, action: Wait) -> Waited:
        error = action.because
        if self._seldom.due(error.reason):
            log.get("transfer").warning(
                "waiting to try again",
                what=self._what,
                reason=error.reason.name,
                error=error.message,
                seconds=round(action.seconds, 2),
            )
        await asyncio.sleep(action.seconds)
        return Waited()


def _purpose_field(purpose: Purpose) -> dict[str, bytes]:
    match purpose:
        case TaskPurpose(token):
            return {"task_token": token}
        case ImportPurpose(import_id):
            return {"import_id": import_id}


@contextlib.contextmanager
def _peer_cancels() -> Iterator[None]:
    """Tell a call that the other side cancelled, which grpc.aio raises as CancelledError, from our own cancellation."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise FedlinkError(Reason.UNREACHABLE, "The server, or something on the way, cancelled the call.") from None


def _stalled(stall: float) -> FedlinkError:
    return FedlinkError(Reason.UNREACHABLE, f"Nothing moved for {stall:.0f} seconds; the connection counts as broken.")


def _ignore(_done: int, _size: int) -> None:
    pass
