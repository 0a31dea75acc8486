"""CoordinationService: what sites call (coordination_service.proto is the specification)."""

from __future__ import annotations

import json
import math

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

import fedlink
from fedlink.errors import FedlinkError, Reason
from fedlink.failpoints import reach
from fedlink.manifest import ref_from_pb, ref_to_pb
from fedlink.run_file import WIRE_DTYPES
from fedlink.tensors import Kind
from fedlink.v1 import coordination_service_pb2 as pb
from fedlink.v1 import coordination_service_pb2_grpc as pb_grpc
from fedlink.v1 import types_pb2
from fedlink.work import WorkLimits
from fedserver.rounds.model import TaskState
from fedserver.runtime.board import OpenTask, TaskBoard, ended
from fedserver.runtime.completion import Completions, read_claim
from fedserver.runtime.engine import Engine
from fedserver.runtime.sites import Site, SiteRegistry
from fedserver.runtime.uploads import TaskBlobAccess
from fedserver.services.identity import SiteIdentity
from fedserver.services.status import Context, translated

_MAX_HELD = 4096
_MAX_POINTS = 1024
_COMPLETE_WAIT = 30.0
# By number: a newer client may say what this server has no name for.
_ACTIVITIES = {v: k.removeprefix("ACTIVITY_").lower() for k, v in pb.ExtendLeaseRequest.Activity.items() if v}
_FAILURES = {v: k.removeprefix("REASON_") for k, v in pb.FailTaskRequest.Reason.items()}


