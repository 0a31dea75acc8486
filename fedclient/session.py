"""The daemon's conversation with the server: registration, control calls, repeats.

Control and bulk each have a channel, so that a heartbeat never waits behind megabytes.
A call is repeated for ever while the server is away, busy or draining; a session the
server no longer knows is opened again, once for all callers. Only what cannot pass by
itself comes out as a FedlinkError.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
import grpc.aio
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from pydantic import ValidationError

import fedlink
from fedclient.aside import off_loop
from fedclient.patience import Patience
from fedclient.settings import SiteSettings
from fedclient.spool import Order, Outcome
from fedlink import log, rpc
from fedlink.blobs import BlobRef
from fedlink.config import explain
from fedlink.errors import FedlinkError, Reason
from fedlink.failpoints import reach
from fedlink.manifest import ref_from_pb, ref_to_pb
from fedlink.route import is_loopback
from fedlink.tensors import Kind
from fedlink.tls import open_channel, refusal
from fedlink.transfer import Retry
from fedlink.v1 import coordination_service_pb2 as pb
from fedlink.v1 import types_pb2 as types_pb
from fedlink.v1.coordination_service_pb2_grpc import CoordinationServiceStub
from fedlink.work import WorkLimits

if TYPE_CHECKING:
    from grpc.aio import UnaryUnaryMultiCallable

LEAST_BEAT_PATIENCE = 5.0
"""Seconds a heartbeat may take at least, however short the lease."""
LOOK_AGAIN_AFTER = 5.0
"""Seconds between two looks for a cause as long as none is found: a server that restarts is away first, wrong later."""
BACKOFF = Retry(base=0.25, cap=5.0)
"""Waits between attempts."""

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Offer:
    """A workload as the server is told of it."""

    name: str
    settings_schema: str
    abilities: tuple[str, ...]
    runs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device as the server is told of it."""

    name: str
    model: str = ""
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Polled:
    """The answer to a poll."""

    order: Order | None
    released: tuple[bytes, ...]
    retry_after: float
    """Seconds to wait before the next poll."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to a completed task; `accepted` is None while the server is still checking."""

    accepted: bool | None
    reason: str = ""
    tensor: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class TaskFailure:
    """Why a task could not be done; see `fedlink.v1.FailTaskRequest`."""

    reason: str
    """One of its reasons, in lower case."""
    message: str
    exception_class: str = ""
    exit_code: int = 0
    step: int = 0
    memory_bytes: int = 0
    retryable: bool = False


