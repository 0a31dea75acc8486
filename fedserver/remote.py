"""The operator's side of AdminService: what the command line calls."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedlink import rpc
from fedlink.blobs import MAX_MANIFEST_SIZE, BlobRef, chunk_digests_of, ref_of
from fedlink.bulk import download_blob, upload_file
from fedlink.errors import FedlinkError, Reason
from fedlink.transfer import ImportPurpose, Retry
from fedlink.v1 import admin_service_pb2 as pb
from fedlink.v1 import admin_service_pb2_grpc as pb_grpc
from fedserver.settings import admin_socket

if TYPE_CHECKING:
    from fedlink.manifest import FileEntry

OnProgress = Callable[[int, int], None]
_FEW = Retry(limit=8)
_RECONNECT_SECONDS = 1.0


class Admin:
    """A connection to a server's operators' listener; an async context manager.

    Args:
        data_dir: the server's data directory, where the socket is found.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._channel = grpc.aio.insecure_channel(
            f"unix:{admin_socket(data_dir)}", options=rpc.channel_options(rpc.PATIENT)
        )
        self.stub: pb_grpc.AdminServiceAsyncStub = pb_grpc.AdminServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def call(self, method: Callable[..., Any], request: Message) -> Any:
        """Make one call.

        Raises:
            FedlinkError: what the server answers; UNREACHABLE if there is none.
        """
        try:
            return await method(request)
        except grpc.aio.AioRpcError as e:
            raise self._explained(rpc.from_rpc_error(e)) from None

    def _explained(self, error: FedlinkError) -> FedlinkError:
        if error.reason is not Reason.UNREACHABLE:
            return error
        return FedlinkError(
            Reason.UNREACHABLE,
            f"no server answers for the data directory {self._data_dir}: start one with `fedserver serve`, "
            "or name the right one with --data-dir",
        )

    async def pages(self, method: Callable[..., Any], request: Any, field: str) -> list[Any]:
        """Every item of a list, page after page.

        Raises:
            FedlinkError: as for `call`.
        """
        items: list[Any] = []
        while True:
            page = await self.call(method, request)
            items += getattr(page, field)
            if not page.next_page_token:
                return items
            request.page_token = page.next_page_token

    async def stream(self, method: Callable[..., Any], request: Message) -> AsyncIterator[Any]:
        """What a streaming call answers, as it comes.

        Raises:
            FedlinkError: as for `call`.
        """
        try:
            async for item in method(request):
                yield item
        except grpc.aio.AioRpcError as e:
            raise self._explained(rpc.from_rpc_error(e)) from None

    async def healthy(self) -> None:
        """Return if the server says that it serves.

        Raises:
            FedlinkError: UNREACHABLE.
        """
        stub: Any = health_pb2_grpc.HealthStub(self._channel)  # its stubs know no methods
        answer = await self.call(stub.Check, health_pb2.HealthCheckRequest())
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise FedlinkError(Reason.UNREACHABLE, "the server runs but does not serve now")

    async def create_run(self, spec_json: str) -> pb.Run:
        """Start a run. A lost connection is no reason to start it twice: the request has an id.

        Raises:
            FedlinkError: as for `call`.
        """
        request = pb.CreateRunRequest(spec_json=spec_json, request_id=secrets.token_bytes(16))
        try:
            response = await self.call(self.stub.CreateRun, request)
        except FedlinkError as e:
            if e.reason is not Reason.UNREACHABLE:
                raise
            await asyncio.sleep(_RECONNECT_SECONDS)
            response = await self.call(self.stub.CreateRun, request)
        run: pb.Run = response.run
        return run

    async def watch(self, run: str, *, after: int = 0) -> AsyncIterator[pb.WatchRunResponse]:
        """The events of a run that is there, each once, to its end; reattaches for ever when the connection is lost.

        Raises:
            FedlinkError: what the server answers.
        """
        while True:
            try:
                async for event in self.stub.WatchRun(pb.WatchRunRequest(run=run, after_sequence=after)):
                    after = event.sequence
                    yield event
            except grpc.aio.AioRpcError as e:
                error = rpc.from_rpc_error(e)
                if not error.reason.retryable:
                    raise error from None
                await asyncio.sleep(_RECONNECT_SECONDS)
            else:
                return

    async def import_model(
        self,
        source: Path,
        name: str,
        *,
        buffers: Sequence[str],
        frozen: Sequence[str],
        dropped: Sequence[str] = (),
        progress: OnProgress,
    ) -> pb.Model:
        """Send a model to the server; an interrupted import goes on where it was.

        Raises:
            FedlinkError: the files are no model, or what the server answers.
        """
        # What needs numpy is imported where models are handled, so that the other commands start quickly.
        from fedlink.manifest import ref_to_pb  # noqa: PLC0415
        from fedserver import modelfiles  # noqa: PLC0415

        with tempfile.TemporaryDirectory(prefix="fedlink-import-") as scratch:
            converted = await asyncio.to_thread(
                modelfiles.convert, source, Path(scratch), buffers=buffers, frozen=frozen, dropped=dropped
            )
            data = converted.manifest.serialize()
            path = Path(scratch) / "manifest"
            await asyncio.to_thread(path.write_bytes, data)
            ref = ref_of(data)
            # The id follows from the content, so that the same import finds its uploads again.
            purpose = ImportPurpose(ref.digest[:16])
            files = [(f.path, f.entry.blob, f.chunk_digests) for f in converted.files]
            files.append((path, ref, chunk_digests_of(data)))
            with self._named():
                await self._send(files, purpose, progress)
            request = pb.ImportModelRequest(import_id=purpose.id, name=name, manifest=ref_to_pb(ref))
            model: pb.Model = (await self.call(self.stub.ImportModel, request)).model
            return model

    async def _send(
        self, files: Sequence[tuple[Path, BlobRef, bytes]], purpose: ImportPurpose, progress: OnProgress
    ) -> None:
        total, done = sum(blob.size for _, blob, _ in files), 0

        def tell(at: int, _: int) -> None:
            progress(done + at, total)

        for file, blob, chunks in files:
            await upload_file(self._channel, file, blob, chunks, purpose, metadata=tuple, on_progress=tell, retry=_FEW)
            done += blob.size

    async def export_model(
        self, name: str, target: Path, *, merge_into: Path | None = None, progress: OnProgress
    ) -> tuple[pb.Model, list[Path]]:
        """Fetch a model from the server and write it as its users' tools load it; see `modelexport.export`.

        Raises:
            FedlinkError: what the server answers, or the directory holds a model already.
        """
        from fedlink.manifest import Manifest, ref_from_pb  # noqa: PLC0415 - as for `import_model`
        from fedserver import modelexport  # noqa: PLC0415

        model: pb.Model = (await self.call(self.stub.GetModel, pb.GetModelRequest(name=name))).model
        with tempfile.TemporaryDirectory(prefix="fedlink-export-") as scratch:
            path = Path(scratch) / "manifest"
            ref = ref_from_pb(model.manifest)
            if ref.size > MAX_MANIFEST_SIZE:
                raise FedlinkError(Reason.BAD_MANIFEST, f"the manifest of {name!r} is larger than allowed")
            with self._named():
                await download_blob(self._channel, ref, path, task_token=b"", metadata=tuple, retry=_FEW)
            manifest = Manifest.parse(await asyncio.to_thread(path.read_bytes))
        done, total = 0, sum(f.blob.size for f in manifest.everything)

        async def fetch(entry: FileEntry, to: Path) -> None:
            nonlocal done
            before = done
            with self._named():
                await download_blob(
                    self._channel,
                    entry.blob,
                    to,
                    task_token=b"",
                    metadata=tuple,
                    on_progress=lambda at, _: progress(before + at, total),
                    retry=_FEW,
                )
            done += entry.blob.size

        return model, await modelexport.export(manifest, fetch, target, merge_into=merge_into)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Say of a transfer that fails for want of a server where one was expected."""
        try:
            yield
        except FedlinkError as e:
            raise self._explained(e) from None
