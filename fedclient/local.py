"""Training without a server: the same class, the same process, the same draws as in a federation."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedclient.computing import SEARCHES
from fedclient.launch import Description, FailReason, Job, JobKind, Progress, Result, Trainer, TrainerFailed, Write
from fedclient.local_files import (
    LocalModel,
    as_directory,
    check_same_adapter,
    export_model,
    import_model,
    next_version,
)
from fedclient.policy import Terms
from fedclient.settings import SiteSettings
from fedlink.companions import ADAPTER_WEIGHTS
from fedlink.errors import FedlinkError, Reason
from fedlink.run_file import WIRE_DTYPES, RunSpec
from fedlink.settings_schema import check_settings, open_settings

T = TypeVar("T")


@dataclass(frozen=True)
class LocalVersion:
    """One version of a local run; version 0 is where it began."""

    version: int
    train: Mapping[str, float]
    """What training it logged; empty for version 0."""
    evaluation: Mapping[str, float]
    """What the workload measured on it; empty if the run has no evaluation."""
    train_examples: int = 0
    test_examples: int = 0
    steps: int = 0
    seconds: float = 0.0
    """Wall time of the user's training code."""


@dataclass(frozen=True)
class LocalRun:
    """What local training gave."""

    workload: str
    site: str
    rounds: int
    versions: tuple[LocalVersion, ...]
    model_path: Path | None
    """The last version, if it was asked for."""
    best: int | None
    """The version with the best evaluation metric of the run file."""
    measured: Mapping[str, float]
    """What was measured for settings that the run file gives as "auto"."""


async def train_local(
    site: SiteSettings,
    spec: RunSpec,
    *,
    model: Path | None = None,
    output: Path | None = None,
    on_version: Callable[[LocalVersion], None] = lambda _: None,
    on_found: Callable[[Mapping[str, float]], None] = lambda _: None,
) -> LocalRun:
    """Run a run file at this site alone: its rounds, one after the other, each beginning with the last one's weights.

    With `fedsgd` each round is one step against the gradient; with `fedavg` the trained weights are taken as they
    are. `[cohort]` and, for `fedavg`, `[server_optimizer]` have no meaning here and are left out of account.

    Args:
        site: the site.
        spec: the run.
        model: what to start from: a safetensors file, or a directory with one or with shards; by default the class's
            own model at the run's seed.
        output: where to write the last version: one safetensors file, or a directory if files belong beside it.
        on_version: called with each version as it is there.
        on_found: called with what was measured for settings that are "auto", if any are.

    Raises:
        FedlinkError: BAD_CONFIG: the site has no such workload, its class or the model cannot be used; BAD_RUN:
            settings that the class does not take; FAILED: training failed, with the class's own message.
    """
    async with _trainer(site, spec.workload) as (trainer, scratch):
        _check(site, spec, await _failures_named(trainer.describe(), trainer))
        start = (
            model if model is not None else await _failures_named(_init(trainer, scratch / "init", spec.seed), trainer)
        )
        current = await asyncio.to_thread(import_model, start, scratch / "0")
        found, spec = await _failures_named(_measured(site, spec, trainer, current), trainer)
        if found:
            on_found(found)
        run = _Run(site, spec, trainer, scratch)
        versions = [await _failures_named(run.measured(current, 0, None), trainer)]
        on_version(versions[0])
        for number in range(1, spec.rounds + 1):
            current, result = await _failures_named(run.advanced(current, number), trainer)
            versions.append(await _failures_named(run.measured(current, number, result), trainer))
            on_version(versions[-1])
            if spec.stop and _reached(spec, versions[-1], spec.stop.target):
                break
        if output is not None:
            await asyncio.to_thread(export_model, current, output)
    return LocalRun(spec.workload, site.name, len(versions) - 1, tuple(versions), output, _best(spec, versions), found)