class Session:
    """One daemon process's session with the server. Use as an async context manager.

    Raises:
        FedlinkError: BAD_CONFIG if the token or a certificate cannot be used.

    Attributes:
        patience: how long it waits for a server that says nothing.
        bulk: the channel for blobs.
        lease_term: seconds a task may go without `extend`.
        returned: set whenever the server may have lost its memory of us: after each
            registration, and when it answers again after it was away. Cleared by whoever waits for it.
    """

    def __init__(
        self,
        site: SiteSettings,
        offers: Sequence[Offer],
        devices: Sequence[DeviceInfo],
        *,
        rng: random.Random,
        patience: Patience,
    ) -> None:
        self._site = site
        self.patience = patience
        self._rng = rng
        self._log = log.get("session").bind(client=site.name, server=site.server)
        self._credentials = credentials(site)
        self._route = site.route
        self._tls = site.client_tls
        self._own = self._tls.check() if self._tls else None
        self._id = b""
        self._opening = asyncio.Lock()
        self._away: log.Seldom | None = None
        self._look_again = 0.0
        self._registration = pb.RegisterClientRequest(
            instance_id=os.urandom(16),
            protocol_version=fedlink.PROTOCOL_VERSION,
            software_version=fedlink.__version__,
            features=fedlink.FEATURES,
            workloads=[
                pb.RegisterClientRequest.WorkloadOffer(
                    name=o.name, settings_schema_json=o.settings_schema, abilities=o.abilities, allowed_runs=o.runs
                )
                for o in offers
            ],
            devices=[types_pb.Device(name=d.name, model=d.model, memory_bytes=d.memory_bytes) for d in devices],
        )
        self.lease_term = 60.0
        self.max_poll_wait = 30.0
        self.returned = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._control = open_channel(self._route, self._tls, rpc.channel_options(self.patience.control))
        self.bulk = open_channel(self._route, self._tls, rpc.channel_options(self.patience.bulk))
        self._stub = CoordinationServiceStub(self._control)
        if self._tls is None and not is_loopback(self._site.server):
            self._log.warning("everything travels unencrypted; use only a network you trust", because="insecure = true")
        if self._own and (soon := self._own.ends_soon()):
            self._log.warning(f"this site's certificate {soon}; ask the server's operator for a new one")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.bulk.close()
        await self._control.close()

    def metadata(self) -> rpc.Metadata:
        """The metadata of a call made now."""
        return (*self._credentials, (rpc.META_SESSION, self._id)) if self._id else self._credentials

    async def open(self) -> None:
        """Register; waits for the server for ever.

        Raises:
            FedlinkError: the server refuses this site.
        """
        await self._open(stale=b"")

    async def renewing(self, act: Callable[[], Awaitable[_T]]) -> _T:
        """Do something that uses `metadata()`, again after registering if the session is unknown.

        Raises:
            FedlinkError: whatever `act` raises, but SESSION_UNKNOWN.
        """
        failures = 0
        while True:
            used = self._id
            try:
                return await act()
            except FedlinkError as e:
                if e.reason is not Reason.SESSION_UNKNOWN:
                    raise
            await self._open(stale=used)
            await asyncio.sleep(BACKOFF.delay(failures, self._rng) if failures else 0)
            failures += 1

    async def poll(self, held: Sequence[bytes], wait: float) -> Polled:
        """Ask for work, at most `wait` seconds long.

        Raises:
            FedlinkError: the session is over (SESSION_REPLACED, BAD_CREDENTIALS, ...).
        """
        wait = min(wait, self.max_poll_wait)
        request = pb.PollTaskRequest(held_tokens=held, wait=_duration(wait))
        # After an outage the server is asked for a quick word first, so that its return is noticed at once.
        again = pb.PollTaskRequest(held_tokens=held)
        answer = await self._call(self._stub.PollTask, request, again, wait)
        order = None
        if answer.HasField("task"):
            try:
                order = _order_from_pb(answer.task)
            except (ValidationError, FedlinkError) as e:
                text = explain(e) if isinstance(e, ValidationError) else e.message
                self._log.error("the server sent a task that breaks the protocol", error=text)
                with contextlib.suppress(FedlinkError):
                    await self.fail(answer.task.token, TaskFailure("not_allowed", f"malformed task: {text}"))
        pause = _seconds(answer.retry_after) if answer.HasField("retry_after") else 0.0
        return Polled(order, tuple(answer.released_tokens), pause)

    async def extend(self, token: bytes, activity: str, done: int, total: int) -> bool:
        """Heartbeat for a task, tried once; True if the server wants it cancelled.

        Raises:
            FedlinkError: the task or the session is over, or the server cannot be reached now.
        """
        request = pb.ExtendLeaseRequest(
            token=token,
            activity=pb.ExtendLeaseRequest.Activity.Value(f"ACTIVITY_{activity.upper()}"),
            done=done,
            total=total,
        )
        # The next one is due then.
        within = min(self.patience.call, max(self.lease_term / 3, LEAST_BEAT_PATIENCE))
        answer = await self.renewing(lambda: self._once(self._stub.ExtendLease, request, within))
        self._note_lease(answer.lease_term)
        return answer.cancel

    async def complete(self, token: bytes, outcome: Outcome, update: BlobRef | None) -> Verdict:
        """Hand in a result.

        Raises:
            FedlinkError: the task or the session is over, or BLOB_MISSING.
        """
        request = pb.CompleteTaskRequest(
            token=token,
            update=ref_to_pb(update) if update else None,
            num_examples=outcome.num_examples,
            steps=outcome.steps,
            metrics=outcome.metrics,
            compute_seconds=outcome.compute_seconds,
            examples_seen=outcome.examples_seen,
            cut=outcome.cut,
        )
        answer = await self._call(self._stub.CompleteTask, request)
        outcomes = pb.CompleteTaskResponse
        accepted = {outcomes.OUTCOME_ACCEPTED: True, outcomes.OUTCOME_REFUSED: False}.get(answer.outcome)
        return Verdict(accepted, answer.reason, answer.tensor, answer.message)

    async def fail(self, token: bytes, failure: TaskFailure) -> None:
        """Say that a task could not be done.

        Raises:
            FedlinkError: the task or the session is over.
        """
        request = pb.FailTaskRequest(
            token=token,
            reason=pb.FailTaskRequest.Reason.Value(f"REASON_{failure.reason.upper()}"),
            exception_class=failure.exception_class,
            exit_code=failure.exit_code,
            step=failure.step,
            memory_bytes=failure.memory_bytes,
            message=failure.message,
            retryable=failure.retryable,
        )
        await self._call(self._stub.FailTask, request)

    async def report(self, token: bytes, points: Mapping[str, tuple[float, int]]) -> None:
        """Hand over measurements, `name: (value, step)`; tried once.

        Raises:
            FedlinkError: it did not work; they may be forgotten.
        """
        message = pb.ReportMetricsRequest(token=token)
        for name, (value, step) in points.items():
            message.points.add(name=name, value=value, step=step)
        await self.renewing(lambda: self._once(self._stub.ReportMetrics, message))

    async def deregister(self) -> None:
        """End the session; tried once.

        Raises:
            FedlinkError: it did not work.
        """
        await self._once(self._stub.DeregisterClient, pb.DeregisterClientRequest())

    async def _call(
        self,
        method: UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        again: _Request | None = None,
        wait: float = 0.0,
    ) -> _Response:
        return await self.renewing(lambda: self._until_answered(method, request, again, wait))

    async def _until_answered(
        self,
        method: UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        again: _Request | None = None,
        wait: float = 0.0,
    ) -> _Response:
        failures = 0
        while True:
            try:
                return await self._once(method, again if failures and again else request, self.patience.call + wait)
            except FedlinkError as e:
                if not e.reason.retryable or e.reason is Reason.SESSION_UNKNOWN:
                    raise
                await self._look_into(e)
                failures += 1
                await asyncio.sleep(BACKOFF.wait(e, failures, self._rng))

    async def _look_into(self, error: FedlinkError) -> None:
        """Find out whether TLS or a proxy is why the server cannot be reached.

        Before the first registration that is a mistake in the configuration, and ends the daemon.
        Later it may be a certificate that is being renewed: it is said, and waited for. If it is our
        own that was renewed, the daemon ends, for its next start to read it.

        Raises:
            FedlinkError: TLS_REFUSED or PROXY_REFUSED, with the cause.
        """
        clock = asyncio.get_running_loop().time
        if error.reason is not Reason.UNREACHABLE or clock() < self._look_again:
            return
        self._look_again = clock() + LOOK_AGAIN_AFTER if self._id else 0.0
        try:
            cause = await off_loop(refusal, self._route, self._tls)
            renewed = self._own and not cause and await off_loop(self._renewed)
        except Exception:  # noqa: BLE001 - whatever a stranger's certificate does to a diagnosis must not end the daemon
            self._log.debug("could not find out why the server cannot be reached", exc_info=True)
            return
        if cause and not self._id:
            raise cause
        if renewed:
            text = "this site's certificate was renewed while the daemon ran with the former one: start it again"
            raise FedlinkError(Reason.TLS_REFUSED, text)
        if cause:
            self._look_again = clock() + log.SAY_AGAIN_AFTER
            self._log.error("no connection comes about; trying again until it does", error=cause.message)

    def _renewed(self) -> bool:
        """Whether another certificate lies on disk by now, and the one in use is no longer valid."""
        facts = self._tls.check() if self._tls else None
        return bool(facts and self._own and facts.serial != self._own.serial and self._own.trouble())

    async def _once(
        self, method: UnaryUnaryMultiCallable[_Request, _Response], request: _Request, within: float | None = None
    ) -> _Response:
        try:
            answer = await method(request, timeout=within or self.patience.call, metadata=self.metadata())
        except grpc.RpcError as e:
            error = rpc.from_rpc_error(e)
            if error.reason.retryable and error.reason is not Reason.SESSION_UNKNOWN:
                self._note_away(error)
            raise error from None
        self._note_back()
        return answer

    async def _open(self, stale: bytes) -> None:
        async with self._opening:
            if self._id != stale:
                return
            answer = await self._until_answered(self._stub.RegisterClient, self._registration)
            reach("client.registered")
            self._id = answer.session
            self._note_lease(answer.lease_term)
            self.max_poll_wait = max(_seconds(answer.max_poll_wait), 1.0)
            self.returned.set()
            self._log.info("registered", as_name=answer.client_name, server_version=answer.server.software_version)

    def _note_lease(self, term: duration_pb2.Duration) -> None:
        if term.ToNanoseconds() > 0:
            self.lease_term = _seconds(term)

    def _note_away(self, error: FedlinkError) -> None:
        self._away = self._away or log.Seldom()
        if self._away.due():
            self._log.warning("the server cannot be asked now; trying again until it can", error=error.message)

    def _note_back(self) -> None:
        if self._away is not None:
            self._away = None
            self.returned.set()
            self._log.info("the server answers again")


