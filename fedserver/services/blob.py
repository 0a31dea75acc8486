"""BlobService: bytes in and out, by digest and offset (blob_service.proto is the specification).

Rights are the runtime's (`BlobAccess`); files are the store's and the spool's. Here is the
rest: the shape of requests, how many bulk streams there may be, who writes to an upload, and
the way of chunks between the socket and the disk. Memory is at most two batches of chunks
for each admitted stream, and what gRPC holds of one message.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Executor
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from fedlink import rpc
from fedlink.batches import WriteBehind, read_ahead, settled
from fedlink.blobs import CHUNK_SIZE, DIGEST_SIZE, MAX_BLOB_SIZE, MAX_INLINE_SIZE, MAX_STREAM_BYTES, BlobRef, is_list_of
from fedlink.bulk import MAX_DIGESTS
from fedlink.errors import FedlinkError, Reason
from fedlink.failpoints import reach
from fedlink.stall import stalling
from fedlink.transfer import ImportPurpose, Purpose, TaskPurpose
from fedlink.v1 import blob_service_pb2 as pb
from fedserver.runtime.access import BlobAccess, Caller
from fedserver.services.admission import Admission, BulkLimits
from fedserver.services.status import Context, translated
from fedserver.store.blobs import BlobReader, BlobStore, checked
from fedserver.store.spool import UPLOAD_ID_SIZE, Spool, offset_mismatch

T = TypeVar("T")
Identify = Callable[[Context], Awaitable[Caller]]
"""Says who is calling, or raises FedlinkError (BAD_CREDENTIALS, SESSION_UNKNOWN, …)."""

_SERVICE = pb.DESCRIPTOR.services_by_name["BlobService"].full_name


class BlobServicer:
    """The calls that move blobs, for one listener; see the .proto for each.

    Attributes:
        admission: the places for bulk streams.
    """

    def __init__(
        self,
        access: BlobAccess,
        store: BlobStore,
        spool: Spool,
        *,
        identify: Identify,
        executor: Executor,
        limits: BulkLimits | None = None,
    ) -> None:
        self._access = access
        self._store = store
        self._spool = spool
        self._identify = identify
        self._executor = executor
        self.admission = Admission(limits or BulkLimits())
        self._limits = self.admission.limits
        self._writers = _Writers()

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Register the calls; bulk messages are read and written as bytes, without a protobuf copy."""
        unary = grpc.unary_unary_rpc_method_handler
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "ReadBlob": grpc.unary_stream_rpc_method_handler(
                self.read_blob, pb.ReadBlobRequest.FromString, rpc.encode_bulk
            ),
            "WriteBlob": grpc.stream_unary_rpc_method_handler(
                self.write_blob, None, pb.WriteBlobResponse.SerializeToString
            ),
            "FindMissingBlobs": unary(
                self.find_missing_blobs,
                pb.FindMissingBlobsRequest.FromString,
                pb.FindMissingBlobsResponse.SerializeToString,
            ),
            "StartUpload": unary(
                self.start_upload, pb.StartUploadRequest.FromString, pb.StartUploadResponse.SerializeToString
            ),
            "QueryUpload": unary(
                self.query_upload, pb.QueryUploadRequest.FromString, pb.QueryUploadResponse.SerializeToString
            ),
        }
        server.add_registered_method_handlers(_SERVICE, handlers)

    @translated
    async def read_blob(self, request: pb.ReadBlobRequest, context: Context) -> None:
        """ReadBlob."""
        caller = await self._identify(context)
        with self.admission.place(caller):
            if len(request.digest) != DIGEST_SIZE:
                raise FedlinkError(Reason.BLOB_NOT_FOUND, f"A digest has {DIGEST_SIZE} bytes.")
            try:
                await self._read(caller, request, context)
            except FedlinkError as e:
                if e.reason is Reason.BLOB_CORRUPT:
                    raise await self._access.damaged(caller, request.digest, e) from None
                raise

    async def _read(self, caller: Caller, request: pb.ReadBlobRequest, context: Context) -> None:
        ref = await self._access.readable(caller, request.task_token, request.digest)
        stop = _end_of_range(request, ref)
        with await self._open(ref.digest) as reader:
            digests = reader.chunk_digests if request.include_chunk_digests else b""
            head = pb.ReadBlobResponse(size=ref.size, chunk_digests=digests)
            async with self._moving() as moved:
                await context.write(head)
                moved()
                await self._send_range(context, reader, request, stop, moved)

    @translated
    async def find_missing_blobs(
        self, request: pb.FindMissingBlobsRequest, context: Context
    ) -> pb.FindMissingBlobsResponse:
        """FindMissingBlobs."""
        caller = await self._identify(context)
        if len(request.digests) > MAX_DIGESTS:
            raise FedlinkError(Reason.TOO_LARGE, f"Ask about at most {MAX_DIGESTS} blobs at once.")
        if any(len(digest) != DIGEST_SIZE for digest in request.digests):
            raise FedlinkError(Reason.DIGEST_MISMATCH, f"A digest has {DIGEST_SIZE} bytes.")
        missing = await self._access.missing(caller, _purpose(request, caller), request.digests)
        return pb.FindMissingBlobsResponse(missing=missing)

    @translated
    async def start_upload(self, request: pb.StartUploadRequest, context: Context) -> pb.StartUploadResponse:
        """StartUpload."""
        caller = await self._identify(context)
        purpose = _purpose(request, caller)
        ref = BlobRef(request.blob.digest, request.blob.size)
        if ref.size > MAX_BLOB_SIZE:
            raise FedlinkError(Reason.TOO_LARGE, f"Blob {ref} is over the limit of {MAX_BLOB_SIZE} bytes.")
        if not is_list_of(request.chunk_digests, ref):
            raise FedlinkError(Reason.DIGEST_MISMATCH, f"The chunk list does not give blob {ref}; hash the file again.")
        upload_id = await self._access.start_upload(caller, purpose, ref, request.chunk_digests)
        committed = await self._run(self._spool.committed, upload_id)
        if request.content and committed == 0:
            committed, new = await self._run(self._take_whole, upload_id, ref, request.content)
            self._access.count_written(upload_id, new)
        return pb.StartUploadResponse(upload_id=upload_id, committed_size=committed, complete=committed == ref.size)

    def _take_whole(self, upload_id: bytes, ref: BlobRef, content: bytes) -> tuple[int, int]:
        """Write all of a small blob; how much of it is here then, and how much of that is new."""
        if len(content) != ref.size or ref.size > MAX_INLINE_SIZE:
            raise FedlinkError(Reason.CHUNK_SIZE, f"content has {len(content)} bytes; it must be all of blob {ref}.")
        try:
            return self._spool.append(upload_id, 0, [content]), ref.size
        except FedlinkError as e:
            if e.reason is not Reason.OFFSET_MISMATCH:
                raise
            # Another call has brought it meanwhile.
            return self._spool.committed(upload_id), 0

    @translated
    async def write_blob(self, requests: AsyncIterator[bytes], context: Context) -> pb.WriteBlobResponse:
        """WriteBlob."""
        caller = await self._identify(context)
        with self.admission.place(caller):
            upload_id = await self._upload_named(requests)
            await self._access.owned(caller, upload_id)
            with self._writers.counted(caller.name):
                return await self._writers.newest(upload_id, lambda: self._receive(upload_id, requests))

    def writers(self) -> list[str]:
        """Who sends bytes at this moment."""
        return list(self._writers.names)

    @translated
    async def query_upload(self, request: pb.QueryUploadRequest, context: Context) -> pb.QueryUploadResponse:
        """QueryUpload."""
        caller = await self._identify(context)
        _check_upload_id(request.upload_id)
        await self._access.owned(caller, request.upload_id)
        size, committed = await self._run(self._extent, request.upload_id)
        return pb.QueryUploadResponse(committed_size=committed, complete=committed == size)

    async def _open(self, digest: bytes) -> BlobReader:
        opening = asyncio.get_running_loop().run_in_executor(self._executor, self._store.open, digest)
        try:
            await settled(opening)
        except asyncio.CancelledError:
            if not opening.exception():
                opening.result().close()
            raise
        return opening.result()

    async def _send_range(
        self, context: Context, reader: BlobReader, request: pb.ReadBlobRequest, stop: int, moved: Callable[[], None]
    ) -> None:
        sent = request.offset
        read_into = checked(reader, request.digest) if request.verify else reader.read_into
        batches = read_ahead(read_into, request.offset, stop, self._executor, batch=self.admission.batch)
        try:
            async with contextlib.aclosing(batches):
                async for batch in batches:
                    reach("blob.read")
                    for end, message in batch:
                        await context.write(message)
                        moved()
                        sent = end
        finally:
            self._access.count_read(request.task_token, sent - request.offset)

    async def _upload_named(self, requests: AsyncIterator[bytes]) -> bytes:
        async with self._moving():
            head = await _next(requests)
        upload_id = head.upload_id if isinstance(head, pb.WriteBlobRequest) else b""
        _check_upload_id(upload_id)
        return upload_id

    async def _receive(self, upload_id: bytes, requests: AsyncIterator[bytes]) -> pb.WriteBlobResponse:
        size, start = await self._run(self._extent, upload_id)
        stop = min(size, start + MAX_STREAM_BYTES)
        append = functools.partial(self._spool.append, upload_id)
        behind = WriteBehind(append, start, self._executor, batch=self.admission.batch)
        try:
            async with self._moving() as moved, behind:
                try:
                    while behind.position < stop and (message := await _next(requests)) is not None:
                        moved()
                        await behind.put(_payload(message, behind.position))
                finally:
                    # What came before the line broke need not come again.
                    await behind.flush()
        finally:
            self._access.count_written(upload_id, behind.written - start)
        return pb.WriteBlobResponse(committed_size=behind.written, complete=behind.written == size)

    @contextlib.asynccontextmanager
    async def _moving(self) -> AsyncIterator[Callable[[], None]]:
        """Hold a stream's place as long as what this gives is called now and then."""
        try:
            async with stalling(self._limits.stall) as moved:
                yield moved
        except TimeoutError:
            text = f"Nothing moved for {self._limits.stall:g} seconds, so others get this place; go on by offset."
            raise FedlinkError(Reason.BUSY, text, retry_after=self._limits.retry_after) from None

    def _extent(self, upload_id: bytes) -> tuple[int, int]:
        return self._spool.ref(upload_id).size, self._spool.committed(upload_id)

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)