async def init_model(
    site: SiteSettings, workload: str, output: Path, seed: int = 0, *, weights: Path | None = None
) -> Path:
    """Write the model that a workload's class builds with a seed.

    It is one safetensors file; a directory, if there are files that belong beside the weights, or a frozen base that
    they stand on.

    Args:
        site: the site.
        workload: which one.
        output: where it goes.
        seed: what the class draws from.
        weights: a safetensors file or a directory whose values the tensors get, instead of those drawn: an adapter
            that peft saved elsewhere, for example.

    Raises:
        FedlinkError: BAD_CONFIG: no such workload, its class cannot be used, a directory is called like a file, or
            the weights are none or for another adapter; FAILED: building it failed, or the weights do not fit.
    """
    async with _trainer(site, workload) as (trainer, scratch):
        given = await asyncio.to_thread(import_model, weights, scratch / "given") if weights else None
        try:
            start = await _failures_named(_init(trainer, scratch / "init", seed, given), trainer)
        except FedlinkError:
            if weights:  # A rank that differs is said plainer by the two configurations than by a tensor's shape.
                drawn = await _failures_named(_init(trainer, scratch / "drawn", seed), trainer)
                check_same_adapter(weights, drawn, workload)
            raise
        if weights:
            check_same_adapter(weights, start, workload)
        await asyncio.to_thread(_move, start, output)
    return output


class _Run:
    def __init__(self, site: SiteSettings, spec: RunSpec, trainer: Trainer, scratch: Path) -> None:
        self._site = site
        self._spec = spec
        self._trainer = trainer
        self._scratch = scratch

    async def advanced(self, model: LocalModel, number: int) -> tuple[LocalModel, Result]:
        """The version after `model`, and what training it gave."""
        gradient = self._spec.strategy == "fedsgd"
        out = self._scratch / f"out-{number}"
        out.mkdir()
        result = await self._do(
            JobKind.TRAIN, model, number, out, Write.GRADIENT if gradient else Write.WEIGHTS, version=number - 1
        )
        rate = self._spec.server_optimizer.learning_rate if gradient else None
        fresh = await asyncio.to_thread(next_version, model, result.files, self._scratch / str(number), rate)
        await asyncio.to_thread(shutil.rmtree, out)
        await asyncio.to_thread(shutil.rmtree, model.directory)
        return fresh, result

    async def measured(self, model: LocalModel, number: int, trained: Result | None) -> LocalVersion:
        """A version's entry in the record."""
        found: Mapping[str, float] = {}
        examples = 0
        if self._spec.evaluation.enabled and "evaluate" in (await self._trainer.describe()).abilities:
            result = await self._do(JobKind.EVALUATE, model, number, None, Write.WEIGHTS, version=number)
            found, examples = result.metrics, result.num_examples
        if trained is None:
            return LocalVersion(number, {}, found, test_examples=examples)
        return LocalVersion(
            number, trained.metrics, found, trained.num_examples, examples, trained.steps, trained.compute_seconds
        )

    async def _do(
        self, kind: JobKind, model: LocalModel, number: int, out: Path | None, write: Write, *, version: int
    ) -> Result:
        terms = Terms.of(self._spec.workload, self._site.workload[self._spec.workload], await self._trainer.describe())
        job = Job(
            kind,
            settings=self._spec.settings,
            seed=self._spec.seed,
            client=self._site.name,
            run=self._spec.name or self._spec.workload,
            round=number,
            rounds=self._spec.rounds,
            version=version,
            model_dir=model.directory,
            model_key=model.directory.name,
            out_dir=out,
            write=write,
            update_dtype=WIRE_DTYPES[self._spec.update_dtype],
            asked=self._spec.work.limits().table,
            share=self._site.workload[self._spec.workload].share.table,
            limits=terms.limits,
        )
        return await self._trainer.run(job, _unheard)

    async def found(self, model: LocalModel) -> Mapping[str, float]:
        """What is measured for the settings that are "auto"."""
        for attempt in range(SEARCHES + 1):
            try:
                return (await self._do(JobKind.CALIBRATE, model, 0, None, Write.WEIGHTS, version=0)).found
            except TrainerFailed as e:
                if e.reason is not FailReason.CRASHED or attempt == SEARCHES:
                    raise
        raise AssertionError


