"""The commands `fedclient train-local` and `fedclient init-model`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedclient.settings import load_site
from fedlink.config import load_toml
from fedlink.run_file import RunSpec

if TYPE_CHECKING:
    from fedclient.local import LocalRun, LocalVersion

Config = Annotated[Path, typer.Option(help="The site's site.toml.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def train_local(
    settings: Annotated[Path, typer.Option(help="The run file: rounds, seed, strategy, settings.")],
    config: Config = Path("site.toml"),
    model: Annotated[Path | None, typer.Option(help="Start from this .safetensors file or model directory.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the last version here.")] = None,
    *,
    as_json: Json = False,
) -> None:
    """Run a run file at this site alone, without a server.

    The last line printed is `result {json}`.
    """
    # What needs numpy is imported here and below, so that the other commands start quickly.
    from fedclient import local  # noqa: PLC0415

    spec = RunSpec.checked(load_toml(settings), str(settings))

    def show(version: LocalVersion) -> None:
        if not as_json:
            typer.echo(_line(version, spec.rounds))

    def found(values: Mapping[str, float]) -> None:
        if not as_json:
            typer.echo(f"measured {', '.join(f'{name} {value:g}' for name, value in sorted(values.items()))}")

    running = local.train_local(load_site(config), spec, model=model, output=output, on_version=show, on_found=found)
    run = asyncio.run(running)
    text = json.dumps(_record(run))
    typer.echo(text if as_json else f"result {text}")


def init_model(
    workload: Annotated[str, typer.Argument(help="A [workload.NAME] of site.toml.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .safetensors file, or the directory, to write.")],
    config: Config = Path("site.toml"),
    seed: Annotated[int, typer.Option(help="Seeds the generators just before the model is built.", min=0)] = 0,
    weights: Annotated[
        Path | None,
        typer.Option(help="Take the values from this .safetensors file, or directory of a model or an adapter."),
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Write the model that a workload's class builds, to start a run from."""
    from fedclient import local  # noqa: PLC0415 - as above

    path = asyncio.run(local.init_model(load_site(config), workload, output, seed, weights=weights))
    if as_json:
        typer.echo(json.dumps({"workload": workload, "seed": seed, "path": str(path)}))
    else:
        typer.echo(f"{path} written; give it to the server with: fedserver model import {path}")


def _line(version: LocalVersion, rounds: int) -> str:
    parts = [f"version {version.version}/{rounds}"]
    # What a site's data are like is the same in each round, and `fedclient doctor` prints it.
    trained = {name: value for name, value in version.train.items() if not name.startswith("data.")}
    parts += [f"train {name} {value:.5g}" for name, value in sorted(trained.items())]
    parts += [f"{name} {value:.5g}" for name, value in sorted(version.evaluation.items())]
    return "  ".join(parts)


def _record(run: LocalRun) -> dict[str, object]:
    table = asdict(run) | {"model_path": str(run.model_path) if run.model_path else None}
    return table | {"evaluation": dict(run.versions[-1].evaluation)}
