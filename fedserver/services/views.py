"""Rows as the messages that operators see."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from google.protobuf.timestamp_pb2 import Timestamp

from fedlink.v1 import admin_service_pb2 as pb
from fedlink.v1 import types_pb2
from fedserver.rounds.calibration import Measured
from fedserver.rounds.explain import Doing, Wait
from fedserver.rounds.sharing import usual
from fedserver.runtime.board import OpenTask
from fedserver.runtime.integrity import Finding
from fedserver.runtime.planning import Plan
from fedserver.runtime.prediction import Prediction, Transfers
from fedserver.runtime.sites import Site
from fedserver.runtime.speeds import trainings
from fedserver.store.rows import ModelRow, RoundRow, RunRow, SpeedRow, TaskRow, VersionRow


def timestamp(seconds: float) -> Timestamp:
    """A time as a message."""
    out = Timestamp()
    out.FromMilliseconds(int(seconds * 1000))
    return out


def run_message(row: RunRow, waiting: str) -> pb.Run:
    """A run."""
    out = pb.Run(
        name=row.name,
        spec_json=row.spec,
        state=pb.RunState.Value(f"RUN_STATE_{row.state.upper()}"),
        version=row.version,
        rounds=row.rounds,
        best_version=row.best_version,
        waiting=waiting,
        reason=row.reason,
        created=timestamp(row.created),
    )
    if row.ended is not None:
        out.ended.CopyFrom(timestamp(row.ended))
    if row.calibration is not None:
        measured = Measured.parse(row.calibration)
        for name in sorted({*measured.settings, *measured.own}):
            found = {site: values[name] for site, values in measured.sites.items() if name in values}
            out.measured.add(name=name, value=measured.settings.get(name), sites=found)
    if row.prediction is not None:
        out.prediction.CopyFrom(prediction_message(Prediction.parse(row.prediction)))
    return out


def prediction_message(predicted: Prediction) -> pb.Prediction:
    """What a run will move and take."""
    return pb.Prediction(**asdict(predicted))


def plan_message(model: str, plan: Plan, times: Transfers | None) -> pb.PlanRunResponse:
    """What a run would take, starting from a model."""
    out = pb.PlanRunResponse(
        model=model,
        prediction=prediction_message(plan.prediction),
        server_disk=str(plan.takes),
        server_disk_free=plan.room,
        server_disk_reserve=plan.reserve,
        refusal=plan.refusal,
    )
    if times is not None:
        out.seconds_down_first = times.down_first
        out.seconds_down_later = times.down_later
        out.seconds_up = times.up
    return out


def use_messages(run: RunRow, rounds: Sequence[RoundRow]) -> list[pb.RoundUse]:
    """What those of these rounds that are committed have used, beside what was predicted."""
    predicted = Prediction.parse(run.prediction) if run.prediction is not None else None
    messages = []
    for row in rounds:
        if row.used is not None:
            messages.append(use := pb.RoundUse(round=row.number, **json.loads(row.used)))
            if predicted is not None:
                use.predicted_bytes_down = predicted.down(row.number, use.fetching)
                use.predicted_bytes_up = predicted.up(use.clients)
                use.predicted_server_disk = predicted.disk(row.number, use.clients, run.parsed.retention)
                use.predicted_server_memory = predicted.memory(use.fetching)
    return messages


def explanation(row: RunRow, wait: Wait) -> pb.ExplainRunResponse:
    """What a run waits for."""
    out = pb.ExplainRunResponse(
        run=row.name,
        state=pb.RunState.Value(f"RUN_STATE_{row.state.upper()}"),
        waiting=wait.sentence or "it waits for nothing: its next step is being taken",
        endless=wait.endless,
    )
    for waited in wait.clients:
        doing = waited.doing or Doing()
        out.clients.add(
            name=waited.client,
            state=waited.state,
            activity=doing.activity,
            done=doing.done,
            total=doing.total,
            seconds=round(doing.seconds, 3),
            held_back=round(doing.held_back, 3),
        )
    return out


def round_message(
    run: str, row: RoundRow, tasks: Sequence[TaskRow], version: VersionRow | None, live: Mapping[int, OpenTask]
) -> pb.Round:
    """A round with its tasks; `live` holds those that are open, by id."""
    out = pb.Round(
        run=run,
        number=row.number,
        phase=row.phase,
        attempt=row.attempt,
        opened=timestamp(row.opened),
        reason=row.reason,
    )
    if row.closed is not None:
        out.closed.CopyFrom(timestamp(row.closed))
    for task in tasks:
        out.tasks.append(task_message(task, live.get(task.id)))
        if task.kind == "train":
            out.bytes_up += live[task.id].bytes_up if task.id in live else task.bytes_up
    if version is not None:
        out.metrics.update(version.means)
    return out


def task_message(row: TaskRow, live: OpenTask | None) -> pb.TaskRecord:
    """A task and its fate."""
    state = live.state if live else row.state
    out = pb.TaskRecord(
        client=row.client,
        kind=row.kind,
        state=types_pb2.TaskState.Value(f"TASK_STATE_{state.upper()}"),
        attempt=row.attempt,
        reason=row.reason,
        message=row.message,
        num_examples=row.num_examples,
        steps=row.steps,
        compute_seconds=row.compute_seconds,
        given_steps=row.given_steps or 0,
        examples_seen=row.examples_seen,
        cut=row.cut,
        metrics=live.metrics if live else row.values,
        update_digest=row.update_digest or b"",
        issued=timestamp(row.issued),
    )
    if row.ended is not None:
        out.ended.CopyFrom(timestamp(row.ended))
    return out


def speed_message(row: SpeedRow, run: int | None = None) -> pb.Speed:
    """How fast a site trains a workload; in one run, if it has trained in it."""
    known = trainings(row)
    found = usual(known, run)
    if found is None:
        return pb.Speed(client=row.client, workload=row.workload)
    return pb.Speed(
        client=row.client,
        workload=row.workload,
        steps_per_second=found.steps_per_second,
        examples_per_second=found.examples_per_second,
        trainings=sum(t.run == run for t in known) or len(known),
    )


def client_message(site: Site, speeds: Sequence[SpeedRow], *, connected: bool) -> pb.Client:
    """A site."""
    out = pb.Client(
        name=site.name,
        admitted=site.row.token_hash is not None,
        revoked=site.row.revoked,
        connected=connected,
        workloads=sorted(site.offers),
        software_version=site.registration.software_version[:64],
        devices=site.registration.devices,
        speeds=[speed_message(row) for row in speeds],
    )
    if site.last_seen:
        out.last_seen.CopyFrom(timestamp(site.last_seen))
    return out


def model_message(name: str, row: ModelRow | VersionRow, *, best: bool = False) -> pb.Model:
    """An imported model, or a version."""
    return pb.Model(
        name=name,
        manifest=types_pb2.BlobRef(digest=row.manifest.digest, size=row.manifest.size),
        size=row.size,
        tensors=row.tensors,
        metrics=row.means if isinstance(row, VersionRow) else {},
        best=best,
        pinned=isinstance(row, VersionRow) and row.pinned,
        created=timestamp(row.created),
    )


def finding_message(found: Finding) -> pb.VerifyModelsResponse:
    """A file that was looked at."""
    blob = types_pb2.BlobRef(digest=found.ref.digest, size=found.ref.size)
    return pb.VerifyModelsResponse(model=found.model, file=found.file, blob=blob, damage=found.damage)


def event_message(sequence: int, time: float, kind: str, data: str) -> pb.WatchRunResponse:
    """An event."""
    return pb.WatchRunResponse(sequence=sequence, time=timestamp(time), kind=kind, data_json=data)
