"""`fedserver client`: credentials of sites."""

from __future__ import annotations

from typing import Annotated

import typer

from fedlink.errors import FedlinkError, Reason
from fedlink.v1 import admin_service_pb2 as pb
from fedserver.cli.output import DATA_DIR, DataDir, Json, local, print_list, print_one, speed, with_admin
from fedserver.remote import Admin

app = typer.Typer(no_args_is_help=True)


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="The site's name, as in its site.toml.")],
    *,
    rotate: Annotated[bool, typer.Option("--rotate", help="Replace the token it has, or un-revoke it.")] = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Admit a site; prints its token, this once, unless sites prove themselves by certificate."""

    async def work(admin: Admin) -> str:
        response = await admin.call(admin.stub.AddClient, pb.AddClientRequest(name=name, rotate=rotate))
        return str(response.token)

    token = with_admin(data_dir, work)
    if not token:
        typer.echo(f"client {name} is admitted with a certificate whose common name is {name}")
        return
    typer.echo(token)
    typer.echo(f"Put this token into {name}'s token_file (mode 600); it is not shown again.", err=True)


@app.command("list")
def list_clients(*, as_json: Json = False, data_dir: DataDir = DATA_DIR) -> None:
    """List the sites known."""
    clients = with_admin(data_dir, lambda a: a.pages(a.stub.ListClients, pb.ListClientsRequest(), "clients"))
    columns = [
        ("client", lambda c: c.name),
        ("state", _state),
        ("admitted", lambda c: "yes" if c.admitted else "no"),
        ("last seen", lambda c: local(c.last_seen)),
        ("workloads", lambda c: ", ".join(c.workloads)),
        ("devices", lambda c: ", ".join(d.name for d in c.devices)),
        ("speed", lambda c: "; ".join(f"{s.workload} {speed(s)}" for s in c.speeds)),
        ("fedlink", lambda c: c.software_version),
    ]
    print_list(clients, columns, as_json=as_json)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="The site's name.")],
    *,
    as_json: Json = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Show one site, and how fast it trains each workload."""
    clients = with_admin(data_dir, lambda a: a.pages(a.stub.ListClients, pb.ListClientsRequest(), "clients"))
    found: pb.Client | None = next((c for c in clients if c.name == name), None)
    if found is None:
        raise FedlinkError(Reason.CLIENT_NOT_FOUND, f"there is no client {name!r}; see `fedserver client list`")
    lines = [
        ("client", found.name),
        ("state", _state(found)),
        ("admitted", "yes" if found.admitted else "no"),
        ("last seen", local(found.last_seen)),
        ("workloads", ", ".join(found.workloads)),
        ("devices", ", ".join(d.name for d in found.devices)),
        ("fedlink", found.software_version),
        *((f"speed of {s.workload}", f"{speed(s)}, median of {s.trainings}") for s in found.speeds),
    ]
    print_one(found, lines, as_json=as_json)


@app.command()
def revoke(name: Annotated[str, typer.Argument(help="The site's name.")], *, data_dir: DataDir = DATA_DIR) -> None:
    """Refuse a site from now on; its open tasks are revoked."""
    with_admin(data_dir, lambda a: a.call(a.stub.RevokeClient, pb.RevokeClientRequest(name=name)))
    typer.echo(f"client {name} is revoked")


def _state(c: pb.Client) -> str:
    return "revoked" if c.revoked else "connected" if c.connected else "away"
