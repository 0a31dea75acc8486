"""`fedserver model`: starting weights in, results out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from fedlink.errors import FedlinkError, Reason
from fedlink.v1 import admin_service_pb2 as pb
from fedserver.cli.output import DATA_DIR, DataDir, Json, local, print_list, print_one, with_admin
from fedserver.remote import Admin
from fedserver.rounds.wording import size

app = typer.Typer(no_args_is_help=True)

Version = Annotated[str, typer.Argument(metavar="RUN@VERSION", help="A version of a run.")]


@app.command("import")
def import_model(
    source: Annotated[
        Path, typer.Argument(help="A .safetensors file, or a directory as transformers or peft saves one.")
    ],
    name: Annotated[str | None, typer.Option(help="Name of the model. Default: the file's or directory's.")] = None,
    buffer: Annotated[
        list[str] | None, typer.Option(help="Pattern of tensors that are buffers, e.g. '*.running_*'.")
    ] = None,
    frozen: Annotated[list[str] | None, typer.Option(help="Pattern of tensors that never change.")] = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="Pattern of tensors to leave out, e.g. '*.position_ids'.")
    ] = None,
    *,
    as_json: Json = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Bring weights to the server; an interrupted import goes on where it was."""
    model_name = name or source.resolve().name.removesuffix(".safetensors")
    with _progress("sending") as progress:
        bar = progress.add_task(model_name, total=None)

        async def work(admin: Admin) -> pb.Model:
            return await admin.import_model(
                source,
                model_name,
                buffers=buffer or (),
                frozen=frozen or (),
                dropped=drop or (),
                progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )

        model = with_admin(data_dir, work)
    print_one(
        model, [("model", model.name), ("size", size(model.size)), ("tensors", str(model.tensors))], as_json=as_json
    )


@app.command("list")
def list_models(*, as_json: Json = False, data_dir: DataDir = DATA_DIR) -> None:
    """List imported models and the versions kept of every run."""
    models = with_admin(data_dir, lambda a: a.pages(a.stub.ListModels, pb.ListModelsRequest(), "models"))
    columns = [
        ("model", lambda m: m.name),
        ("size", lambda m: size(m.size)),
        ("tensors", lambda m: str(m.tensors)),
        ("metrics", lambda m: "  ".join(f"{k} {v:.4f}" for k, v in sorted(m.metrics.items()))),
        ("best", lambda m: "best" if m.best else ""),
        ("pinned", lambda m: "pinned" if m.pinned else ""),
        ("created", lambda m: local(m.created)),
    ]
    print_list(models, columns, as_json=as_json)


@app.command()
def export(
    name: Annotated[
        str, typer.Argument(metavar="RUN[@VERSION]", help="RUN's newest version, RUN@VERSION, or a model.")
    ],
    directory: Annotated[Path, typer.Argument(help="Where to write the weights and the files beside them.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge a LoRA adapter into its base: a whole model.")] = False,
    base: Annotated[Path | None, typer.Option(help="With --merge: a directory with the adapter's base.")] = None,
    *,
    as_json: Json = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Write a model to a directory: safetensors, and the config and tokenizer files that were imported with it."""
    if merge != (base is not None):
        raise FedlinkError(Reason.BAD_CONFIG, "--merge needs --base, the directory of the adapter's base, and only it")
    with _progress("fetching") as progress:
        bar = progress.add_task(name, total=None)

        async def work(admin: Admin) -> tuple[pb.Model, list[Path]]:
            return await admin.export_model(
                name,
                directory,
                merge_into=base,
                progress=lambda done, total: progress.update(bar, completed=done, total=total),
            )

        model, files = with_admin(data_dir, work)
    print_one(model, [("model", model.name), *(("file", str(f)) for f in files)], as_json=as_json)


@app.command()
def pin(name: Version, *, data_dir: DataDir = DATA_DIR) -> None:
    """Keep a version, whatever its run's retention says."""
    with_admin(data_dir, lambda a: a.call(a.stub.PinModel, pb.PinModelRequest(name=name)))
    typer.echo(f"{name} is kept until `fedserver model unpin {name}`")


@app.command()
def unpin(name: Version, *, data_dir: DataDir = DATA_DIR) -> None:
    """Leave a version to its run's retention, which may delete it at once."""
    answer = with_admin(data_dir, lambda a: a.call(a.stub.UnpinModel, pb.UnpinModelRequest(name=name)))
    what = "its run's retention keeps it for now" if answer.kept else "it is deleted, for its run's retention ends"
    typer.echo(f"{name} is not pinned; {what}")


@app.command()
def verify(
    name: Annotated[
        str, typer.Argument(metavar="[RUN[@VERSION]]", help="A model or version. Default: every one there is.")
    ] = "",
    *,
    as_json: Json = False,
    data_dir: DataDir = DATA_DIR,
) -> None:
    """Hash the stored files again on the server, and name those that are damaged; exit code 1 if there are any."""
    files: list[pb.VerifyModelsResponse] = []

    async def work(admin: Admin) -> None:
        async for found in admin.stream(admin.stub.VerifyModels, pb.VerifyModelsRequest(name=name)):
            if not as_json:
                _tell(files, found)
            files.append(found)

    with_admin(data_dir, work)
    if as_json:
        print_list(files, [], as_json=True)
    else:
        _tell(files, None)
    damaged = sum(bool(f.damage) for f in files)
    if damaged:
        raise FedlinkError(Reason.FAILED, f"{damaged} of {len(files)} files are damaged")
    if not as_json:
        typer.echo(f"{len(files)} files of {len({f.model for f in files})} models are as they were stored")


def _tell(before: Sequence[pb.VerifyModelsResponse], found: pb.VerifyModelsResponse | None) -> None:
    """Say what a look has found, a line for each damaged file, and one for each model when it is through with it."""
    model = before[-1].model if before else ""
    if model and (found is None or found.model != model):
        damages = [f.damage for f in before if f.model == model]
        good = damages.count("")
        of_them = "" if good == len(damages) else f" of {len(damages)}"
        typer.echo(f"{model}  {good}{of_them} files are as they were stored")
    if found is not None and found.damage:
        typer.echo(f"{found.model}  {found.file}  {found.damage}")


def _progress(what: str) -> Progress:
    columns = (TextColumn(what + " {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    # Where there is no terminal it would leave an empty line before what goes wrong.
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