class _Writers:
    """One writer for each upload: the newest, which begins when the one before it has ended."""

    def __init__(self) -> None:
        self._writing: dict[bytes, asyncio.Task[Any]] = {}
        self.names: Counter[str] = Counter()

    @contextlib.contextmanager
    def counted(self, name: str) -> Iterator[None]:
        """Hold a caller's name among those who write."""
        self.names[name] += 1
        try:
            yield
        finally:
            self.names[name] -= 1
            if not self.names[name]:
                del self.names[name]

    async def newest(self, upload_id: bytes, work: Callable[[], Awaitable[T]]) -> T:
        """Do the work of a writer.

        Raises:
            FedlinkError: UPLOAD_SUPERSEDED; a newer one came.
        """
        older = self._writing.get(upload_id)
        mine = asyncio.create_task(_after(older, work))
        self._writing[upload_id] = mine
        if older:
            older.cancel()
        try:
            return await mine
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if self._writing.get(upload_id) is mine or (this and this.cancelling()):
                raise
            text = "A newer WriteBlob has taken this upload over; go on with that one."
            raise FedlinkError(Reason.UPLOAD_SUPERSEDED, text) from None
        finally:
            if self._writing.get(upload_id) is mine:
                del self._writing[upload_id]


async def _after(older: asyncio.Task[Any] | None, work: Callable[[], Awaitable[T]]) -> T:
    if older:
        await settled(older)
    return await work()


