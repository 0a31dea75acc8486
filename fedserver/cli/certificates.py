"""`fedserver certificate`: an authority in a directory, for those who have no PKI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlink.certificates import certificate_facts
from fedserver.authority import Authority

app = typer.Typer(no_args_is_help=True)
Directory = Annotated[Path, typer.Argument(help="The authority's directory; keep it off the server and the sites.")]
Days = Annotated[int, typer.Option(help="How many days it is good for.", min=1, max=3650)]
DAYS = 365


@app.command()
def authority(
    directory: Directory,
    *,
    name: Annotated[str, typer.Option(help="What the authority calls itself.")] = "Fedlink CA",
) -> None:
    """Make an authority: ca.crt and ca.key, and an empty revoked.crl."""
    made = Authority(directory)
    made.create(name)
    typer.echo(made.certificate)
    typer.echo("Give ca.crt to the server and to every site. ca.key never leaves this directory.", err=True)


@app.command()
def server(
    directory: Directory,
    hosts: Annotated[list[str], typer.Argument(help="Host names and addresses under which sites reach the server.")],
    *,
    days: Days = DAYS,
) -> None:
    """Make the server's certificate and key; a former one is replaced."""
    _say(Authority(directory).issue_server(hosts, days))


@app.command()
def site(
    directory: Directory,
    names: Annotated[list[str], typer.Argument(help="The sites' names, as in their site.toml.")],
    *,
    days: Days = DAYS,
) -> None:
    """Make certificates and keys for sites; former ones are replaced, and stay good until revoked."""
    for name in names:
        _say(Authority(directory).issue_site(name, days))


@app.command()
def revoke(directory: Directory, name: Annotated[str, typer.Argument(help="The site's name.")]) -> None:
    """Take back every certificate a site has got so far; one made afterwards is good.

    They are put on revoked.crl, which the server reads again when it changes (`tls.revoked`).
    """
    own = Authority(directory)
    count = own.revoke(name)
    typer.echo(own.revocations)
    typer.echo(
        f"revoked {count} certificate{'s' if count > 1 else ''} of {name}; copy the list to the server", err=True
    )


def _say(file: Path) -> None:
    typer.echo(file)
    typer.echo(
        f"good until {certificate_facts(file).not_after:%Y-%m-%d}; its key is {file.with_suffix('.key')}", err=True
    )
