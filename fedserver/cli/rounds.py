"""`fedserver round`: what happened in each round."""

from __future__ import annotations

from typing import Annotated

import typer

from fedlink.v1 import admin_service_pb2 as pb
from fedlink.v1 import types_pb2
from fedserver.cli.output import DATA_DIR, DataDir, Json, enum_name, local, print_list, speed, with_admin
from fedserver.remote import Admin
from fedserver.rounds.wording import size

app = typer.Typer(no_args_is_help=True)

RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")]


@app.command("list")
def list_rounds(run: RunName, *, as_json: Json = False, data_dir: DataDir = DATA_DIR) -> None:
    """List the rounds of a run."""
    rounds = with_admin(data_dir, lambda a: a.pages(a.stub.ListRounds, pb.ListRoundsRequest(run=run), "rounds"))
    columns = [
        ("round", lambda r: str(r.number)),
        ("phase", lambda r: r.phase),
        ("attempt", lambda r: str(r.attempt)),
        ("updates", _updates),
        ("metrics", lambda r: "  ".join(f"{k} {v:.4f}" for k, v in sorted(r.metrics.items()))),
        ("down", lambda r: size(r.bytes_down)),
        ("up", lambda r: size(r.bytes_up)),
        ("seconds", _seconds),
        ("opened", lambda r: local(r.opened)),
    ]
    print_list(rounds, columns, as_json=as_json)


@app.command()
def show(
    run: RunName,
    number: Annotated[int, typer.Argument(help="Number of the round, from 1.", min=1)],
    *,
    attempt: Annotated[int | None, typer.Option(min=1, help="Which attempt at it. Default: the newest.")] = None,
    as_json: Json = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Show one round: every task, its fate and why."""

    async def work(admin: Admin) -> pb.Round:
        request = pb.GetRoundRequest(run=run, number=number, attempt=attempt or 0)
        found: pb.Round = (await admin.call(admin.stub.GetRound, request)).round
        return found

    found = with_admin(data_dir, work)
    _show(found, as_json=as_json)


@app.command()
def close(run: RunName, *, as_json: Json = False, data_dir: DataDir = DATA_DIR) -> None:
    """Close the open round now, with the updates that have arrived, if they reach the quorum."""

    async def work(admin: Admin) -> pb.Round:
        found: pb.Round = (await admin.call(admin.stub.CloseRound, pb.CloseRoundRequest(run=run))).round
        return found

    _show(with_admin(data_dir, work), as_json=as_json)


def _show(found: pb.Round, *, as_json: bool) -> None:
    if as_json:
        print_list([found], [], as_json=True)
        return
    attempt = f", attempt {found.attempt}" if found.attempt > 1 else ""
    reason = f", {found.reason}" if found.reason else ""
    typer.echo(f"round {found.number} of {found.run}{attempt}: {found.phase}{reason}")
    columns = [
        ("client", lambda t: t.client),
        ("task", lambda t: t.kind),
        ("state", lambda t: enum_name(types_pb2.TaskState.Name(t.state))),
        ("attempt", lambda t: str(t.attempt)),
        ("examples", lambda t: str(t.num_examples)),
        ("steps", _steps),
        ("compute", lambda t: f"{t.compute_seconds:.2f} s"),
        ("speed", lambda t: speed(_speed(t))),
        ("cut by", lambda t: t.cut),
        ("metrics", lambda t: "  ".join(f"{k} {v:.4f}" for k, v in sorted(t.metrics.items()))),
        ("reason", lambda t: f"{t.reason} {t.message}".strip()),
    ]
    print_list(found.tasks, columns, as_json=False)


def _steps(t: pb.TaskRecord) -> str:
    return f"{t.steps} of {t.given_steps}" if t.given_steps and t.kind == "train" else str(t.steps)


def _speed(t: pb.TaskRecord) -> pb.Speed:
    if t.kind != "train" or not t.compute_seconds:
        return pb.Speed()
    return pb.Speed(
        steps_per_second=t.steps / t.compute_seconds, examples_per_second=t.examples_seen / t.compute_seconds
    )


def _updates(r: pb.Round) -> str:
    train = [t for t in r.tasks if t.kind == "train"]
    accepted = sum(t.state == types_pb2.TASK_STATE_ACCEPTED for t in train)
    return f"{accepted} of {len({t.client for t in train})}"


def _seconds(r: pb.Round) -> str:
    return f"{(r.closed.ToMilliseconds() - r.opened.ToMilliseconds()) / 1000:.2f}" if r.closed.seconds else ""
