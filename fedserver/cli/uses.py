"""What a run's rounds have used beside what was predicted, as `fedserver run show` prints it."""

from __future__ import annotations

from collections.abc import Callable

import typer
from google.protobuf.message import Message

from fedlink.v1 import admin_service_pb2 as pb
from fedserver.cli.output import print_list, speed
from fedserver.rounds.wording import size


def print_speeds(run: pb.Run) -> None:
    """Print a line for each site that has trained the run's workload: how fast it is."""
    if run.speeds:
        columns = [
            ("client", lambda s: s.client),
            ("speed", speed),
            ("median of", lambda s: f"{s.trainings} training{'s' * (s.trainings > 1)}"),
        ]
        typer.echo("")
        print_list(run.speeds, columns, as_json=False)


def print_uses(run: pb.Run) -> None:
    """Print a line for each of the newest rounds; nothing before the first is committed.

    A prediction is for as many sites as took part in the round; there is none for runs of older releases.
    """
    if not run.used:
        return

    def predicted(field: str) -> Callable[[Message], str]:
        return lambda u: size(getattr(u, field)) if u.HasField(field) else ""

    columns = [
        ("round", lambda u: str(u.round)),
        ("sites", lambda u: str(u.clients)),
        ("down", lambda u: size(u.bytes_down)),
        ("predicted", predicted("predicted_bytes_down")),
        ("up", lambda u: size(u.bytes_up)),
        ("predicted", predicted("predicted_bytes_up")),
        ("server disk", lambda u: size(u.server_disk)),
        ("predicted", predicted("predicted_server_disk")),
        ("server memory", lambda u: size(u.server_memory)),
        ("predicted", predicted("predicted_server_memory")),
    ]
    typer.echo("")
    print_list(run.used, columns, as_json=False)
