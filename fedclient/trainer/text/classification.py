"""`trainer = "sequence_classification"`: one of several labels for a text, or for two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy

from fedclient.trainer.api import Context
from fedclient.trainer.options import ClassificationOptions
from fedclient.trainer.team import shares_work
from fedclient.trainer.text.batches import Batch, Numbers, Padding, in_order_of_length
from fedclient.trainer.text.corpus import Corpus
from fedclient.trainer.text.finetuning import FineTuning, FineTuningSettings
from fedclient.trainer.text.metrics import Name, confusion, further_metrics, macro_f1
from fedclient.trainer.text.pretrained import PretrainedError, options_of, require
from fedclient.trainer.text.readiness import described
from fedclient.trainer.text.templates import Source
from fedclient.trainer.text.tokens import class_number, labelled_corpus, located


@dataclass(frozen=True)
class ClassificationSettings(FineTuningSettings):
    """What a run may set of `sequence_classification`."""

    metrics: tuple[Name, ...] = ()
    """What evaluations measure besides loss, accuracy and macro_f1; by torchmetrics."""


class SequenceClassification(FineTuning):
    """Learns to tell classes of texts apart. The site's weight is the number of its examples."""

    kind = "AutoModelForSequenceClassification"
    task = "SEQ_CLS"
    new_head = True
    Settings = ClassificationSettings

    @cached_property
    def options(self) -> ClassificationOptions:
        """`[workload.NAME.data]`, with its defaults."""
        return ClassificationOptions(**options_of({"data": self.site.data}, "data"))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes.

        Raises:
            PretrainedError: nobody says what they are.
        """
        if self.options.labels:
            return self.options.labels
        names = self.pretrained.config().id2label
        found = tuple(str(names[number]) for number in sorted(names))
        if all(name == f"LABEL_{number}" for number, name in enumerate(found)):
            raise PretrainedError(
                "[workload.NAME.data] of site.toml needs labels = [...], the names of all classes, the same at every "
                "site; the model's config.json has none"
            )
        return found

    def make_config(self) -> Any:
        """See `FineTuning`: with the classes, and what tells padding from text."""
        numbered = dict(enumerate(self.labels))
        config = self.pretrained.config(id2label=numbered, label2id={name: n for n, name in numbered.items()})
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = self.pad_token
        config.problem_type = "single_label_classification"
        return config

    def make_corpus(self, files: Sequence[Path]) -> Corpus:
        """See `FineTuning`."""
        options, source = self.options, Source(self.options)
        numbers = {name: number for number, name in enumerate(self.labels)}
        self.tokenizer.truncation_side = options.truncation
        return labelled_corpus(
            located(files, (*source.columns, options.label, *filter(None, [options.pair])), self.alive),
            source,
            self.tokenizer,
            pair=options.pair,
            label=lambda row: class_number(row[options.label], numbers),
            max_length=self.max_length,
        )

    def described(self, corpus: Corpus) -> dict[str, Any]:
        """See `FineTuning`: with how often each label occurs."""
        return described(corpus, self.max_length, self.labels)

    def padding(self, device: str) -> Padding:
        """See `FineTuning`."""
        typed = self.options.pair and "token_type_ids" in self.tokenizer.model_input_names
        return Padding(self.pad_token, device, self.tokenizer.sep_token_id if typed else None)

    def weights(self, corpus: Corpus) -> npt.NDArray[Any]:
        """See `FineTuning`: each example counts once."""
        return np.ones(len(corpus), np.int64)

    def make_batch(self, corpus: Corpus, numbers: Numbers, padding: Padding) -> Batch:
        """See `FineTuning`."""
        return Batch(padding.inputs(corpus, numbers), padding.labels(corpus, numbers))

    def summed_loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """See `FineTuning`: over the examples."""
        return cross_entropy(model(**batch.inputs).logits.float(), batch.expected, reduction="sum")

    @shares_work
    def evaluate(self, model: Any, ctx: Context) -> Mapping[str, float]:
        """Loss, accuracy, macro-F1 and what else the run asks for."""
        settings: ClassificationSettings = ctx.settings
        self._job = ctx
        corpus = self.test_corpus
        ctx.num_examples = 0
        if settings.metrics:
            require("torchmetrics")
        if corpus is None or not len(corpus):
            return {}
        precision, padding = self.computing(model, ctx), self.padding(ctx.device)
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        batches = in_order_of_length(corpus, settings.eval_batch_size, settings.eval_limit)
        for numbers in ctx.batches(batches, split=False):
            share = ctx.team.share(numbers)
            batch = self.make_batch(corpus, share.part, padding)
            with precision.autocast():
                logits = model(**batch.inputs).logits
            found.append((logits[: share.own].float().cpu(), batch.expected[: share.own].cpu()))
        logits, labels = (ctx.team.joined(torch.cat(parts)) for parts in zip(*found, strict=True))
        ctx.num_examples = len(labels)
        predicted = logits.argmax(-1)
        counts = confusion(predicted.numpy(), labels.numpy(), len(self.labels))
        return {
            "loss": float(cross_entropy(logits, labels)),
            "accuracy": float(counts.trace() / counts.sum()),
            "macro_f1": macro_f1(counts),
        } | further_metrics(settings.metrics, logits, labels)