async def _measured(
    site: SiteSettings, spec: RunSpec, trainer: Trainer, start: LocalModel
) -> tuple[Mapping[str, float], RunSpec]:
    """What this site measures for the settings that are "auto", and the run file with those numbers in it.

    Its own, as of the batch, stay "auto": each training takes what is kept of them.
    """
    terms = Terms.of(spec.workload, site.workload[spec.workload], await trainer.describe())
    if not open_settings(terms.schema, spec.settings):
        return {}, spec
    found = await _Run(site, spec, trainer, start.directory).found(start)
    fixed = {name: value for name, value in found.items() if name not in spec.calibration.own}
    return found, spec.model_copy(update={"settings": {**spec.settings, **fixed}})


@asynccontextmanager
async def _trainer(site: SiteSettings, workload: str) -> AsyncIterator[tuple[Trainer, Path]]:
    if workload not in site.workload:
        offered = ", ".join(site.workload)
        raise FedlinkError(Reason.BAD_CONFIG, f"this site has no workload {workload}; site.toml offers: {offered}")
    home = site.state_dir / "local"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    trainer = Trainer(site, workload, site.devices[0], home)
    try:
        with tempfile.TemporaryDirectory(dir=home, prefix="run-") as scratch:
            yield trainer, Path(scratch)
    finally:
        await trainer.close()


async def _init(trainer: Trainer, out: Path, seed: int, weights: LocalModel | None = None) -> Path:
    """What the class builds: a file, or the directory of several."""
    await asyncio.to_thread(out.mkdir)
    given = weights.directory if weights else None
    result = await trainer.run(Job(JobKind.INIT, seed=seed, model_dir=given, out_dir=out), _unheard)
    alone = len(result.files) == 1 and result.files[0].name != ADAPTER_WEIGHTS
    return result.files[0] if alone else out


def _move(start: Path, output: Path) -> None:
    files, target = ([start], output.parent) if start.is_file() else (list(start.iterdir()), as_directory(output))
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.move(file, output if file is start else target / file.name)


async def _failures_named(doing: Coroutine[Any, Any, T], trainer: Trainer) -> T:
    """Turn a trainer's verdict into an error for the person at the keyboard, who may see the site's own output."""
    try:
        return await doing
    except TrainerFailed as e:
        if e.own_words:
            raise FedlinkError(Reason.FAILED, e.own_words) from None
        said = f" ({e.output.splitlines()[0]})" if e.output else ""
        raise FedlinkError(Reason.FAILED, f"{e.message}{said}; its output is in {trainer.log_path}") from None


def _check(site: SiteSettings, spec: RunSpec, description: Description) -> None:
    terms = Terms.of(spec.workload, site.workload[spec.workload], description)
    if wrong := check_settings(terms.schema, spec.settings):
        raise FedlinkError(Reason.BAD_RUN, f"settings of workload {spec.workload}: {'; '.join(wrong)}")
    needed = "gradient" if spec.strategy == "fedsgd" else "train"
    if needed not in description.abilities:
        raise FedlinkError(
            Reason.BAD_RUN, f"workload {spec.workload} cannot do {needed!r}, which {spec.strategy} needs"
        )


def _reached(spec: RunSpec, version: LocalVersion, target: float) -> bool:
    value = version.evaluation.get(spec.evaluation.metric)
    return value is not None and (value >= target if spec.evaluation.goal == "max" else value <= target)


def _best(spec: RunSpec, versions: list[LocalVersion]) -> int | None:
    sign = 1 if spec.evaluation.goal == "max" else -1
    metric = spec.evaluation.metric
    scored = [v for v in versions if metric in v.evaluation]
    return max(scored, key=lambda v: (sign * v.evaluation[metric], -v.version)).version if scored else None


def _unheard(_: Progress) -> None:
    """Local training shows versions, not steps."""
