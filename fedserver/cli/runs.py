"""`fedserver run`: create, watch and steer runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fedlink.config import load_toml
from fedlink.errors import FedlinkError, Reason
from fedlink.run_file import RunSpec
from fedlink.v1 import admin_service_pb2 as pb
from fedserver.cli import watch as watching
from fedserver.cli.output import DATA_DIR, DataDir, Json, enum_name, local, print_list, print_one, with_admin
from fedserver.cli.uses import print_speeds, print_uses
from fedserver.remote import Admin

app = typer.Typer(no_args_is_help=True)

RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.")]


@app.command()
def create(
    file: Annotated[Path, typer.Argument(metavar="run.toml", help="The run file; see docs/run-file.md.")],
    name: Annotated[str | None, typer.Option(help="Name of the run, over the file's.")] = None,
    model: Annotated[str | None, typer.Option(help="Starting model, over the file's.")] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="RUN@VERSION", help="Start from a version of another run.")
    ] = None,
    *,
    follow: Annotated[bool, typer.Option("--follow", help="Show the run until it ends.")] = False,
    as_json: Json = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Start a run."""
    if model and start:
        raise FedlinkError(Reason.BAD_CONFIG, "--model and --from both name the starting model; give one")
    spec = read_run_file(file, name=name, model=model or start)

    async def work(admin: Admin) -> None:
        run = await admin.create_run(spec.model_dump_json(exclude_unset=True))
        if not follow:
            _print_run(run, as_json=as_json)
            return
        await _watch(admin, run, as_json=as_json)

    with_admin(data_dir, work)


@app.command("list")
def list_runs(*, as_json: Json = False, data_dir: DataDir = DATA_DIR) -> None:
    """List the runs."""
    runs = with_admin(data_dir, lambda a: a.pages(a.stub.ListRuns, pb.ListRunsRequest(), "runs"))
    columns = [
        ("run", lambda r: r.name),
        ("state", _state),
        ("version", lambda r: f"{r.version} of {r.rounds}"),
        ("best", lambda r: str(r.best_version) if r.HasField("best_version") else ""),
        ("created", lambda r: local(r.created)),
        ("", lambda r: r.waiting or r.reason),
    ]
    print_list(runs, columns, as_json=as_json)


@app.command()
def show(run: RunName, *, as_json: Json = False, data_dir: DataDir = DATA_DIR) -> None:
    """Show a run, what it waits for, and what its newest rounds have used beside what was predicted."""
    found = with_admin(data_dir, lambda a: _get(a, run))
    _print_run(found, as_json=as_json)
    if not as_json:
        print_uses(found)
        print_speeds(found)


@app.command()
def why(run: RunName, *, as_json: Json = False, data_dir: DataDir = DATA_DIR) -> None:
    """Say in one sentence what a run waits for: on whom, since when, how far they are, what will end it."""

    async def work(admin: Admin) -> pb.ExplainRunResponse:
        found: pb.ExplainRunResponse = await admin.call(admin.stub.ExplainRun, pb.ExplainRunRequest(run=run))
        return found

    found = with_admin(data_dir, work)
    print_one(found, [(f"run {found.run}:", found.waiting)], as_json=as_json)


@app.command()
def watch(run: RunName, *, as_json: Json = False, data_dir: DataDir = DATA_DIR) -> None:
    """Show a run from its first event until it ends; reattaches when the connection is lost."""

    async def work(admin: Admin) -> None:
        await _watch(admin, await _get(admin, run), as_json=as_json)

    with_admin(data_dir, work)


@app.command()
def pause(run: RunName, *, as_json: Json = False, data_dir: DataDir = DATA_DIR) -> None:
    """Let the open round finish and open no further one."""
    _steer(data_dir, lambda a: a.call(a.stub.PauseRun, pb.PauseRunRequest(run=run)), as_json=as_json)


@app.command()
def resume(run: RunName, *, as_json: Json = False, data_dir: DataDir = DATA_DIR) -> None:
    """Go on with a paused run."""
    _steer(data_dir, lambda a: a.call(a.stub.ResumeRun, pb.ResumeRunRequest(run=run)), as_json=as_json)


@app.command()
def stop(run: RunName, *, as_json: Json = False, data_dir: DataDir = DATA_DIR) -> None:
    """End a run now; every committed version stays."""
    _steer(data_dir, lambda a: a.call(a.stub.StopRun, pb.StopRunRequest(run=run)), as_json=as_json)


@app.command()
def extend(
    run: RunName,
    rounds: Annotated[int, typer.Option(min=1, help="How many rounds to add.")],
    *,
    follow: Annotated[bool, typer.Option("--follow", help="Show the run until it ends.")] = False,
    as_json: Json = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Add rounds to a run; one that has ended goes on from its newest version."""

    async def work(admin: Admin) -> None:
        before = await _get(admin, run)
        # A run that ended early goes on for so many rounds, not for those it was once meant to have.
        done = before.version if before.HasField("ended") else before.rounds
        request = pb.ExtendRunRequest(run=run, rounds=done + rounds)
        after: pb.Run = (await admin.call(admin.stub.ExtendRun, request)).run
        if follow:
            await _watch(admin, after, as_json=as_json)
        else:
            _print_run(after, as_json=as_json)

    with_admin(data_dir, work)


def read_run_file(file: Path, **over: str | None) -> RunSpec:
    """A run file, and what the command line says over its keys.

    Raises:
        FedlinkError: BAD_CONFIG.
    """
    table: dict[str, Any] = load_toml(file)
    return RunSpec.checked(table | {k: v for k, v in over.items() if v}, str(file))


async def _get(admin: Admin, run: str) -> pb.Run:
    found: pb.Run = (await admin.call(admin.stub.GetRun, pb.GetRunRequest(run=run))).run
    return found


def _steer(data_dir: Path, call: Callable[[Admin], Any], *, as_json: bool) -> None:
    _print_run(with_admin(data_dir, call).run, as_json=as_json)


async def _watch(admin: Admin, run: pb.Run, *, as_json: bool) -> None:
    evaluation = json.loads(run.spec_json)["evaluation"]
    metric = evaluation["metric"] if evaluation["enabled"] else ""
    events = admin.watch(run.name)

    async def waiting() -> str:
        return (await _get(admin, run.name)).waiting

    ended = await (watching.show_json(events) if as_json else watching.show(events, run.name, metric, waiting))
    if not as_json:
        typer.echo(f"run {run.name} {ended.get('state', 'goes on')}: {ended.get('reason', '')}")
    if ended.get("state") in ("failed", "stopped"):
        raise typer.Exit(1)


def _print_run(run: pb.Run, *, as_json: bool) -> None:
    lines = [
        ("run", run.name),
        ("state", _state(run)),
        ("version", f"{run.version} of {run.rounds}"),
        ("best", str(run.best_version) if run.HasField("best_version") else ""),
        *((m.name, _measured(m)) for m in run.measured),
        ("created", local(run.created)),
        ("ended", local(run.ended)),
        ("waiting", run.waiting),
        ("reason", run.reason),
    ]
    print_one(run, lines, as_json=as_json)


def _measured(setting: pb.MeasuredSetting) -> str:
    return watching.measured(setting.value if setting.HasField("value") else None, setting.sites)


def _state(run: pb.Run) -> str:
    return enum_name(pb.RunState.Name(run.state))
