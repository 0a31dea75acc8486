"""What the built-in workloads share: the model, the data, and the training loop."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy.typing as npt
import torch

from fedclient.trainer.adapters import adapter_file, adapter_names
from fedclient.trainer.api import Bounds, Context, Site, Workload, measured
from fedclient.trainer.options import Autocast, DataOptions, Files, LoraOptions, ParameterOptions, PrecisionOptions
from fedclient.trainer.team import shares_work
from fedclient.trainer.text import lora, optimizers, quantized, schedules
from fedclient.trainer.text.batches import Batch, Numbers, Padding, Steps, counting, in_order_of_length
from fedclient.trainer.text.calibrating import Calibration
from fedclient.trainer.text.compiling import Compiler
from fedclient.trainer.text.corpus import Corpus
from fedclient.trainer.text.keeping import KeptOptimizer
from fedclient.trainer.text.meter import Meter
from fedclient.trainer.text.precision import Precision, weights_dtype
from fedclient.trainer.text.pretrained import (
    Pretrained,
    choose_parameters,
    config_file,
    options_of,
    require,
    usable_length,
)
from fedclient.trainer.text.readiness import as_metrics, described, overlap
from fedclient.trainer.text.rows import DataError

_BASE_SEED = 0


@dataclass(frozen=True)
class FineTuningSettings(Workload.Settings):
    """What a run may set of every built-in workload."""

    epochs: Annotated[int, Bounds(1, 1000)] = 1
    """Passes over the site's data in a round."""
    steps: Annotated[int, Bounds(0)] = 0
    """Optimizer steps in a round, instead of epochs; 0: epochs."""
    batch_size: Annotated[int, Bounds(1)] | Literal["auto"] = 8
    """Examples in a forward pass."""
    accumulation: Annotated[int, Bounds(1)] = 1
    """Forward passes in an optimizer step."""
    effective_batch_size: Annotated[int, Bounds(0)] = 0
    """Examples in an optimizer step, in as many forward passes as that takes; 0: `batch_size` times `accumulation`."""
    optimizer: optimizers.Name = "adamw"
    learning_rate: Annotated[float, Bounds(0)] | Literal["auto"] = 5e-5
    """The highest one of the schedule."""
    schedule: schedules.Name = "cosine"
    """What the rate does after the warm-up, over the whole run."""
    warmup: Annotated[float, Bounds(0, 1)] = 0.03
    """Share of the run's steps over which the rate rises from 0."""
    floor: Annotated[float, Bounds(0, 1)] = 0.1
    """Share of the rate that the schedule ends at."""
    weight_decay: Annotated[float, Bounds(0)] = 0.01
    """Not of biases and norms."""
    momentum: Annotated[float, Bounds(0, 1)] = 0.0
    """Of sgd and rmsprop."""
    beta1: Annotated[float, Bounds(0, 0.9999)] = 0.9
    """Of the Adam family, as `beta2`."""
    beta2: Annotated[float, Bounds(0, 0.999999)] = 0.999
    max_grad_norm: Annotated[float, Bounds(0)] = 1.0
    """Longer gradients are shortened to it; 0: none is."""
    keep_optimizer: bool = False
    """Keep the optimizer's state at the site from round to round, instead of beginning anew."""
    eval_batch_size: Annotated[int, Bounds(1)] = 8
    """Examples in a forward pass of an evaluation."""
    eval_limit: Annotated[int, Bounds(0)] = 0
    """Evaluate so many examples only, the first ones; 0: all."""

    def effective_batch(self, *, measured: bool = False) -> int:
        """Examples in an optimizer step.

        Args:
            measured: the run gave `batch_size` as "auto": it only says how a step is cut.
        """
        size = FineTuningSettings.batch_size if measured else self.batch_size
        return self.effective_batch_size or int(size) * self.accumulation


