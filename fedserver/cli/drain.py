"""`fedserver drain`: let the server end by itself, with no work half-done."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError

from fedlink.config import Seconds
from fedlink.errors import FedlinkError, Reason
from fedlink.lock import holder
from fedlink.v1 import admin_service_pb2 as pb
from fedserver.cli.output import DATA_DIR, DataDir, Json, plain, with_admin
from fedserver.remote import Admin

_ASK_SECONDS = 0.5


def drain(
    *,
    timeout: Annotated[
        str | None, typer.Option(help='How long to wait, e.g. "10m"; then the server drains on. Default: for ever.')
    ] = None,
    as_json: Json = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Stop the server once what is under way is finished; nothing new begins meanwhile."""
    deadline = time.monotonic() + _seconds(timeout) if timeout is not None else None

    lock = data_dir / "lock"
    serving = holder(lock)

    async def work(admin: Admin) -> None:
        left: pb.DrainServerResponse | None = await _ask(admin, pb.DrainServerRequest())
        said = None
        while left is not None:
            if left != said:
                typer.echo(json.dumps(plain(left)) if as_json else left.waiting)
                said = left
            if deadline is not None and time.monotonic() >= deadline:
                text = f"the server {left.waiting}; it goes on draining, and `fedserver drain` shows how far it is"
                raise FedlinkError(Reason.FAILED, text)
            await asyncio.sleep(_ASK_SECONDS)
            left = await _look(admin)

    with_admin(data_dir, work)
    # It answers nobody any more; wait until it has put everything away.
    while serving and holder(lock) == serving:
        if deadline is not None and time.monotonic() >= deadline:
            raise FedlinkError(Reason.FAILED, "the server answers nobody any more, and has not put everything away yet")
        time.sleep(_ASK_SECONDS / 5)
    if not as_json:
        typer.echo("the server has ended")


async def _ask(admin: Admin, request: pb.DrainServerRequest) -> pb.DrainServerResponse:
    left: pb.DrainServerResponse = await admin.call(admin.stub.DrainServer, request)
    return left


async def _look(admin: Admin) -> pb.DrainServerResponse | None:
    """How far the server is; None if it has ended, whether or not a supervisor has started another."""
    try:
        left = await _ask(admin, pb.DrainServerRequest(look=True))
    except FedlinkError as e:
        if e.reason not in (Reason.UNREACHABLE, Reason.DRAINING):
            raise
        return None
    return left if left.draining else None


def _seconds(text: str) -> float:
    try:
        return TypeAdapter(Seconds).validate_python(text)
    except ValidationError:
        raise FedlinkError(Reason.BAD_CONFIG, f'--timeout {text!r} is no duration such as "30s" or "10m"') from None