def _order_from_pb(task: pb.Task) -> Order:
    work: dict[str, Any] = {}
    if task.WhichOneof("work") == "train":
        work = {
            "update": Kind(types_pb.Manifest.Kind.Name(task.train.update).removeprefix("KIND_").lower()),
            "update_dtype": types_pb.Dtype.Name(task.train.update_dtype).removeprefix("DTYPE_"),
            "max_update_bytes": task.train.max_update_bytes,
            # What is 0 is not set.
            "work": WorkLimits(**{field.name: value for field, value in task.train.limits.ListFields()}),
        }
    elif task.WhichOneof("work") == "calibrate":
        work = {"calibrate": tuple(task.calibrate.settings)}
        if not work["calibrate"]:
            raise FedlinkError(Reason.WRONG_RESULT, "the task asks for no setting")
    elif task.WhichOneof("work") is None:
        raise FedlinkError(Reason.WRONG_RESULT, "the task asks for something this client does not know; upgrade it")
    model = ref_from_pb(task.model)
    return Order(
        token=task.token,
        run=task.run,
        round=task.round,
        attempt=task.attempt,
        workload=task.workload,
        version=task.version,
        model_digest=model.digest,
        model_size=model.size,
        settings_json=task.settings_json,
        seed=task.seed,
        rounds=task.rounds,
        **work,
    )


def credentials(site: SiteSettings) -> rpc.Metadata:
    """What a call without a session carries: the site's name, and its token if it has one.

    Raises:
        FedlinkError: BAD_CONFIG if the token's file cannot be used.
    """
    name: rpc.Metadata = ((rpc.META_CLIENT, site.name),)
    if site.token_file is None:
        return name
    try:
        if site.token_file.stat().st_mode & 0o077:
            raise FedlinkError(Reason.BAD_CONFIG, f"token_file {site.token_file} is open to others: chmod 600 it")
        token = site.token_file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise FedlinkError(Reason.BAD_CONFIG, f"token_file {site.token_file} cannot be read: {e}") from None
    if not token.isprintable() or not 0 < len(token) <= 1024:
        raise FedlinkError(Reason.BAD_CONFIG, f"token_file {site.token_file} does not hold one token")
    return (*name, (rpc.META_AUTHORIZATION, f"Bearer {token}"))


def _duration(seconds: float) -> duration_pb2.Duration:
    message = duration_pb2.Duration()
    message.FromMilliseconds(math.ceil(seconds * 1000))
    return message


def _seconds(message: duration_pb2.Duration) -> float:
    return message.ToMilliseconds() / 1000
