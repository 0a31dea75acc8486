"""The composition root: builds every part from the settings; nothing else constructs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import fedlink
from fedlink import log as logs
from fedlink import rpc
from fedlink.corelog import Summary, handshakes_explained
from fedlink.errors import FedlinkError, Reason
from fedlink.failpoints import reach
from fedlink.files import make_directory
from fedlink.lock import take
from fedlink.recycle import Recycler
from fedlink.v1 import admin_service_pb2_grpc, coordination_service_pb2_grpc
from fedserver.runtime.board import TaskBoard
from fedserver.runtime.completion import Completions
from fedserver.runtime.engine import Engine
from fedserver.runtime.events import EventFeed
from fedserver.runtime.imports import expire_imports
from fedserver.runtime.integrity import Integrity
from fedserver.runtime.parts import Parts
from fedserver.runtime.planning import Planner
from fedserver.runtime.recovery import recover
from fedserver.runtime.sites import SiteRegistry
from fedserver.runtime.uploads import TaskBlobAccess
from fedserver.runtime.versions import Versions
from fedserver.runtime.wanted import step_back
from fedserver.services.admin import AdminServicer
from fedserver.services.admission import BulkLimits
from fedserver.services.blob import BlobServicer
from fedserver.services.certificates import Certificates
from fedserver.services.coordination import CoordinationServicer
from fedserver.services.identity import SiteIdentity, operator
from fedserver.services.probe import ProbeServicer
from fedserver.settings import Proof, ServerSettings, admin_socket
from fedserver.store.blobs import DirectoryBlobStore
from fedserver.store.database import Database
from fedserver.store.disk import Disk
from fedserver.store.spool import Spool

_GRACE_SECONDS = 3.0
_DISK_THREADS = 8
_NICE = 5
"""So much behind the event loop's thread are those that hash, check, average and write."""
_SERVICES = ("fedlink.v1.AdminService", "fedlink.v1.BlobService", "fedlink.v1.CoordinationService")


@dataclass(frozen=True)
class Storage:
    """What lies in the data directory."""

    disk: Disk
    recycler: Recycler
    store: DirectoryBlobStore
    spool: Spool

    @classmethod
    def at(cls, settings: ServerSettings) -> Self:
        """Open it."""
        data_dir = settings.data_dir
        recycler = Recycler(data_dir / "recycled")
        disk = Disk(data_dir, reserve=settings.disk_reserve, spare=recycler)
        store = DirectoryBlobStore(data_dir / "blobs", recycler)
        return cls(disk, recycler, store, Spool(data_dir / "spool", disk=disk, recycler=recycler))


@dataclass
class App:
    """A running server."""

    address: str
    """HOST:PORT where sites are served."""
    socket: Path
    """Where operators are served."""
    drained: asyncio.Event
    """Set when the server was drained and has nothing more to finish."""


async def serve(settings: ServerSettings) -> None:
    """Run the server until SIGTERM or SIGINT, or until it is drained.

    Raises:
        FedlinkError: BAD_CONFIG if an address is taken, or the data directory is in use or of a newer release.
    """
    # Models and updates are for nobody else on this machine.
    os.umask(0o077)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        starting = asyncio.ensure_future(stack.enter_async_context(running(settings)))
        # After a power loss it has every upload to look at first.
        await _first_of(starting, stop.wait())
        if starting.cancelled():
            logs.get("server").info("stopped before it served")
            return
        app = starting.result()
        logs.get("server").info(
            "serving",
            sites=app.address,
            tls=_tls(settings),
            operators=str(app.socket),
            version=fedlink.__version__,
            pid=os.getpid(),
        )
        await _first_of(stop.wait(), app.drained.wait())
        logs.get("server").info("stopping", drained=app.drained.is_set())


async def _first_of(*works: Awaitable[object]) -> None:
    """Wait until one is over; the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


@contextlib.asynccontextmanager
async def running(settings: ServerSettings) -> AsyncIterator[App]:
    """A server, from recovery to the last closed connection.

    Raises:
        FedlinkError: as for `serve`.
    """
    rpc.tune_malloc()
    data_dir = settings.data_dir
    _make_private(data_dir)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(_locked(data_dir))
        storage = Storage.at(settings)
        store, spool = storage.store, storage.spool
        database = Database(settings.database_url, disk=storage.disk)
        stack.callback(database.close)
        database.open()
        executor = stack.enter_context(_threads())
        await recover(database, store, spool, data_dir / "tmp")
        reach("server.recovered")
        parts, engine = _build(settings, database, storage)
        await parts.sites.load()
        await engine.start()
        stack.push_async_callback(engine.close)
        await stack.enter_async_context(_meanwhile(expire_imports(database, parts.versions, spool)))
        await stack.enter_async_context(_meanwhile(storage.recycler.expiring()))

        limits = BulkLimits.of(settings)
        certificates = Certificates(settings.tls) if settings.tls else None
        if certificates:
            stack.enter_context(handshakes_explained(Summary(_refused).add))
        by_certificate = settings.proof is Proof.CERTIFICATE
        identity = SiteIdentity(parts.sites, certificates if by_certificate else None)
        coordination = CoordinationServicer(
            identity=identity,
            sites=parts.sites,
            board=parts.board,
            engine=engine,
            access=parts.access,
            completions=Completions(database, engine, parts.board, parts.access, parts.versions),
            lease_term=settings.lease_term,
            max_poll_wait=settings.max_poll_wait,
        )
        sites_server = grpc.aio.server(options=rpc.server_options(rpc.patient(settings.transfer_stall_after)))
        coordination_service_pb2_grpc.add_CoordinationServiceServicer_to_server(coordination, sites_server)
        blobs = BlobServicer(parts.access, store, spool, identify=identity.caller, executor=executor, limits=limits)
        blobs.add_to_server(sites_server)
        ProbeServicer(identify=identity.admitted, admission=blobs.admission).add_to_server(sites_server)
        admin_server = grpc.aio.server(options=rpc.server_options())
        admin = AdminServicer(
            database=database,
            engine=engine,
            sites=parts.sites,
            board=parts.board,
            versions=parts.versions,
            feed=parts.feed,
            integrity=parts.integrity,
        )
        admin_service_pb2_grpc.add_AdminServiceServicer_to_server(admin, admin_server)
        imports = BlobServicer(parts.access, store, spool, identify=operator, executor=executor, limits=limits)
        imports.add_to_server(admin_server)
        engine.writers += [blobs.writers, imports.writers]
        reflection.enable_server_reflection((*_SERVICES[:2], reflection.SERVICE_NAME), admin_server)
        socket = admin_socket(data_dir)
        address = await _listen(settings, certificates, sites_server, admin_server, socket)
        _publish(address, data_dir / "address")
        app = App(address, socket, engine.drained)
        try:
            yield app
        finally:
            parts.board.drain()
            await asyncio.gather(sites_server.stop(_GRACE_SECONDS), admin_server.stop(_GRACE_SECONDS))
            socket.unlink(missing_ok=True)


def _threads() -> ThreadPoolExecutor:
    """Those for the bytes of bulk streams; what else blocks gets the event loop's own."""
    # The event loop's thread goes before them: a heartbeat takes it a moment, a chunk takes them longer.
    behind = partial(step_back, _NICE)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(None, "work", behind))
    return ThreadPoolExecutor(_DISK_THREADS, "disk", behind)


