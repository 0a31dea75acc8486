"""AdminService: what operators call, on a listener of its own (admin_service.proto is the specification)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

from google.protobuf.message import Message
from sqlalchemy import Connection

from fedlink.blobs import MAX_MESSAGE_BYTES
from fedlink.config import check_name
from fedlink.errors import FedlinkError, Reason
from fedlink.manifest import ref_from_pb
from fedlink.v1 import admin_service_pb2 as pb
from fedlink.v1 import admin_service_pb2_grpc as pb_grpc
from fedserver.rounds.explain import account
from fedserver.runtime import outlook, records
from fedserver.runtime.board import TaskBoard
from fedserver.runtime.engine import Engine
from fedserver.runtime.events import EventFeed
from fedserver.runtime.integrity import Integrity
from fedserver.runtime.prediction import transfers
from fedserver.runtime.sites import SiteRegistry
from fedserver.runtime.versions import Versions
from fedserver.services import views
from fedserver.services.identity import operator
from fedserver.services.status import Context, translated
from fedserver.store.database import Database
from fedserver.store.queries import models as model_queries
from fedserver.store.queries import runs as q
from fedserver.store.queries import speeds as speed_queries
from fedserver.store.queries import tasks as task_queries
from fedserver.store.rows import RoundRow, RunRow, VersionRow

_MAX_PAGE = 1000
_DEFAULT_PAGE = 100
_USES = 10
_PAGE_BYTES = MAX_MESSAGE_BYTES - (64 << 10)

M = TypeVar("M", bound=Message)


class AdminServicer(pb_grpc.AdminServiceServicer):
    """The calls of an operator."""

    def __init__(
        self,
        *,
        database: Database,
        engine: Engine,
        sites: SiteRegistry,
        board: TaskBoard,
        versions: Versions,
        feed: EventFeed,
        integrity: Integrity,
    ) -> None:
        self._db = database
        self._engine = engine
        self._sites = sites
        self._board = board
        self._versions = versions
        self._feed = feed
        self._integrity = integrity

    # --- Runs

    @translated
    async def CreateRun(self, request: pb.CreateRunRequest, context: Context) -> pb.CreateRunResponse:
        """See the .proto."""
        await operator(context)
        row = await self._engine.create(request.spec_json, request.request_id)
        return pb.CreateRunResponse(run=self._run(row))

    @translated
    async def PlanRun(self, request: pb.PlanRunRequest, context: Context) -> pb.PlanRunResponse:
        """See the .proto."""
        await operator(context)
        name, plan = await self._engine.plan(request.spec_json, request.clients)
        times = transfers(plan.prediction, link=request.link, server_link=request.server_link)
        return views.plan_message(name, plan, times)

    @translated
    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        """See the .proto."""
        await operator(context)
        row = await self._engine.find(request.run)
        newest = await self._db.run(lambda c: q.list_rounds(c, row.id, after=max(0, row.version - _USES), limit=_USES))
        speeds = await self._db.run(lambda c: speed_queries.list_speeds(c, row.parsed.workload))
        run = self._run(row)
        run.used.extend(views.use_messages(row, newest))
        run.speeds.extend(views.speed_message(s, row.id) for s in speeds)
        return pb.GetRunResponse(run=run)

    @translated
    async def ExplainRun(self, request: pb.ExplainRunRequest, context: Context) -> pb.ExplainRunResponse:
        """See the .proto."""
        await operator(context)
        row = await self._engine.find(request.run)
        driver = self._engine.driver(row.id)
        return views.explanation(row, driver.account() if driver else account(outlook.ended(row)))

    @translated
    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        """See the .proto."""
        await operator(context)
        after, limit = _page(request.page_size, request.page_token)
        rows = await self._db.run(lambda c: q.list_runs(c, after=after, limit=limit))
        runs = _fitting([self._run(r) for r in rows])
        token = str(rows[len(runs) - 1].id) if len(runs) < len(rows) or len(rows) == limit else ""
        return pb.ListRunsResponse(runs=runs, next_page_token=token)

    @translated
    async def WatchRun(self, request: pb.WatchRunRequest, context: Context) -> AsyncIterator[pb.WatchRunResponse]:
        """See the .proto."""
        await operator(context)
        run = await self._engine.find(request.run)
        # Told at once that the call is accepted: the first event may be hours away.
        await context.send_initial_metadata(())
        async for row in self._feed.follow(run.id, request.after_sequence):
            yield views.event_message(row.sequence, row.time, row.kind, row.data)

    @translated
    async def PauseRun(self, request: pb.PauseRunRequest, context: Context) -> pb.PauseRunResponse:
        """See the .proto."""
        await operator(context)
        await (await self._engine.live(request.run)).set_paused(paused=True)
        return pb.PauseRunResponse(run=self._run(await self._engine.find(request.run)))

    @translated
    async def ResumeRun(self, request: pb.ResumeRunRequest, context: Context) -> pb.ResumeRunResponse:
        """See the .proto."""
        await operator(context)
        await (await self._engine.live(request.run)).set_paused(paused=False)
        return pb.ResumeRunResponse(run=self._run(await self._engine.find(request.run)))

    @translated
    async def StopRun(self, request: pb.StopRunRequest, context: Context) -> pb.StopRunResponse:
        """See the .proto."""
        await operator(context)
        row = await self._engine.find(request.run)
        # A repeat finds the run stopped, and that is what was asked for.
        if row.state != "stopped":
            await (await self._engine.live(request.run)).stop()
        return pb.StopRunResponse(run=self._run(await self._engine.find(request.run)))

    @translated
    async def ExtendRun(self, request: pb.ExtendRunRequest, context: Context) -> pb.ExtendRunResponse:
        """See the .proto."""
        await operator(context)
        return pb.ExtendRunResponse(run=self._run(await self._engine.extend(request.run, request.rounds)))

    # --- Rounds

    @translated
    async def ListRounds(self, request: pb.ListRoundsRequest, context: Context) -> pb.ListRoundsResponse:
        """See the .proto."""
        await operator(context)
        run = await self._engine.find(request.run)
        after, limit = _page(request.page_size, request.page_token)
        rows = await self._db.run(lambda c: q.list_rounds(c, run.id, after=after, limit=limit))
        rounds = _fitting([await self._round(run, row) for row in rows])
        token = str(rows[len(rounds) - 1].number) if len(rounds) < len(rows) or len(rows) == limit else ""
        return pb.ListRoundsResponse(rounds=rounds, next_page_token=token)

    @translated
    async def GetRound(self, request: pb.GetRoundRequest, context: Context) -> pb.GetRoundResponse:
        """See the .proto."""
        await operator(context)
        run = await self._engine.find(request.run)
        number, attempt = request.number, request.attempt
        row = await self._db.run(
            lambda c: q.round_attempt(c, run.id, number, attempt) if attempt else q.newest_round(c, run.id, number)
        )
        if row is None:
            which = f"attempt {attempt} at round {number}" if attempt else f"round {number}"
            raise FedlinkError(Reason.ROUND_NOT_FOUND, f"run {run.name!r} has no {which}; see `fedserver round list`")
        return pb.GetRoundResponse(round=await self._round(run, row))

    @translated
    async def CloseRound(self, request: pb.CloseRoundRequest, context: Context) -> pb.CloseRoundResponse:
        """See the .proto."""
        await operator(context)
        driver = await self._engine.live(request.run)
        await driver.close_round()
        row = await self._db.run(lambda c: q.newest_round(c, driver.row.id))
        assert row is not None
        return pb.CloseRoundResponse(round=await self._round(driver.row, row))

    # --- Clients

    @translated
    async def AddClient(self, request: pb.AddClientRequest, context: Context) -> pb.AddClientResponse:
        """See the .proto."""
        await operator(context)
        return pb.AddClientResponse(token=await self._sites.add(request.name, rotate=request.rotate))

    @translated
    async def ListClients(self, request: pb.ListClientsRequest, context: Context) -> pb.ListClientsResponse:
        """See the .proto."""
        await operator(context)
        after, limit = _page(request.page_size, request.page_token)
        page = self._sites.all()[after : after + limit]
        speeds = defaultdict(list)
        for row in await self._db.run(speed_queries.list_speeds):
            speeds[row.client].append(row)
        clients = _fitting([views.client_message(s, speeds[s.name], connected=self._sites.connected(s)) for s in page])
        token = str(after + len(clients)) if len(clients) < len(page) or len(page) == limit else ""
        return pb.ListClientsResponse(clients=clients, next_page_token=token)

    @translated
    async def RevokeClient(self, request: pb.RevokeClientRequest, context: Context) -> pb.RevokeClientResponse:
        """See the .proto."""
        await operator(context)
        await self._sites.revoke(request.name)
        await self._engine.revoke(request.name)
        return pb.RevokeClientResponse()

    # --- Models

    @translated
    async def ImportModel(self, request: pb.ImportModelRequest, context: Context) -> pb.ImportModelResponse:
        """See the .proto."""
        await operator(context)
        try:
            check_name(request.name)
        except ValueError as e:
            raise FedlinkError(Reason.BAD_NAME, str(e)) from None
        row = await self._versions.take_in(request.import_id, request.name, ref_from_pb(request.manifest))
        return pb.ImportModelResponse(model=views.model_message(row.name, row))

    @translated
    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """See the .proto."""
        await operator(context)
        after, limit = _page(request.page_size, request.page_token)
        models = await self._db.run(_all_models)
        page = _fitting(models[after : after + limit])
        token = str(after + len(page)) if after + len(page) < len(models) else ""
        return pb.ListModelsResponse(models=page, next_page_token=token)

    @translated
    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        """See the .proto."""
        await operator(context)
        name, _, row = await self._versions.find(request.name)
        if isinstance(row, VersionRow):
            self._versions.note_read([(row.run_id, row.number)])
            return pb.GetModelResponse(model=await self._version(row))
        return pb.GetModelResponse(model=views.model_message(name, row))

    @translated
    async def PinModel(self, request: pb.PinModelRequest, context: Context) -> pb.PinModelResponse:
        """See the .proto."""
        await operator(context)
        return pb.PinModelResponse(model=await self._version(await self._versions.pin(request.name)))

    @translated
    async def UnpinModel(self, request: pb.UnpinModelRequest, context: Context) -> pb.UnpinModelResponse:
        """See the .proto."""
        await operator(context)
        row = await self._versions.unpin(request.name)
        return pb.UnpinModelResponse(model=await self._version(row), kept=row.kept)

    # --- The server

    @translated
    async def DrainServer(self, request: pb.DrainServerRequest, context: Context) -> pb.DrainServerResponse:
        """See the .proto."""
        await operator(context)
        if not request.look:
            self._engine.drain()
        if not self._board.draining:
            return pb.DrainServerResponse()
        left = self._engine.under_way()
        return pb.DrainServerResponse(
            waiting=str(left), uploads=left.uploads, aggregations=left.aggregations, draining=True
        )

    @translated
    async def VerifyModels(
        self, request: pb.VerifyModelsRequest, context: Context
    ) -> AsyncIterator[pb.VerifyModelsResponse]:
        """See the .proto."""
        await operator(context)
        # Told at once that the call is accepted: the first file may take minutes.
        await context.send_initial_metadata(())
        async for found in self._integrity.verify(request.name):
            yield views.finding_message(found)

    # --- Parts

    async def _version(self, row: VersionRow) -> pb.Model:
        run = await self._db.run(lambda c: q.run_by_id(c, row.run_id))
        return views.model_message(f"{run.name}@{row.number}", row, best=run.best_version == row.number)

    def _run(self, row: RunRow) -> pb.Run:
        driver = self._engine.driver(row.id)
        return views.run_message(row, driver.waiting() if driver else "")

    async def _round(self, run: RunRow, row: RoundRow) -> pb.Round:
        def work(c: Connection) -> pb.Round:
            train = task_queries.round_tasks(c, run.id, row.number, row.attempt)
            committed = row.phase == "committed"
            tasks = train + (task_queries.evaluation_tasks(c, run.id, row.number) if committed else [])
            version = q.version(c, run.id, row.number) if committed else None
            out = views.round_message(run.name, row, tasks, version, live)
            out.bytes_down = records.bytes_down(c, run.id, train, row.number - 1)
            return out

        live = {t.row.id: t for t in self._board.of_run(run.id)}
        return await self._db.run(work)


def _all_models(c: Connection) -> list[pb.Model]:
    found = [views.model_message(m.name, m) for m in model_queries.list_models(c)]
    for run in q.list_runs(c):
        for v in q.list_versions(c, run.id):
            found.append(views.model_message(f"{run.name}@{v.number}", v, best=v.number == run.best_version))  # noqa: PERF401
    return found


def _fitting(messages: Sequence[M]) -> list[M]:
    """As many of these, at least one, as one answer has room for."""
    room = _PAGE_BYTES
    out: list[M] = []
    for message in messages:
        room -= message.ByteSize()
        if out and room < 0:
            break
        out.append(message)
    return out


def _page(size: int, token: str) -> tuple[int, int]:
    if size > _MAX_PAGE or (token and not (token.isascii() and token.isdigit())) or len(token) > 18:
        raise FedlinkError(Reason.BAD_PAGE, f"page_size is at most {_MAX_PAGE}, page_token is from the page before")
    return int(token or 0), size or _DEFAULT_PAGE
