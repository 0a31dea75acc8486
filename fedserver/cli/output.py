"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table

from fedlink.v1 import admin_service_pb2 as pb
from fedserver.remote import Admin
from fedserver.settings import DEFAULT_DATA_DIR

T = TypeVar("T")

DataDir = Annotated[
    Path, typer.Option("--data-dir", envvar="FEDSERVER_DATA_DIR", help="Data directory of the server to talk to.")
]
"""Option of every command that talks to a server."""
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
"""Option of every command that prints something to read."""
DATA_DIR = DEFAULT_DATA_DIR
"""Default of `DataDir`."""


def with_admin(data_dir: Path, work: Callable[[Admin], Awaitable[T]]) -> T:
    """Run `work` with a connection to the server.

    Raises:
        FedlinkError: UNREACHABLE, or what the server answers.
    """

    async def connected() -> T:
        async with Admin(data_dir) as admin:
            return await work(admin)

    return asyncio.run(connected())


def print_list(
    messages: Sequence[Message], columns: Sequence[tuple[str, Callable[[Any], str]]], *, as_json: bool
) -> None:
    """Print messages as a JSON array, or as a table with these columns."""
    if as_json:
        typer.echo(json.dumps([plain(m) for m in messages], indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, _ in columns:
        table.add_column(title, overflow="fold")
    for m in messages:
        table.add_row(*(value(m) for _, value in columns))
    console().print(table)


def print_one(message: Message, lines: Sequence[tuple[str, str]], *, as_json: bool) -> None:
    """Print a message as a JSON object, or as lines of a title and a text; empty texts are left out."""
    if as_json:
        typer.echo(json.dumps(plain(message), indent=2))
        return
    width = max(len(title) for title, _ in lines)
    for title, text in lines:
        if text:
            typer.echo(f"{title:<{width}}  {text}")


def console() -> Console:
    """Standard output; wide when it is no terminal, so that nothing is folded for a pipe."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=240)


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON values: times in ISO 8601, bytes in hex, enums in lower case without their prefix, every field.

    Fields named *_json are parsed and lose the suffix.
    """
    out: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            out[field.name] = dict(sorted(value.items()))
        elif field.is_repeated:
            out[field.name] = [_plain_value(field, v) for v in value]
        elif field.has_presence and not message.HasField(field.name):
            out[field.name] = None
        elif field.name.endswith("_json"):
            out[field.name.removesuffix("_json")] = json.loads(value or "null")
        else:
            out[field.name] = _plain_value(field, value)
    return out


def _plain_value(field: Any, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return iso(value)
    if isinstance(value, Message):
        return plain(value)
    if isinstance(value, bytes):
        return value.hex()
    if field.enum_type is not None:
        return enum_name(field.enum_type.values_by_number[value].name)
    return value


def enum_name(name: str) -> str:
    """RUN_STATE_ACTIVE as "active", TASK_STATE_PENDING as "pending"."""
    return name.removeprefix("RUN_STATE_").removeprefix("TASK_STATE_").lower()


def iso(time: Timestamp) -> str:
    """A time for programs."""
    return time.ToDatetime(tzinfo=UTC).isoformat(timespec="milliseconds")


def speed(found: pb.Speed) -> str:
    """How fast a site trains, in words; empty if it was never measured."""
    if not found.steps_per_second:
        return ""
    examples = f", {found.examples_per_second:.3g} examples/s" if found.examples_per_second else ""
    return f"{found.steps_per_second:.3g} steps/s{examples}"


def local(time: Timestamp) -> str:
    """A time for people, in their time zone; empty if it is not set."""
    return datetime.fromtimestamp(time.seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S") if time.seconds else ""
