"""What users and other programs rely on: changing a line here is changing the product, so say it in CHANGELOG.md."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import typer.main

import fedclient.cli
import fedserver.cli
from fedlink.errors import Reason

COMMANDS = {
    "fedserver certificate authority": "--name DIRECTORY",
    "fedserver certificate revoke": "DIRECTORY NAME",
    "fedserver certificate server": "--days DIRECTORY HOSTS",
    "fedserver certificate site": "--days DIRECTORY NAMES",
    "fedserver client add": "--data-dir --rotate NAME",
    "fedserver client list": "--data-dir --json",
    "fedserver client show": "--data-dir --json NAME",
    "fedserver client revoke": "--data-dir NAME",
    "fedserver drain": "--data-dir --json --timeout",
    "fedserver health": "--data-dir --json",
    "fedserver model export": "--base --data-dir --json --merge DIRECTORY NAME",
    "fedserver model import": "--buffer --data-dir --drop --frozen --json --name SOURCE",
    "fedserver model list": "--data-dir --json",
    "fedserver model pin": "--data-dir NAME",
    "fedserver model unpin": "--data-dir NAME",
    "fedserver model verify": "--data-dir --json NAME",
    "fedserver plan": "--clients --data-dir --json --link --model --server-link FILE",
    "fedserver round close": "--data-dir --json RUN",
    "fedserver round list": "--data-dir --json RUN",
    "fedserver round show": "--attempt --data-dir --json NUMBER RUN",
    "fedserver run create": "--data-dir --follow --from --json --model --name FILE",
    "fedserver run extend": "--data-dir --follow --json --rounds RUN",
    "fedserver run list": "--data-dir --json",
    "fedserver run pause": "--data-dir --json RUN",
    "fedserver run resume": "--data-dir --json RUN",
    "fedserver run show": "--data-dir --json RUN",
    "fedserver run stop": "--data-dir --json RUN",
    "fedserver run watch": "--data-dir --json RUN",
    "fedserver run why": "--data-dir --json RUN",
    "fedserver serve": "--config --data-dir --insecure --lease-term --listen --log-level",
    "fedclient health": "--config --json",
    "fedclient doctor": "--config --json --skip-training-step",
    "fedclient init-model": "--config --json --output --seed --weights -o WORKLOAD",
    "fedclient join": "--config --node WORKLOAD",
    "fedclient start": "--config --insecure --log-level",
    "fedclient train-local": "--config --json --model --output --settings -o",
}
"""Options and arguments of every command."""
REASONS = {
    "BAD_CREDENTIALS": "UNAUTHENTICATED",
    "TLS_REFUSED": "UNAVAILABLE",
    "PROXY_REFUSED": "UNAVAILABLE",
    "SESSION_UNKNOWN": "UNAUTHENTICATED",
    "SESSION_REPLACED": "ABORTED",
    "NOT_AN_OPERATOR": "PERMISSION_DENIED",
    "CLIENT_TOO_OLD": "FAILED_PRECONDITION",
    "CLIENT_TOO_NEW": "FAILED_PRECONDITION",
    "BAD_REGISTRATION": "INVALID_ARGUMENT",
    "TASK_NOT_FOUND": "NOT_FOUND",
    "ROUND_CLOSED": "FAILED_PRECONDITION",
    "TASK_COMPLETED": "FAILED_PRECONDITION",
    "WRONG_RESULT": "INVALID_ARGUMENT",
    "BAD_MANIFEST": "INVALID_ARGUMENT",
    "TENSOR_MISSING": "INVALID_ARGUMENT",
    "TENSOR_UNEXPECTED": "INVALID_ARGUMENT",
    "SHAPE_MISMATCH": "INVALID_ARGUMENT",
    "DTYPE_MISMATCH": "INVALID_ARGUMENT",
    "NOT_FINITE": "INVALID_ARGUMENT",
    "NO_EXAMPLES": "INVALID_ARGUMENT",
    "BLOB_NOT_FOUND": "NOT_FOUND",
    "BLOB_MISSING": "FAILED_PRECONDITION",
    "BLOB_CORRUPT": "DATA_LOSS",
    "UPLOAD_NOT_FOUND": "NOT_FOUND",
    "UPLOAD_SUPERSEDED": "ABORTED",
    "OFFSET_MISMATCH": "OUT_OF_RANGE",
    "CHUNK_CORRUPT": "DATA_LOSS",
    "CHUNK_SIZE": "INVALID_ARGUMENT",
    "DIGEST_MISMATCH": "INVALID_ARGUMENT",
    "TOO_LARGE": "INVALID_ARGUMENT",
    "BAD_RUN": "INVALID_ARGUMENT",
    "BAD_NAME": "INVALID_ARGUMENT",
    "BAD_PAGE": "INVALID_ARGUMENT",
    "RUN_NOT_FOUND": "NOT_FOUND",
    "RUN_EXISTS": "ALREADY_EXISTS",
    "RUN_STATE": "FAILED_PRECONDITION",
    "BELOW_QUORUM": "FAILED_PRECONDITION",
    "ROUND_NOT_FOUND": "NOT_FOUND",
    "MODEL_NOT_FOUND": "NOT_FOUND",
    "MODEL_EXISTS": "ALREADY_EXISTS",
    "CLIENT_NOT_FOUND": "NOT_FOUND",
    "CLIENT_EXISTS": "ALREADY_EXISTS",
    "CLIENT_REVOKED": "FAILED_PRECONDITION",
    "BUSY": "RESOURCE_EXHAUSTED",
    "DISK_FULL": "RESOURCE_EXHAUSTED",
    "DISK_UNWRITABLE": "UNAVAILABLE",
    "DRAINING": "UNAVAILABLE",
    "INTERNAL": "INTERNAL",
    "UNREACHABLE": "UNAVAILABLE",
    "UNKNOWN": "UNKNOWN",
    "BAD_CONFIG": "INVALID_ARGUMENT",
    "FAILED": "INTERNAL",
}
"""Status of every reason on the wire."""


def commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    below = getattr(command, "commands", None)
    if below:
        for name, each in below.items():
            yield from commands(each, (*path, name))
        return
    words = [w for p in command.params for w in (p.opts if p.param_type_name == "option" else [p.name.upper()])]
    yield " ".join(path), " ".join(sorted(w for w in words if w != "--help"))


def test_commands_and_their_options():
    found: dict[str, str] = {}
    for name, app in (("fedserver", fedserver.cli.app), ("fedclient", fedclient.cli.app)):
        found |= dict(commands(typer.main.get_command(app), (name,)))
    assert found == COMMANDS


def test_a_command_imports_little():
    """Half a second a command is what an operator's script and a container's health check would pay."""
    heavy = ("numpy", "sqlalchemy", "fedclient.agent", "fedclient.checks", "fedclient.local")
    # `fedclient health` looks into the daemon's spool, which knows numpy.
    for cli, allowed in (("fedserver.cli", []), ("fedclient.cli", ["numpy"])):
        code = f"import sys, {cli}; print(*[m for m in {heavy} if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == allowed


def test_reasons_and_their_status():
    assert {r.name: r.status for r in Reason} == REASONS
