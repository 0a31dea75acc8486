"""`fedserver plan`: what a run will move and take, before it is created."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedlink.config import parse_rate
from fedlink.errors import FedlinkError, Reason
from fedlink.v1 import admin_service_pb2 as pb
from fedserver.cli.output import DATA_DIR, DataDir, Json, console, print_one, with_admin
from fedserver.cli.runs import read_run_file
from fedserver.remote import Admin
from fedserver.rounds.explain import span
from fedserver.rounds.wording import size

_MAX_CLIENTS = 1_000_000


def plan(
    file: Annotated[Path, typer.Argument(metavar="run.toml", help="The run file; see docs/run-file.md.")],
    clients: Annotated[
        int | None,
        typer.Option(min=1, max=_MAX_CLIENTS, help="Sites that could take part. Default: those the server knows."),
    ] = None,
    link: Annotated[str | None, typer.Option(help='Speed of each site\'s line, e.g. "100mbit".')] = None,
    server_link: Annotated[
        str | None, typer.Option(help="Speed of the server's line, which all sites share. Default: wide enough.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Starting model, over the file's.")] = None,
    *,
    as_json: Json = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Say what a run would move and take, at the server and at each site; exit code 1 if it would be refused."""
    spec = read_run_file(file, model=model)
    request = pb.PlanRunRequest(
        spec_json=spec.model_dump_json(exclude_unset=True),
        clients=clients or 0,
        link=_rate("--link", link),
        server_link=_rate("--server-link", server_link),
    )

    async def work(admin: Admin) -> pb.PlanRunResponse:
        found: pb.PlanRunResponse = await admin.call(admin.stub.PlanRun, request)
        return found

    found = with_admin(data_dir, work)
    if not as_json:
        typer.echo(f"{spec.rounds} round{'s' * (spec.rounds != 1)} from {found.model}")
        console().print(_moved(found))
    print_one(found, list(_taken(found)), as_json=as_json)
    if found.refusal:
        raise FedlinkError(Reason.FAILED, found.refusal)


def _rate(option: str, text: str | None) -> int:
    try:
        return parse_rate(text) if text is not None else 0
    except ValueError as e:
        raise FedlinkError(Reason.BAD_CONFIG, f"{option}: {e}") from None


def _moved(found: pb.PlanRunResponse) -> Table:
    """What goes over the lines in a round."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    timed = found.HasField("seconds_up")
    for title in ("", "sites", "each", "in all", *(["time"] if timed else [])):
        table.add_column(title, justify="right" if title else "left")
    p = found.prediction
    for what, sites, nbytes, seconds in (
        ("down, first round", p.fetching, p.bytes_down_first, found.seconds_down_first),
        ("down, each later round", p.fetching, p.bytes_down_later, found.seconds_down_later),
        ("up, each round", p.cohort, p.bytes_up, found.seconds_up),
    ):
        table.add_row(what, str(sites), size(nbytes), size(sites * nbytes), *([_time(seconds)] if timed else []))
    return table


def _taken(found: pb.PlanRunResponse) -> Iterator[tuple[str, str]]:
    """What it takes where."""
    p = found.prediction
    free = f"{size(found.server_disk_free)} are free besides disk_reserve ({size(found.server_disk_reserve)})"
    yield "server disk", f"at most {found.server_disk}; {free}"
    yield "server memory", f"about {size(p.server_memory)}"
    checkpoint = f", checkpoint {size(p.checkpoint)} (two while the next is written)" if p.checkpoint else ""
    parts = f"model {size(p.bytes_down_first)}, update {size(p.bytes_up)}{checkpoint}"
    yield "site disk", f"at most {size(p.site_disk)}: {parts}; what an optimizer keeps is extra"
    trainer = f"trainer {size(p.trainer_memory)}; framework, gradients, optimizer and activations are extra"
    yield "site memory", f"daemon about {size(p.daemon_memory)}; {trainer}"
    if not found.refusal:
        yield "fits", "yes: `fedserver run create` would take it"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else span(seconds)
