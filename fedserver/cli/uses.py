"""What a run's rounds have used beside what was predicted, as `fedserver run show` prints it."""

from __future__ import annotations

import typer

from fedlink.v1 import admin_service_pb2 as pb
from fedserver.cli.output import print_list
from fedserver.rounds.wording import size


def print_uses(run: pb.Run) -> None:
    """Print a line for each of the newest rounds; nothing before the first is committed.

    What is moved was predicted for one site, and is compared for as many as took part; what is taken was predicted for
    the sites known when the run was created.
    """
    if not run.used:
        return
    p = run.prediction if run.HasField("prediction") else None
    disk, memory = (size(p.server_disk), size(p.server_memory)) if p else ("", "")
    columns = [
        ("round", lambda u: str(u.round)),
        ("sites", lambda u: str(u.clients)),
        ("down", lambda u: size(u.bytes_down)),
        ("predicted", lambda u: size(u.predicted_bytes_down) if p else ""),
        ("up", lambda u: size(u.bytes_up)),
        ("predicted", lambda u: size(u.predicted_bytes_up) if p else ""),
        ("server disk", lambda u: size(u.server_disk)),
        ("at most", lambda _: disk),
        ("server memory", lambda u: size(u.server_memory)),
        ("about", lambda _: memory),
    ]
    typer.echo("")
    print_list(run.used, columns, as_json=False)
