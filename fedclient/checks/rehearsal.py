"""Checks "data" and "training-step": the class at work on the site's data, for one step, in its real process."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedclient.aside import off_loop
from fedclient.checks.examination import Examination
from fedclient.checks.finding import Finding, Outcome, failed, ok, skipped, together, warning
from fedclient.checks.readiness import readiness
from fedclient.launch import FailReason, Job, JobKind, Progress, Result, TrainerFailed, Write
from fedclient.local_files import LocalModel, import_model
from fedclient.spool import in_use
from fedclient.text_settings import data_files

EVALUATION_SECONDS = 120.0
"""How long an evaluation may take to say how many examples there are."""

_RUN = "doctor"


async def check_data(visit: Examination) -> Finding:
    """The files that the data tables name are there, and the class can use them; how many examples it says it has."""
    return together([await _data(visit, name) for name in visit.site.workload])


async def check_training_step(visit: Examination) -> Finding:
    """One step with the settings' defaults, from the model that the class builds; nothing is kept."""
    if not visit.train:
        return skipped("not asked for (--skip-training-step)")
    return together([await _step(visit, name) for name in visit.site.workload])


async def _data(visit: Examination, name: str) -> Finding:
    settings = visit.site.workload[name]
    named = data_files(settings.data) if settings.built_in else list(settings.data.items())
    files = await off_loop(_files, name, visit.site.directory, named)
    if files.outcome is Outcome.OK:
        files = together([files, *await _described(visit, name)])
    evaluates = "evaluate" in visit.descriptions[name].abilities and not _undecided(visit, name)
    if files.outcome is Outcome.FAILED or not visit.train or not evaluates:
        return files
    try:
        model = await _built(visit, name)
    except TrainerFailed:
        return together([files, skipped(f"{name}: not used, for its model cannot be built")])
    job = Job(
        JobKind.EVALUATE, client=visit.site.name, run=_RUN, model_dir=model.directory, model_key="start", max_steps=1
    )
    try:
        async with asyncio.timeout(EVALUATION_SECONDS):
            result = await visit.trainer(name).run(job, _unheard)
    except TimeoutError:
        return together(
            [
                files,
                warning(
                    f"{name}: an evaluation had not ended after {EVALUATION_SECONDS:.0f} s and was stopped",
                    "If that is too long, let evaluate loop over ctx.steps, or measure on fewer examples.",
                ),
            ]
        )
    except TrainerFailed as e:
        return together([files, _broken(visit, name, e)])
    finally:
        if len(visit.site.workload) > 1:
            await visit.end_trainer(name)
    counted = f"{name}: evaluated on {result.num_examples} examples"
    if not result.num_examples:
        return together([files, warning(counted, "Look whether its test data are empty.")])
    return together([files, ok(counted)])


async def _described(visit: Examination, name: str) -> list[Finding]:
    try:
        async with asyncio.timeout(EVALUATION_SECONDS):
            result = await visit.trainer(name).run(Job(JobKind.DESCRIBE, client=visit.site.name, run=_RUN), _unheard)
    except TimeoutError:
        return [warning(f"{name}: its data had not been read after {EVALUATION_SECONDS:.0f} s", "Have patience.")]
    except TrainerFailed as e:
        return [_broken(visit, name, e)]
    return [readiness(name, result.data)] if result.data else []


async def _step(visit: Examination, name: str) -> Finding:
    abilities = visit.descriptions[name].abilities
    if not {"train", "gradient"} & set(abilities):
        return skipped(f"{name}: the class only evaluates")
    if missing := _undecided(visit, name):
        advice = "Try it with `fedclient train-local` and the run's settings."
        return skipped(f"{name}: only a run can set {', '.join(missing)}, which has no default", advice)
    try:
        model = await _built(visit, name)
        out = visit.scratch / name / "out"
        await off_loop(_emptied, out)
        job = Job(
            JobKind.TRAIN,
            client=visit.site.name,
            run=_RUN,
            round=1,
            model_dir=model.directory,
            out_dir=out,
            write=Write.DELTA if "train" in abilities else Write.GRADIENT,
            max_steps=1,
            share=visit.site.workload[name].share.table,
        )
        result = await visit.trainer(name).run(job, _unheard)
    except TrainerFailed as e:
        return _broken(visit, name, e)
    finally:
        if len(visit.site.workload) > 1:
            await visit.end_trainer(name)
    return _timed(name, result)


def _timed(name: str, result: Result) -> Finding:
    what = "one step" if result.steps == 1 else f"{result.steps} steps" if result.steps else "a whole training"
    each = f", {result.compute_seconds / result.steps:.3g} s a step" if result.steps > 1 else ""
    memory = f"{result.memory_bytes / 1e6:.0f} MB of memory at most"
    if result.device_memory_bytes:
        memory += f", {result.device_memory_bytes / 1e6:.0f} MB of the device's"
    took = f"{what} in {result.compute_seconds:.3g} s{each}, first-time work included"
    found = f"{name}: {took}; {result.num_examples} examples; {memory}"
    if not result.num_examples:
        return warning(found, "Updates without examples do not count: set ctx.num_examples, or look at the data.")
    return ok(found)


def _broken(visit: Examination, name: str, error: TrainerFailed) -> Finding:
    if error.reason is FailReason.OUT_OF_MEMORY:
        running = "; the running daemon's trainer holds some, too" if in_use(visit.site.state_dir) else ""
        return failed(error.message, f"Use a smaller batch or model, or a device with more memory{running}.")
    if error.own_words:
        return failed(f"{name}: {error.own_words}", "Correct that, or site.toml.")
    # The exception's own words may quote data: they stay in the log.
    return failed(error.message, f"Its own words and the traceback are in {visit.trainer(name).log_path}.")


async def _built(visit: Examination, name: str) -> LocalModel:
    """The model that the class builds.

    Raises:
        TrainerFailed: it cannot.
    """
    if name not in visit.models:
        built = visit.scratch / name / "built"
        await off_loop(_emptied, built)
        result = await visit.trainer(name).run(Job(JobKind.INIT, out_dir=built), _unheard)
        visit.models[name] = await off_loop(import_model, result.files[0], visit.scratch / name / "model")
        await off_loop(shutil.rmtree, built)
    return visit.models[name]


def _undecided(visit: Examination, name: str) -> list[str]:
    return list(visit.descriptions[name].settings_schema.get("required", ()))


def _files(name: str, directory: Path, named: Sequence[tuple[str, Any]]) -> Finding:
    """What in a data table looks like a path, and whether it is there. A free-form one tells no more."""
    there = []
    for key, value in named:
        if not isinstance(value, str) or not value or "://" in value:
            continue
        if (directory / value).exists():
            there.append(key)
        elif "/" in value or Path(value).suffix:
            return warning(
                f"{name}: data.{key} names no file or directory: {directory / value}",
                f"If {key} is meant to be a path, put the data there, or correct it in [workload.{name}.data].",
            )
    return ok(f"{name}: {', '.join(dict.fromkeys(there))} there" if there else f"{name}: its data table names no file")


def _emptied(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700, parents=True)


def _unheard(_: Progress) -> None:
    """A rehearsal is too short to be followed."""