async def _next(requests: AsyncIterator[bytes]) -> rpc.Chunk | pb.WriteBlobRequest | None:
    message = await anext(requests, None)
    try:
        return None if message is None else rpc.decode_write_request(message)
    except DecodeError:
        raise FedlinkError(Reason.CHUNK_SIZE, "A message is not a WriteBlobRequest.") from None


def _purpose(request: pb.FindMissingBlobsRequest | pb.StartUploadRequest, caller: Caller) -> Purpose:
    match request.WhichOneof("purpose"):
        case "task_token":
            return TaskPurpose(request.task_token)
        case "import_id" if caller.operator:
            return ImportPurpose(request.import_id)
        case "import_id":
            raise FedlinkError(Reason.NOT_AN_OPERATOR, "Only operators import; a site sends under a task's token.")
        case _:
            raise FedlinkError(Reason.TASK_NOT_FOUND, "The request names no purpose: set task_token or import_id.")


def _check_upload_id(upload_id: bytes) -> None:
    if len(upload_id) != UPLOAD_ID_SIZE:
        text = f"An upload is named by the {UPLOAD_ID_SIZE} bytes that StartUpload gave; begin with it."
        raise FedlinkError(Reason.UPLOAD_NOT_FOUND, text)


def _end_of_range(request: pb.ReadBlobRequest, ref: BlobRef) -> int:
    """Where a ReadBlob ends: at the blob's end, or after as many whole chunks as limit and stream allow."""
    if request.offset % CHUNK_SIZE or request.offset > ref.size:
        text = f"The range begins at {request.offset}; it must be a multiple of {CHUNK_SIZE}, and at most {ref.size}."
        raise FedlinkError(Reason.OFFSET_MISMATCH, text)
    length = min(request.limit or MAX_STREAM_BYTES, MAX_STREAM_BYTES)
    whole = length - length % CHUNK_SIZE
    return ref.size if request.offset + length >= ref.size else request.offset + whole


def _payload(message: rpc.Chunk | pb.WriteBlobRequest, position: int) -> bytes | bytearray | memoryview:
    if not isinstance(message, rpc.Chunk) or len(message.payload) > CHUNK_SIZE:
        text = f"A message after the first must hold one whole chunk; at {position} something else came."
        raise FedlinkError(Reason.CHUNK_SIZE, text, metadata={"committed_size": str(position)})
    if message.offset != position:
        raise offset_mismatch(message.offset, position)
    return message.payload