class CoordinationServicer(pb_grpc.CoordinationServiceServicer):
    """The calls of a client daemon."""

    def __init__(
        self,
        *,
        identity: SiteIdentity,
        sites: SiteRegistry,
        board: TaskBoard,
        engine: Engine,
        access: TaskBlobAccess,
        completions: Completions,
        lease_term: float,
        max_poll_wait: float,
    ) -> None:
        self._identity = identity
        self._sites = sites
        self._board = board
        self._engine = engine
        self._access = access
        self._completions = completions
        self._lease_term = lease_term
        self._max_poll_wait = max_poll_wait

    @translated
    async def GetServerInfo(
        self,
        request: pb.GetServerInfoRequest,
        context: Context,
    ) -> pb.GetServerInfoResponse:
        """See the .proto."""
        return _server_info()

    @translated
    async def RegisterClient(self, request: pb.RegisterClientRequest, context: Context) -> pb.RegisterClientResponse:
        """See the .proto."""
        name = self._identity.name(context)
        session = await self._sites.register(name, request)
        return pb.RegisterClientResponse(
            session=session,
            client_name=name,
            lease_term=_duration(self._lease_term),
            max_poll_wait=_duration(self._max_poll_wait),
            server=_server_info(),
        )

    @translated
    async def PollTask(self, request: pb.PollTaskRequest, context: Context) -> pb.PollTaskResponse:
        """See the .proto."""
        site = self._identity.site(context)
        if len(request.held_tokens) > _MAX_HELD:
            raise FedlinkError(Reason.TOO_LARGE, f"a poll may name at most {_MAX_HELD} held tasks")
        held = set(request.held_tokens)
        released = await self._board.released(site.name, held)
        # With something to let go of, the answer must not wait.
        wait = 0.0 if released else min(self._max_poll_wait, _seconds(request.wait))
        task = await self._poll(site, held, wait)
        # Once more: while the poll was held, the site may have lost its right to be answered.
        self._identity.site(context)
        response = pb.PollTaskResponse(released_tokens=released)
        if task is not None:
            try:
                response.task.CopyFrom(await self._task_message(task))
            except FedlinkError:
                # A task that closed at this very moment is no task.
                if self._board.get(task.token) is task:
                    raise
        elif self._board.draining:
            response.retry_after.CopyFrom(_duration(2.0))
        return response

    async def _poll(self, site: Site, held: set[bytes], wait: float) -> OpenTask | None:
        site.polls += 1
        try:
            task = await self._board.poll(site.name, held, wait)
        finally:
            site.polls -= 1
            self._sites.seen(site)
        if task is not None:
            await self._engine.revive(task)
            reach("task.given")
        return task

    async def _task_message(self, task: OpenTask) -> pb.Task:
        out = pb.Task()
        spec, row = task.run.parsed, task.row
        model = await self._access.task_model(task)
        out.token, out.run, out.workload = row.token, task.run.name, spec.workload
        out.round = row.round if row.kind == "train" else row.version
        out.attempt, out.version, out.seed = row.attempt, row.version, spec.seed
        out.model.CopyFrom(ref_to_pb(model))
        # Not escaped, so that it is no longer than what was checked.
        out.settings_json = json.dumps(dict(spec.settings), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        driver = self._engine.driver_of(task)
        current, out.rounds = driver.round, driver.row.rounds
        if row.kind == "calibrate":
            out.calibrate.settings.extend(driver.to_measure)
            return out
        if row.kind != "train":
            out.evaluate.SetInParent()
            return out
        if current is not None and current.deadline_at is not None:
            out.deadline.CopyFrom(_timestamp(current.deadline_at))
        kinds = {Kind.DELTA: types_pb2.Manifest.KIND_DELTA, Kind.GRADIENT: types_pb2.Manifest.KIND_GRADIENT}
        out.train.update = kinds[spec.update_kind]
        out.train.update_dtype = types_pb2.Dtype.Value(f"DTYPE_{WIRE_DTYPES[spec.update_dtype]}")
        out.train.max_update_bytes = await self._access.update_limit(task)
        if (limits := spec.work.limits(row.given_steps)).table:
            out.train.limits.CopyFrom(_limits(limits))
        return out

    @translated
    async def ExtendLease(self, request: pb.ExtendLeaseRequest, context: Context) -> pb.ExtendLeaseResponse:
        """See the .proto."""
        site = self._identity.site(context)
        task = await self._board.open_task(site.name, request.token)
        await self._engine.revive(task)
        task.activity = _ACTIVITIES.get(request.activity, "")
        task.done, task.total = request.done, request.total
        return pb.ExtendLeaseResponse(lease_term=_duration(self._lease_term))

    @translated
    async def CompleteTask(self, request: pb.CompleteTaskRequest, context: Context) -> pb.CompleteTaskResponse:
        """See the .proto."""
        site = self._identity.site(context)
        update = ref_from_pb(request.update) if request.HasField("update") else None
        claim = read_claim(
            update,
            request.num_examples,
            request.steps,
            request.metrics,
            seconds=request.compute_seconds,
            examples_seen=request.examples_seen,
            cut=request.cut,
        )
        verdict = await self._completions.complete(site.name, request.token, claim, _COMPLETE_WAIT)
        if verdict is None:
            return pb.CompleteTaskResponse(outcome=pb.CompleteTaskResponse.OUTCOME_CHECKING)
        if verdict.accepted:
            return pb.CompleteTaskResponse(outcome=pb.CompleteTaskResponse.OUTCOME_ACCEPTED)
        return pb.CompleteTaskResponse(
            outcome=pb.CompleteTaskResponse.OUTCOME_REFUSED,
            reason=verdict.reason,
            tensor=verdict.tensor,
            message=verdict.message,
        )

    @translated
    async def FailTask(self, request: pb.FailTaskRequest, context: Context) -> pb.FailTaskResponse:
        """See the .proto."""
        site = self._identity.site(context)
        task = self._board.get(request.token)
        if task is None or task.client != site.name:
            row = await self._board.ended_task(site.name, request.token)
            if row.state == TaskState.FAILED:
                return pb.FailTaskResponse()
            raise ended(row)
        reason = _FAILURES.get(request.reason, "UNSPECIFIED")
        values = {"reason": reason, "message": _describe(request), "steps": min(request.step, 1 << 53)}
        await self._engine.driver_of(task).task_ended(task, TaskState.FAILED, values, retryable=request.retryable)
        reach("task.failed")
        return pb.FailTaskResponse()

    @translated
    async def ReportMetrics(self, request: pb.ReportMetricsRequest, context: Context) -> pb.ReportMetricsResponse:
        """See the .proto."""
        site = self._identity.site(context)
        if len(request.points) > _MAX_POINTS:
            raise FedlinkError(Reason.TOO_LARGE, f"at most {_MAX_POINTS} points a call")
        task = await self._board.open_task(site.name, request.token)
        points = [(p.name, p.value) for p in request.points if 0 < len(p.name) <= 64 and math.isfinite(p.value)]
        self._board.note_metrics(task, points)
        return pb.ReportMetricsResponse()

    @translated
    async def DeregisterClient(
        self,
        request: pb.DeregisterClientRequest,
        context: Context,
    ) -> pb.DeregisterClientResponse:
        """See the .proto."""
        try:
            site = self._identity.site(context)
        except FedlinkError as e:
            if e.reason is not Reason.SESSION_UNKNOWN:
                raise
            # A repeat of a call whose answer was lost: what it asks for is done.
            return pb.DeregisterClientResponse()
        if await self._sites.deregister(site, site.row.session or b""):
            await self._engine.release(site.name)
        return pb.DeregisterClientResponse()


def _limits(asked: WorkLimits) -> pb.WorkLimits:
    return pb.WorkLimits(
        steps=asked.steps or 0,
        epochs=asked.epochs or 0,
        examples=asked.examples or 0,
        max_seconds=asked.max_seconds or 0.0,
    )


def _describe(request: pb.FailTaskRequest) -> str:
    """One line of what a site says about a failure."""
    parts = [request.exception_class[:128]] if request.exception_class else []
    if request.exit_code:
        what = f"signal {-request.exit_code}" if request.exit_code < 0 else f"exit code {request.exit_code}"
        parts.append(what)
    if request.step:
        parts.append(f"at step {request.step}")
    if request.memory_bytes:
        parts.append(f"{request.memory_bytes / 1e6:.0f} MB in use")
    text = ", ".join(parts)
    return f"{text}: {request.message[:4096]}" if request.message and text else text or request.message[:4096]


def _server_info() -> pb.GetServerInfoResponse:
    info = pb.GetServerInfoResponse(
        software_version=fedlink.__version__,
        protocol_version=fedlink.PROTOCOL_VERSION,
        min_protocol_version=fedlink.MIN_PROTOCOL_VERSION,
    )
    info.features.extend(fedlink.FEATURES)
    info.time.GetCurrentTime()
    return info


def _seconds(duration: Duration) -> float:
    return max(0.0, duration.ToMilliseconds() / 1000)


def _duration(seconds: float) -> Duration:
    out = Duration()
    out.FromMilliseconds(int(seconds * 1000))
    return out


def _timestamp(seconds: float) -> Timestamp:
    out = Timestamp()
    out.FromMilliseconds(int(seconds * 1000))
    return out