@contextlib.asynccontextmanager
async def _meanwhile(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Let something go on until the context is left."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _refused(cause: str, connections: int) -> None:
    logs.get("tls").warning("refused a connection", because=cause, connections=connections)


def _tls(settings: ServerSettings) -> str:
    if settings.proof is Proof.CERTIFICATE:
        return "mutual"
    return "on" if settings.tls else "off"


def _build(settings: ServerSettings, database: Database, storage: Storage) -> tuple[Parts, Engine]:
    board = TaskBoard(database, lease_term=settings.lease_term)
    store, spool, disk = storage.store, storage.spool, storage.disk
    versions = Versions(database, store, spool, settings.data_dir / "tmp", disk, recycler=storage.recycler)
    integrity = Integrity(database, versions, store)
    access = TaskBlobAccess(database, board, versions, store, spool, integrity=integrity)
    changed = asyncio.Event()
    sites = SiteRegistry(database, lease_term=settings.lease_term, proof=settings.proof, changed=changed.set)
    parts = Parts(database, board, sites, versions, access, EventFeed(database), integrity, disk)
    planner = Planner(sites, disk, bulk_streams=settings.bulk_streams)
    return parts, Engine(parts, planner, changed)


async def _listen(
    settings: ServerSettings,
    certificates: Certificates | None,
    sites_server: grpc.aio.Server,
    admin_server: grpc.aio.Server,
    socket: Path,
) -> str:
    for server in (sites_server, admin_server):
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    host, _, number = settings.listen.rpartition(":")
    try:
        # gRPC's core tells of a failure on stderr in its own way; tried first without it, the sentence below is all.
        probe = await asyncio.get_running_loop().create_server(asyncio.Protocol, host.strip("[]"), int(number))
        probe.close()
        await probe.wait_closed()
        if certificates:
            port = sites_server.add_secure_port(settings.listen, certificates.credentials())
        else:
            port = sites_server.add_insecure_port(settings.listen)
    except (OSError, RuntimeError):
        port = 0
    if port == 0:
        raise FedlinkError(
            Reason.BAD_CONFIG,
            f"cannot listen on {settings.listen}: another program uses the port, or the address is not this machine's; "
            "choose another with --listen",
        )
    await asyncio.to_thread(socket.unlink, missing_ok=True)
    # Not less: other threads make directories meanwhile.
    before = os.umask(0o077)
    try:
        admin_server.add_insecure_port(f"unix:{socket}")
        await admin_server.start()
    finally:
        os.umask(before)
    await sites_server.start()
    return f"{host}:{port}"


def _publish(address: str, path: Path) -> None:
    # On a full disk the old one does, if it is right.
    if path.is_file() and path.read_text(encoding="ascii").strip() == address:
        return
    # Whoever waits for the file is never to find it empty.
    fresh = path.with_name(".address")
    fresh.write_text(address + "\n", encoding="ascii")
    fresh.replace(path)


def _make_private(data_dir: Path) -> None:
    try:
        make_directory(data_dir, 0o700)
    except OSError as e:
        raise FedlinkError(Reason.BAD_CONFIG, f"data directory {data_dir} cannot be made: {e.strerror}") from None


@contextlib.contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """Hold the data directory; a second server would corrupt it.

    Raises:
        FedlinkError: BAD_CONFIG, saying who holds it.
    """
    try:
        file = (data_dir / "lock").open("a+", encoding="ascii")
    except OSError as e:
        raise FedlinkError(Reason.BAD_CONFIG, f"data directory {data_dir} cannot be used: {e.strerror}") from None
    with file:
        if not take(file.fileno()):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise FedlinkError(
                Reason.BAD_CONFIG,
                f"data directory {data_dir} is in use by the fedserver with process id {holder}; "
                "stop that one, or choose another with --data-dir",
            )
        with contextlib.suppress(OSError):  # on a full disk nobody is told who it is
            file.truncate(0)
            os.write(file.fileno(), str(os.getpid()).encode())
        yield
