"""The command line of the server: `fedserver --help`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

import fedlink
from fedlink import command
from fedlink import log as logs
from fedserver.cli import certificates, clients, models, rounds, runs
from fedserver.cli.drain import drain
from fedserver.cli.health import health
from fedserver.cli.plan import plan
from fedserver.settings import load_settings

app = typer.Typer(
    name="fedserver",
    help="The aggregation server of Fedlink: keeps the global model and runs the rounds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(runs.app, name="run", help="Create, watch and steer runs.")
app.add_typer(rounds.app, name="round", help="See the rounds of a run.")
app.add_typer(clients.app, name="client", help="Give sites credentials, and take them away.")
app.add_typer(certificates.app, name="certificate", help="Make certificates, where there is no PKI.")
app.add_typer(models.app, name="model", help="Import starting weights, export results.")
app.command()(drain)
app.command()(health)
app.command()(plan)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedserver {fedlink.__version__} (protocol {fedlink.PROTOCOL_VERSION})")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    config: Annotated[Path | None, typer.Option(help="fedserver.toml; every key has a default.")] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="FEDSERVER_DATA_DIR", help="Database, blobs, spool. Default: ./fedserver-data."),
    ] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT for the sites. Default: 127.0.0.1:8470.")] = None,
    *,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Serve another address than loopback without TLS.")
    ] = None,
    lease_term: Annotated[
        str | None, typer.Option(help='Time without a sign until a site is away. Default: "30s".')
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Run the server until it is told to stop (SIGTERM, Ctrl-C)."""
    overrides = {
        "data_dir": data_dir,
        "listen": listen,
        "insecure": insecure,
        "lease_term": lease_term,
        "log_level": log_level,
    }
    settings = load_settings(config, overrides)
    logs.setup(settings.log_level)
    # What only a server needs is imported here, so that the other commands start quickly.
    from fedserver.app import serve as run_server  # noqa: PLC0415

    asyncio.run(run_server(settings))


def main() -> None:
    """Entry point of `fedserver`."""
    command.run(app, "fedserver")
