"""The command `fedclient`.

Exit codes: 0 ok, 1 failed, 2 usage or configuration, 3 unreachable, 4 refused. An error is
one sentence on stderr that says what to do, never a traceback.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import enum
import json
import os
import signal
from pathlib import Path
from typing import Annotated

import typer

import fedlink
from fedclient.doctor import doctor
from fedclient.local_cli import init_model, train_local
from fedclient.patience import Patience
from fedclient.pulse import read_pulse
from fedclient.settings import SiteSettings, load_site
from fedlink import command, log, rpc
from fedlink.corelog import handshakes_explained
from fedlink.errors import EXIT_FAILED


class LogLevel(enum.StrEnum):
    """How much to log."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


app = typer.Typer(
    name="fedclient",
    help="The site's side of Fedlink: trains on data that never leaves this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train-local")(train_local)
app.command("init-model")(init_model)
app.command("doctor")(doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedclient {fedlink.__version__}")
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
def start(
    config: Annotated[Path, typer.Option(help="The site's site.toml.")] = Path("site.toml"),
    log_level: Annotated[LogLevel, typer.Option(help="How much to log.")] = LogLevel.INFO,
    *,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Talk to another address than loopback without TLS.")
    ] = False,
) -> None:
    """Serve as this site until stopped: fetch tasks, train, send updates.

    The first SIGTERM or SIGINT lets uploads finish and hands other work back; the second ends at once.
    """
    log.setup(log_level.value)
    rpc.tune_malloc()
    asyncio.run(_serve(load_site(config, insecure=insecure)))


@app.command()
def join(
    workload: Annotated[str, typer.Argument(help="A [workload.NAME] of site.toml with several nodes.")],
    config: Annotated[Path, typer.Option(help="The site's site.toml.")] = Path("site.toml"),
    node: Annotated[int, typer.Option(help="This machine's number; 0 is where `fedclient start` runs.", min=1)] = 1,
) -> None:
    """Train along with the machine where the daemon runs, until stopped."""
    # It needs what the other commands do without.
    from fedclient import joining  # noqa: PLC0415

    joining.join(load_site(config), workload, node)


@app.command()
def health(
    config: Annotated[Path, typer.Option(help="The site's site.toml.")] = Path("site.toml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whether this site's daemon lives; exit code 0 if so, whether the server can be reached or not."""
    phase = read_pulse(load_site(config).state_dir)
    typer.echo(json.dumps({"phase": phase}) if as_json else phase)


async def _serve(site: SiteSettings, patience: Patience | None = None) -> None:
    # What only the daemon needs is imported here, so that the other commands start quickly.
    from fedclient.agent import Agent  # noqa: PLC0415

    agent = Agent(site, patience=patience)
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            # Trainers see the end of their pipe and go; the journal is good at any instant.
            os._exit(EXIT_FAILED)
        agent.drain()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    if site.client_tls:
        # The session says why, better than the core and once.
        explained = contextlib.ExitStack()
        explained.enter_context(handshakes_explained(lambda _: None))
        atexit.register(_silence, explained)
    await agent.run()


def _silence(explained: contextlib.ExitStack) -> None:
    """Nothing follows the last sentence: the core's threads outlive the interpreter by a handshake or two."""
    explained.close()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def main() -> None:
    """Entry point of `fedclient`."""
    command.run(app, "fedclient")


if __name__ == "__main__":
    main()
