"""`fedserver health`: what a container's or a supervisor's health check asks."""

from __future__ import annotations

import asyncio
import json

import typer

from fedlink.errors import FedlinkError, Reason
from fedserver.cli.output import DATA_DIR, DataDir, Json, with_admin
from fedserver.remote import Admin

PATIENCE = 10.0
"""Seconds a server may take to answer; a busy one takes some."""


def health(*, data_dir: DataDir = DATA_DIR, as_json: Json = False) -> None:
    """Say whether the server answers operators and takes connections of sites; exit code 0 if so."""
    try:
        with_admin(data_dir, _answers)
        address = (data_dir / "address").read_text(encoding="ascii").strip()
        asyncio.run(_connect(address))
    except TimeoutError:
        raise FedlinkError(
            Reason.UNREACHABLE, f"the server of {data_dir} does not answer within {PATIENCE:g} s"
        ) from None
    except OSError as e:
        text = f"the server of {data_dir} takes no connections of sites: {e.strerror or e}"
        raise FedlinkError(Reason.UNREACHABLE, text) from None
    typer.echo(json.dumps({"address": address}) if as_json else f"serving sites at {address}")


async def _answers(admin: Admin) -> None:
    async with asyncio.timeout(PATIENCE):
        await admin.healthy()


async def _connect(address: str) -> None:
    """Open and close a connection where sites are served; what is said there needs a site's credentials."""
    host, _, port = address.rpartition(":")
    # A server that listens on every address is asked on this machine's own.
    own = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}  # noqa: S104
    async with asyncio.timeout(PATIENCE):
        _, writer = await asyncio.open_connection(own.get(host, host.strip("[]")), int(port))
        writer.close()
        await writer.wait_closed()
