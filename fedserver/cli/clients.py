"""`fedserver client`: credentials of sites."""

from __future__ import annotations

from typing import Annotated

import typer

from fedlink.v1 import admin_service_pb2 as pb
from fedserver.cli.output import DATA_DIR, DataDir, Json, local, print_list, speed, with_admin
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
        ("state", lambda c: "revoked" if c.revoked else "connected" if c.connected else "away"),
        ("admitted", lambda c: "yes" if c.admitted else "no"),
        ("last seen", lambda c: local(c.last_seen)),
        ("workloads", lambda c: ", ".join(c.workloads)),
        ("devices", lambda c: ", ".join(d.name for d in c.devices)),
        ("speed", lambda c: "; ".join(f"{s.workload} {speed(s)}" for s in c.speeds)),
        ("fedlink", lambda c: c.software_version),
    ]
    print_list(clients, columns, as_json=as_json)


@app.command()
def revoke(name: Annotated[str, typer.Argument(help="The site's name.")], *, data_dir: DataDir = DATA_DIR) -> None:
    """Refuse a site from now on; its open tasks are revoked."""
    with_admin(data_dir, lambda a: a.call(a.stub.RevokeClient, pb.RevokeClientRequest(name=name)))
    typer.echo(f"client {name} is revoked")