class FineTuning(Workload):
    """A pretrained transformer, trained whole or by adapters on the site's texts.

    Subclasses say what an example is and what its loss is. Options of site.toml are read here; what they mean for
    the model is in `pretrained` and `lora`.
    """

    kind: ClassVar[str]
    """The class of transformers that makes the model, such as "AutoModelForCausalLM"."""
    task: ClassVar[lora.Task]
    """What peft calls its purpose."""
    new_head: ClassVar[bool] = False
    """Whether the directory may lack what is not the body of the model; it is then drawn from the run's seed."""
    Settings = FineTuningSettings

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        require("transformers", *(["peft"] if site.options.get("lora") is not None else []))
        table = site.options
        self.lora = LoraOptions(**options_of(table, "lora")) if table.get("lora") is not None else None
        self.parameters = ParameterOptions(**options_of(table, "parameters"))
        self.precision = PrecisionOptions(**options_of(table, "precision"))
        if self.precision.quantize != "none":
            require("bitsandbytes", extra=quantized.EXTRA)
        self.frozen_base = self.lora is not None
        self.pretrained = Pretrained(
            site.directory / str(table.get("model", "")), trust_remote_code=bool(table.get("trust_remote_code"))
        )
        self._adapter_file = b""
        self._job: Context | None = None

    def alive(self) -> None:
        """Say that the job under way goes on: data may take long to read.

        Raises:
            CancelledJob: it shall not.
        """
        if self._job is not None:
            self._job.alive()

    @property
    @abstractmethod
    def options(self) -> DataOptions:
        """`[workload.NAME.data]`, with its defaults."""

    @abstractmethod
    def make_config(self) -> Any:
        """The model's configuration."""

    @abstractmethod
    def make_corpus(self, files: Sequence[Path]) -> Corpus:
        """Tokenize some of the site's files."""

    @abstractmethod
    def make_batch(self, corpus: Corpus, numbers: Numbers, padding: Padding) -> Batch:
        """Some examples as tensors."""

    @abstractmethod
    def summed_loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The loss over a batch, summed over what `weights` counts."""

    @abstractmethod
    def weights(self, corpus: Corpus) -> npt.NDArray[Any]:
        """How much each example counts, in the loss and in what the server weighs by."""

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.pretrained.tokenizer()

    @cached_property
    def config(self) -> Any:
        """The model's configuration."""
        return self.make_config()

    @property
    def max_length(self) -> int:
        """Tokens of an example at most."""
        return usable_length(self.options.max_length, self.config, self.tokenizer)

    @cached_property
    def train_corpus(self) -> Corpus:
        """What is learned from; tokenized once in a process.

        Raises:
            DataError: there is nothing in it.
        """
        corpus = self.make_corpus(self._paths(self.options.train))
        if not len(corpus):
            raise DataError("[workload.NAME.data] train of site.toml: there is nothing to learn in these files")
        return corpus

    @cached_property
    def train_weights(self) -> npt.NDArray[Any]:
        """The `weights` of what is learned from."""
        return self.weights(self.train_corpus)

    @cached_property
    def test_corpus(self) -> Corpus | None:
        """What evaluations measure on; None if the site has nothing for it."""
        return self.make_corpus(self._paths(self.options.test)) if self.options.test else None

    @cached_property
    def data_metrics(self) -> Mapping[str, float]:
        """What there is to know of what is learned from, for a site that lets it out."""
        return as_metrics(self.described(self.train_corpus))

    def padding(self, device: str) -> Padding:
        """How batches are made for a device."""
        return Padding(self.pad_token, device)

    @property
    def pad_token(self) -> int:
        """The token that batches are filled up with; what it is does not matter, for it is masked."""
        found = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in found if token is not None), 0)

    def build_model(self) -> Any:
        """See `Workload`."""
        dtype = weights_dtype(self.precision.weights)
        if self.lora is None:
            model = self.pretrained.model(self.kind, self.config, dtype, new_head=self.new_head)
            choose_parameters(model, self.parameters)
            # With a new head it is another kind of model than its directory says.
            self.config.architectures = [type(model).__name__]
        else:
            # The base is the same for every run, whatever its seed: its digests say so.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_BASE_SEED)
                base, lengths = self._base(dtype)
            model = lora.with_adapters(base, self.lora, self.task, lengths)
            self._adapter_file = adapter_file(model, Path(str(self.site.options["model"])).name)
        if self.precision.gradient_checkpointing:
            # What newer and older releases of transformers call it.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            enable = next(getattr(model, name) for name in names if hasattr(model, name))
            enable({"use_reentrant": False})
        return model

    def _base(self, dtype: torch.dtype | str) -> tuple[Any, Mapping[str, torch.Tensor]]:
        """What adapters train on; of what is quantized of it, the lengths of the weights."""
        if self.precision.quantize == "none" or self.lora is None:
            return self.pretrained.model(self.kind, self.config, dtype, new_head=self.new_head), {}
        found = quantized.load(
            self.pretrained,
            self.kind,
            self.config,
            dtype,
            self.precision.quantize,
            new_head=self.new_head,
            spared=self.lora.modules_to_save,
            alive=self.alive,
        )
        return found.model, found.lengths

    def tensor_names(self, model: Any) -> Mapping[str, str]:
        """See `Workload`: with adapters, the names that peft gives them."""
        return adapter_names(model) if self.lora is not None else {}

    def model_files(self) -> Mapping[str, bytes]:
        """See `Workload`: what `from_pretrained` needs besides the weights."""
        if self.lora is not None:
            return {"adapter_config.json": self._adapter_file}
        return {"config.json": config_file(self.config)} | self.pretrained.tokenizer_files()

    def describe_data(self) -> Mapping[str, Any]:
        """See `Workload`: counts, lengths, duplicates."""
        train, test = self.train_corpus, self.test_corpus
        found = {"train": self.described(train)}
        return found | ({"test": self.described(test), "in_both": overlap(train, test)} if test else {})

    def described(self, corpus: Corpus) -> dict[str, Any]:
        """What there is to know of a corpus."""
        return described(corpus, self.max_length)

    def computing(self, model: Any, ctx: Context, autocast: Autocast | None = None) -> Precision:
        """How a job computes; the model is made ready for it.

        Args:
            model: the model, on the job's device.
            ctx: the job.
            autocast: instead of what site.toml says.
        """
        precision = Precision(autocast or self.precision.autocast, ctx.device)
        if self.precision.quantize != "none":
            quantized.prepare(model, precision.dtype)
        return precision

    @cached_property
    def compiler(self) -> Compiler | None:
        """What compiles the model, if site.toml says so."""
        return Compiler(self.site.kept) if self.precision.compile else None

    def compiled(self, model: Any, ctx: Context) -> AbstractContextManager[Any]:
        """What is called for the model in a training."""
        return nullcontext(model) if self.compiler is None else self.compiler.compiled(model, ctx)

    def train(self, model: Any, ctx: Context) -> None:
        """See `Workload`."""
        settings: FineTuningSettings = ctx.settings
        self._job = ctx
        corpus, precision = self.train_corpus, self.computing(model, ctx)
        optimizer = optimizers.make_optimizer(model, settings)
        kept = KeptOptimizer(self.site.kept, ctx) if settings.keep_optimizer and ctx.team.whole else None
        if kept:
            kept.load(optimizer)
        elif settings.keep_optimizer:
            ctx.note("the optimizer begins anew: it is not kept where each process has a share of the model")
        meter = Meter(ctx)
        ctx.keep(optimizer=optimizer, scaler=precision.scaler, totals=meter.totals)
        effective = settings.effective_batch(measured="batch_size" in ctx.measured)
        epoch = Steps(len(corpus), int(settings.batch_size), settings.accumulation, ctx.rng(), effective)
        in_round = ctx.expected_steps(
            settings.steps or settings.epochs * len(epoch), epoch=len(epoch), examples=effective
        )
        schedule = schedules.Schedule(
            settings.schedule, measured(settings.learning_rate), ctx.rounds * in_round, settings.warmup, settings.floor
        )
        before = (ctx.round - 1) * in_round
        with self.compiled(model, ctx) as forward:
            for batches in ctx.batches(epoch, epochs=settings.epochs, steps=settings.steps or None, split=False):
                meter.begin_step()
                ctx.saw(sum(map(len, batches)))
                optimizers.set_rate(optimizer, schedule.rate(before + ctx.place(in_round)))
                for loss, weight in self.gradients(forward, batches, precision, ctx, meter.waiting):
                    meter.add(loss, weight)
                self.step(optimizer, precision, settings.max_grad_norm)
                meter.end_step(optimizer.param_groups[0]["lr"], int(corpus.sizes[numbers_of(batches)].sum()))
        if kept:
            kept.save(optimizer)
        ctx.log(**self.data_metrics)
        ctx.num_examples = int(self.train_weights.sum())

    def calibrate(self, model: Any, ctx: Context) -> Mapping[str, float]:
        """See `Workload`."""
        self._job = ctx
        return Calibration(self, model, ctx).found()

    def gradients(
        self,
        model: Any,
        batches: Sequence[Numbers],
        precision: Precision,
        ctx: Context,
        waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Iterator[tuple[torch.Tensor, int]]:
        """Add up the gradients of an optimizer step over batches of the training data.

        Args:
            model: what is trained.
            batches: those of the step.
            precision: how it computes.
            ctx: the job.
            waiting: held while a batch is made.

        Yields:
            The summed loss of this process' part of each batch, and what the whole batch weighs.
        """
        corpus, padding = self.train_corpus, self.padding(ctx.device)
        counts = [int(self.train_weights[numbers].sum()) for numbers in batches]
        for numbers, count in zip(batches, counts, strict=True):
            share = ctx.team.share(numbers)
            with waiting():
                batch = self.make_batch(corpus, share.part, padding)
            with precision.autocast():
                loss = counting(self.summed_loss(model, batch), share)
            # The mean over the ranks is then the sum over all examples.
            torch.autograd.backward(precision.scaler.scale(loss * ctx.world_size / sum(counts)))
            yield loss, count

    @shares_work
    def gradient(self, model: Any, ctx: Context) -> None:
        """See `Workload`."""
        self._job = ctx
        self.computing(model, ctx, "float32")
        corpus, padding = self.train_corpus, self.padding(ctx.device)
        weights = self.weights(corpus)
        total = int(weights.sum())
        meter = Meter(ctx)
        with self.compiled(model, ctx) as forward:
            for numbers in ctx.batches(in_order_of_length(corpus, int(ctx.settings.batch_size)), split=False):
                share = ctx.team.share(numbers)
                loss = counting(self.summed_loss(forward, self.make_batch(corpus, share.part, padding)), share)
                torch.autograd.backward(loss * ctx.world_size / total)
                meter.add(loss, int(weights[numbers].sum()))
                ctx.log(loss=meter.loss)
        ctx.num_examples = total

    def step(self, optimizer: torch.optim.Optimizer, precision: Precision, max_norm: float) -> None:
        """Move the weights along the gradients that there are, and clear them; longer ones than `max_norm` are cut."""
        precision.scaler.unscale_(optimizer)
        if max_norm:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, max_norm)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def _paths(self, files: Files) -> list[Path]:
        return [self.site.directory / name for name in ([files] if isinstance(files, str) else files)]


def numbers_of(batches: Sequence[Numbers]) -> list[int]:
    """The examples of several batches."""
    return [int(number) for numbers in batches for number in numbers]
