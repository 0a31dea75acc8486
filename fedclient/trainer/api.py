"""What a data scientist writes against: `Workload`, and the `Context` its methods get."""

from __future__ import annotations

import hashlib
import math
import operator
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedclient.trainer.checkpoint import Checkpoints
from fedclient.trainer.course import Course
from fedclient.trainer.loop import Loop
from fedclient.trainer.share import Share
from fedclient.trainer.team import Team
from fedclient.trainer.wire import JobKind, Progress
from fedlink.failpoints import reach

if TYPE_CHECKING:
    import torch

AUTO = "auto"
"""What a run gives for a setting that the site is to measure: see `Workload.calibrate`."""
MAX_METRICS = 64
"""Different metrics one job may log."""
REPORT_EVERY = 0.25
"""Seconds between two progress reports."""


class CancelledJob(BaseException):
    """Ends a job that the daemon no longer wants; not an Exception, so that ordinary handlers let it through."""


@dataclass(frozen=True)
class Bounds:
    """Least and greatest value of a numeric setting: `rate: Annotated[float, Bounds(0, 1)] = 0.1`."""

    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True)
class Site:
    """The site a workload runs at."""

    name: str
    directory: Path
    """Where site.toml lies."""
    data: Mapping[str, Any]
    """`[workload.NAME.data]`, as written."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """`model` and the tables `lora`, `parameters` and `precision` of `[workload.NAME]`, as far as they are there."""
    kept: Path | None = None
    """A directory of this workload's own in the site's state, for what is to outlast the process; made when needed."""

    def path(self, key: str) -> Path:
        """The file or directory that `key` of the data table names, relative to site.toml.

        Raises:
            KeyError: the table has no such key, or it is not a path.
        """
        value = self.data.get(key)
        if not isinstance(value, str):
            raise KeyError(f"[workload.NAME.data] of site.toml needs {key} = a path")
        return self.directory / value


class Workload:
    """One thing a site can train; subclass it and name it in site.toml as `module:Class`.

    An instance lives as long as its process: over many rounds, or for one. Keep data on it if
    you like, but nothing a result depends on: a warm and a fresh process must give the same
    bits. To that end Python's, numpy's and torch's generators are seeded before `build_model`
    (with the run's seed) and before each of the others (with `Context.seed`).
    """

    @dataclass(frozen=True)
    class Settings:
        """What a run may set: replace it by a frozen dataclass with defaults.

        Fields are int, float, bool, str, `Literal[...]`, or `list[...]` or `tuple[..., ...]` of these;
        numbers take limits by `Annotated[float, Bounds(0, 1)]`. A field without a default must be set by the run.
        A number that the class can measure is `float | Literal["auto"]`: see `calibrate`.
        """

    abilities: ClassVar[tuple[str, ...]] = ("train", "gradient", "evaluate", "calibrate")
    """What a class may be able to do; it can do what it overrides."""
    reuses_model: ClassVar[bool] = True
    """Whether a built model is good for several jobs; if not, it is built anew for each."""
    main_thread: queue.SimpleQueue[Callable[[], None]] | None = None
    """Calls that are to be made on the process's main thread; if it is set, the jobs are done on another one."""
    frozen_base: bool = False
    """Parameters that require no gradient are the site's own base: not part of the run's model, only their digests."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def begin_job(self, ctx: Context) -> None:
        """Called before each job that needs the model, before `build_model`; `ctx.device` is not known yet."""

    def end_job(self, *, failed: bool) -> None:
        """Called when such a job is over: what it raises then fails a job that had not failed."""

    def build_model(self) -> Any:
        """Build the model: a `torch.nn.Module` on the CPU, or a dict of numpy arrays by name.

        Called once in a process for each seed; the run's weights are then loaded into it, and it is moved to the
        device. What `state_dict()` holds is the model: parameters that require no gradient are frozen and never sent.
        Import torch at the top of the module: only then is it seeded before the first call.
        """
        raise NotImplementedError

    def tensor_names(self, model: Any) -> Mapping[str, str]:  # noqa: ARG002 - for who overrides it
        """Other names under which tensors of `state_dict()` travel: the name there to the name that travels."""
        return {}

    def model_files(self) -> Mapping[str, bytes]:
        """Small files that belong beside the model's weights, by name; `fedclient init-model` writes them."""
        return {}

    def describe_data(self) -> Mapping[str, Any]:
        """What `fedclient doctor` reports of the site's data, as JSON; by default nothing.

        It stays at the site: the report is printed there.
        """
        return {}

    def train(self, model: Any, ctx: Context) -> None:
        """Train the model in place, looping over `ctx.steps(n)`, and set `ctx.num_examples`."""
        raise NotImplementedError

    def gradient(self, model: Any, ctx: Context) -> Mapping[str, Any] | None:
        """Compute the gradient of the mean loss over all local examples, and set `ctx.num_examples`.

        A torch model keeps it in `.grad`, where `loss.backward()` leaves it (None counts as zero); a numpy workload
        returns a dict with an array for each parameter.
        """
        raise NotImplementedError

    def evaluate(self, model: Any, ctx: Context) -> Mapping[str, float]:
        """Measure the model on held-out examples, and set `ctx.num_examples`; torch tracks no gradients meanwhile."""
        raise NotImplementedError

    def calibrate(self, model: Any, ctx: Context) -> Mapping[str, float]:
        """Measure what the settings should be that are "auto" in `ctx.settings`: a number for each, by name.

        The model has the run's starting weights; it is built anew afterwards. What is found is kept at the site, so
        that this is called once for each starting model and kind of run, and told to the server. `train` and `gradient`
        see the numbers; `evaluate` may still see "auto".
        """
        raise NotImplementedError


class Context:
    """What a job is, and how to report on it.

    Attributes:
        settings: an instance of the workload's `Settings`.
        device: where a torch model lies, as torch names it: "cpu", "cuda:0", "mps".
        seed: 63 bits that differ by run seed, site, round and kind of job.
        client: this site's name at the server.
        run: name of the run.
        round: number of the round, from 1; for an evaluation, of the version.
        rounds: rounds of the whole run, as the server knows it now; 0 if unknown.
        version: version of the run's model that was loaded.
        limits: the bounds of each numeric setting at this site, where there are any: the class's and the owner's.
        measured: names of the settings that the run gave as "auto", and that are numbers now.
        kept: as of `Site`: where a search notes what it tries; None: nothing outlasts the process.
        team: the processes that train together.
    """

    def __init__(
        self,
        *,
        settings: Any,
        device: str = "cpu",
        seed: int = 0,
        client: str = "",
        run: str = "",
        round: int = 0,  # noqa: A002 - the attribute's name
        rounds: int = 0,
        version: int = 0,
        max_steps: int = 0,
        limits: Mapping[str, Bounds] | None = None,
        measured: frozenset[str] = frozenset(),
        kept: Path | None = None,
        report: Callable[[Progress], None] = lambda _: None,
        cancelled: Callable[[], bool] = lambda: False,
        team: Team | None = None,
    ) -> None:
        self.team = team or Team()
        self.settings = settings
        self.device = device
        self.seed = seed
        self.client = client
        self.run = run
        self.round = round
        self.rounds = rounds
        self.version = version
        self._num_examples: int | None = None
        self._counted = False
        self._share = self._expected = Share()
        self._in_parts = False
        self._saw: int | None = None
        self.limits = limits or {}
        self.measured = measured
        self.kept = kept
        self._max_steps = max_steps
        self._report = report
        self._cancelled = cancelled
        self._reported = -math.inf
        self._step = 0
        self._total = 0
        self._metrics: dict[str, Any] = {}
        self._course = Course(self)
        self._resumed_at: int | None = None
        self._began = time.monotonic()
        self.earlier_seconds = 0.0
        """Seconds that the training had taken when the checkpoint was taken that it goes on from."""

    def steps(self, n: int) -> Iterator[int]:
        """Yield 0, 1, ..., n - 1: loop over it, one optimizer step (or one batch) in each pass.

        It counts, reports how far the job is, and ends the job when it was cancelled. A pass that lasts longer than
        the site's `stall_after` counts as a hang. May be used several times in a job. A training that was interrupted
        goes on from its last checkpoint here: see `keep`.
        """
        # Each loop by itself: one that came to nothing would leave names unset that the code after it uses.
        n = min(n, self._max_steps) if self._max_steps else n
        with self._course.loop("steps", n) as loop:
            if loop is None:
                return
            self._total += n
            self._share.plan(n, None, self._course.around)
            self._course.begin_steps(loop)
            for i in range(loop.step, n):
                loop.step = i
                if self._over(loop):
                    break
                self._turn(loop)
                reach("trainer.step")
                self._in_parts = False
                yield i
                self._step += 1
        self.alive()

    def batches(
        self, data: Iterable[Any], *, epochs: int = 1, steps: int | None = None, split: bool = True
    ) -> Iterator[Any]:
        """Yield the batches of `data`, each of them a step as in `steps`: so many epochs, or so many steps.

        An interrupted training goes on with the same remaining batches: the epoch is begun again under the random
        state it began with, and what was used already is passed over.

        Args:
            data: a torch `DataLoader`, or anything that can be iterated over once an epoch.
            epochs: how often to go through it.
            steps: how many batches to take in all, instead of `epochs`; begins anew as often as needed.
            split: of several processes, give each its part of every batch; see `share`.

        Raises:
            ValueError: there are no batches to take steps with.
            TypeError: a batch cannot be split.
        """
        length = len(data) if isinstance(data, Sized) else None
        size = steps if steps is not None else None if length is None else epochs * length
        limit = min((n for n in (steps, self._max_steps or None) if n is not None), default=None)
        with self._course.loop("batches", size) as loop:
            if loop is None:
                return
            self._total += size or 0
            self._share.plan(size, length, self._course.around)
            for batch in self._epochs(loop, data, None if steps is not None else epochs, limit):
                reach("trainer.step")
                self._share.hand_out(batch)
                self._in_parts = split and self.world_size > 1
                yield self.share(batch) if split else batch
                self._step += 1
        self.alive()

    def share(self, batch: Any) -> Any:
        """This process' part of a batch, for a loop over `steps`; the batch itself where one process trains.

        The gradient is then that of the mean over the whole batch, if the loss is the mean over the part. A part is
        never empty: if there are fewer examples than processes, some compute one for nothing.

        Raises:
            TypeError: it is none of tensors, arrays, lists, and tuples, lists and dicts of these.
        """
        if self.world_size == 1:
            return batch
        share = self.team.share(batch)
        self.team.weight = share.weight
        return share.part

    @property
    def rank(self) -> int:
        """The number of this process among those that train together, from 0."""
        return self.team.rank

    @property
    def world_size(self) -> int:
        """How many processes train together."""
        return self.team.world_size

    def count_step(self, total: int = 0) -> bool:
        """Say that a step is over of a loop that is none over `steps` or `batches`; whether another may follow.

        Args:
            total: steps of the whole job, if that is known.

        Raises:
            CancelledJob: the job is to end.
        """
        reach("trainer.step")
        if not self._step and total:
            self._share.plan(total, None, ())
        self._step, self._total = self._step + 1, total
        self.alive()
        if self._max_steps and self._step >= self._max_steps:
            return False
        return self._step == total or not self._share.over(self._step, self.seconds)

    def keep(self, **things: Any) -> None:
        """Name what checkpoints hold besides the model: call it before the loop over `steps` or `batches`.

        `ctx.keep(optimizer=optimizer, scheduler=scheduler, average=average)` takes what has `state_dict` and
        `load_state_dict`, generators of torch, numpy and Python, and tensors, arrays, dicts and lists, which are
        restored in place. What `rng` and `generator` hand out, and the global generators, are held anyway.

        Raises:
            TypeError: a thing cannot be kept, or there is something in its state that is no plain data.
        """
        for name, thing in things.items():
            self._course.keep(name, thing)

    def saw(self, examples: int) -> None:
        """Say how many examples a pass uses, where that is not the length of its batch's first tensor.

        Needed in loops over `steps` for a limit on `examples`, and to show examples a second. Of several processes each
        says it of the part that `batches` gave it; where a batch is not split, they all say it of the whole.
        """
        if not self._in_parts:
            self._share.saw(examples)
            return
        # What counts for nothing is an example of another's part. The sum is known when all agree.
        self._saw = (self._saw or 0) + (examples if self.team.weight else 0)

    def agree(self) -> None:
        """Where several processes train, wait for all and take up what the first one knows, as each step does."""
        saw = self.team.agree(self._step, time.monotonic() - self._began, self._saw)
        self._saw = None
        if saw is not None:
            self._share.saw(saw)

    def log(self, **metrics: Any) -> None:
        """Keep the last value of each metric: numbers, or tensors of one element, which are read only when reported.

        Raises:
            ValueError: more than 64 different names, or one longer than 64 characters.
        """
        for name, value in metrics.items():
            if len(name) > 64 or (name not in self._metrics and len(self._metrics) >= MAX_METRICS):
                raise ValueError(f"metric {name[:64]!r}: at most {MAX_METRICS} names of 64 characters may be logged")
            self._metrics[name] = value.detach() if hasattr(value, "detach") else value

    def rng(self, stream: int = 0) -> np.random.Generator:
        """A numpy generator of this job's own; each `stream` draws differently."""
        rng = self._fresh_rng(stream)
        self._course.handed_out(rng)
        return rng

    def generator(self, stream: int = 0) -> torch.Generator:
        """A torch generator (on the CPU) of this job's own; each `stream` draws differently."""
        import torch  # noqa: PLC0415 - only where the workload has brought it

        generator = torch.Generator().manual_seed(int(self._fresh_rng(stream).integers(1 << 63)))
        self._course.handed_out(generator)
        return generator

    @property
    def step(self) -> int:
        """Steps finished so far in this job."""
        return self._step

    @property
    def num_examples(self) -> int | None:
        """Examples used, the weight of the result; set it before you return.

        If the training is cut short of what the run asks for, the weight is reduced by itself, unless this was set
        inside of the loop: then it counts as what was really used. With several processes it is of the whole site.
        """
        return self._num_examples

    @num_examples.setter
    def num_examples(self, value: int | None) -> None:
        self._num_examples = value
        self._counted = self._counted or bool(self._course.depth)

    @property
    def examples_seen(self) -> int:
        """Examples that the loops have handed out so far, or that `saw` named; 0 if that is not known."""
        return self._share.examples

    @property
    def cut(self) -> str:
        """Which limit has ended the training before its loops were over, as "site max_seconds"; empty: none."""
        return self._share.cut

    @property
    def seconds(self) -> float:
        """How long the training has taken so far, with what it took before an interruption.

        Of several processes, the first one's when the step began, so that all decide alike by it.
        """
        return self.earlier_seconds + self.team.clock(time.monotonic() - self._began)

    def expected_steps(self, steps: int, *, epoch: int = 0, examples: int = 0) -> int:
        """How many of `steps` the job's limits leave: for a schedule over the whole run, with `place`.

        In `calibrate`, the limits of a training: those of the site, and those of the run if they are known by then.

        Args:
            steps: what the class would do.
            epoch: steps in a pass over the data.
            examples: in a step.
        """
        share = self._expected
        limits = [steps, share.tightest("steps")]
        if epoch and (epochs := share.tightest("epochs")) is not None:
            limits.append(epochs * epoch)
        if examples and (most := share.tightest("examples")) is not None:
            limits.append(math.ceil(most / examples))
        return min(n for n in limits if n is not None)

    def place(self, steps: int) -> int:
        """Where in `steps` the job is: at its step, or further on where its time will be over before them."""
        budget = self._share.max_seconds
        if budget is None:
            return self._step
        return max(self._step, min(int(steps * self.seconds / budget), steps - 1))

    @property
    def metrics(self) -> dict[str, float]:
        """The last finite value of each metric logged."""
        values = {name: float(value) for name, value in self._metrics.items()}
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def alive(self) -> None:
        """Say that the job goes on, where that takes long outside `steps`.

        Raises:
            CancelledJob: it shall not.
        """
        if self._cancelled():
            raise CancelledJob
        now = time.monotonic()
        if now - self._reported >= REPORT_EVERY:
            self._reported = now
            limit = self._share.tightest("steps")
            total = self._total if limit is None else min(self._total, limit)
            self._report(Progress(self._step, total, self.metrics))

    @property
    def resuming(self) -> bool:
        """Whether the job is on its way to where its checkpoint was taken."""
        return self._course.resuming

    @property
    def unproven(self) -> bool:
        """Whether no step has been finished since a checkpoint was gone on from: what fails may be its fault."""
        return self.resuming or self._step == self._resumed_at

    def note(self, text: str) -> None:
        """Tell the site's owner something, in the daemon's log."""
        self._report(Progress(self._step, self._total, note=text))

    def use_checkpoints(self, checkpoints: Checkpoints) -> None:
        """Go on from the checkpoint that is there, if there is one, and write others; the training begins now."""
        self._course = Course(self, checkpoints)
        self._began = time.monotonic()

    def begin(self, share: Share) -> None:
        """The training begins now, under these limits."""
        self._share = self._expected = share
        self._began = time.monotonic()

    def expect(self, share: Share) -> None:
        """A training under these limits is only measured for: they do not hold for the job itself."""
        self._expected = share

    def take_counts(self) -> dict[str, Any]:
        """What a checkpoint holds of this object."""
        return {
            "step": self._step,
            "total": self._total,
            "metrics": {name: float(value) for name, value in self._metrics.items()},
            "examples": self._num_examples,
            "counted": self._counted,
            "share": self._share.take(),
            "seconds": self.seconds,
        }

    def give_counts(self, counts: Mapping[str, Any]) -> None:
        """Go on from what `take_counts` gave."""
        self._step, self._total, self._metrics = counts["step"], counts["total"], dict(counts["metrics"])
        self._num_examples = counts["examples"]
        # An older release has not written the next two, and knew no limits.
        self._counted = counts.get("counted", False)
        self._share.give(counts.get("share") or self._share.take())
        # What it has taken since it began is counted from here on.
        self.earlier_seconds = counts["seconds"]
        self._resumed_at = self._step
        self.note("resumed from a local checkpoint")

    def counted(self) -> int:
        """`num_examples`, checked, and reduced if the training was cut short.

        Raises:
            ValueError: the workload has not set it, or set something else than a count; a limit could not be kept.
        """
        if self._num_examples is None:
            raise ValueError("ctx.num_examples was not set: it weighs this site's result")
        count = operator.index(self._num_examples)
        if not 0 <= count <= 1 << 53:
            raise ValueError(f"ctx.num_examples is {count}: not a count")
        if self._step:
            self._share.check()
        return self._share.weight(count, self._step, counted=self._counted)

    def _over(self, loop: Loop) -> bool:
        self.agree()
        # Each loop makes a pass, also one that is gone on with: one that came to nothing would leave names unset that
        # the code after it uses.
        if not loop.step or self.unproven:
            return False
        return loop.step != loop.size and self._share.over(self._step, self.seconds)

    def _turn(self, loop: Loop) -> None:
        self.alive()
        self._course.turn(loop)

    def _epochs(self, loop: Loop, data: Iterable[Any], epochs: int | None, limit: int | None) -> Iterator[Any]:
        def goes_on() -> bool:
            return (limit is None or loop.step < limit) and not self._over(loop)

        while (epochs is None or loop.epoch < epochs) and goes_on():
            self.team.same_random(self.device)
            batches = self._course.begin_epoch(loop, data)
            while goes_on():
                self._turn(loop)
                try:
                    batch = next(batches)
                except StopIteration:
                    self._share.epochs += 1
                    break
                yield batch
                loop.step, loop.batch = loop.step + 1, loop.batch + 1
            if epochs is None and not loop.batch:
                raise ValueError("ctx.batches was given no batches to take steps with")
            loop.epoch, loop.batch = loop.epoch + 1, 0

    def _fresh_rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream])


def measured(value: float | str) -> float:
    """The value of a setting that may be "auto", where it has been measured.

    Raises:
        ValueError: it has not.
    """
    if isinstance(value, str):
        raise ValueError(f"a setting is {value!r}: it has to be measured first, or given as a number")  # noqa: TRY004
    return value


def derive_seed(seed: int, client: str, round_: int, kind: JobKind = JobKind.TRAIN) -> int:
    """`Context.seed` of a job: 63 bits of SHA-256 over the run's seed, the site's name, the round and the kind."""
    text = f"{seed}/{client}/{round_}/{kind.value}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
