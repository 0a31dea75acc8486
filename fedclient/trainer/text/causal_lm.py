"""`trainer = "causal_lm"`: a language model, on plain texts, completions after prompts, or chats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy

from fedclient.trainer.api import Bounds, Context
from fedclient.trainer.options import CausalOptions
from fedclient.trainer.team import shares_work
from fedclient.trainer.text.batches import Batch, Numbers, Padding, counting, in_order_of_length
from fedclient.trainer.text.corpus import IGNORED, Corpus
from fedclient.trainer.text.finetuning import FineTuning, FineTuningSettings
from fedclient.trainer.text.pretrained import options_of
from fedclient.trainer.text.samples import write_samples
from fedclient.trainer.text.templates import CausalSource
from fedclient.trainer.text.tokens import causal_corpus, located


@dataclass(frozen=True)
class CausalSettings(FineTuningSettings):
    """What a run may set of `causal_lm`."""

    samples: Annotated[int, Bounds(0, 64)] = 0
    """How many of the site's `prompts` each evaluation continues; the texts stay at the site."""


class CausalLm(FineTuning):
    """Learns to predict the next token.

    The site's weight is the number of tokens that it predicts, in training and in evaluations: the server's mean of
    the sites' losses is then the loss over all their tokens, and its exponential the perplexity over all of them.
    """

    kind = "AutoModelForCausalLM"
    task = "CAUSAL_LM"
    Settings = CausalSettings

    @cached_property
    def options(self) -> CausalOptions:
        """`[workload.NAME.data]`, with its defaults."""
        return CausalOptions(**options_of({"data": self.site.data}, "data"))

    def make_config(self) -> Any:
        """See `FineTuning`."""
        return self.pretrained.config()

    def make_corpus(self, files: Sequence[Path]) -> Corpus:
        """See `FineTuning`."""
        source = CausalSource(self.options, self.tokenizer)
        packing = not source.masked if self.options.packing is None else self.options.packing
        return causal_corpus(
            located(files, source.columns, self.alive),
            source,
            self.tokenizer,
            max_length=self.max_length,
            left=self.options.truncation == "left",
            packing=packing,
        )

    def weights(self, corpus: Corpus) -> npt.NDArray[Any]:
        """See `FineTuning`: tokens to predict."""
        return corpus.targets

    def make_batch(self, corpus: Corpus, numbers: Numbers, padding: Padding) -> Batch:
        """See `FineTuning`."""
        return Batch(padding.inputs(corpus, numbers), padding.expected(corpus, numbers))

    def summed_loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """See `FineTuning`: over the tokens to predict."""
        logits = model(**batch.inputs, use_cache=False).logits
        # In float32, and only where something is to be predicted: logits are the largest tensors of all.
        there = batch.expected != IGNORED
        return cross_entropy(logits[there].float(), batch.expected[there], reduction="sum")

    @shares_work
    def evaluate(self, model: Any, ctx: Context) -> Mapping[str, float]:
        """Mean loss over all tokens to predict, and its exponential; samples, if the run asks for them."""
        settings: CausalSettings = ctx.settings
        self._job = ctx
        corpus, total, count = self.test_corpus, 0.0, 0
        precision = self.computing(model, ctx)
        if corpus is not None:
            padding, weights = self.padding(ctx.device), self.weights(corpus)
            batches = in_order_of_length(corpus, settings.eval_batch_size, settings.eval_limit)
            for numbers in ctx.batches(batches, split=False):
                share = ctx.team.share(numbers)
                with precision.autocast():
                    found = self.summed_loss(model, self.make_batch(corpus, share.part, padding))
                total += float(counting(found, share))
                count += int(weights[numbers].sum())
            total = float(ctx.team.summed(torch.tensor(total, dtype=torch.float64)))
        if (prompts := self.options.prompts[: settings.samples]) and not (ctx.rank and ctx.team.whole):
            with precision.autocast():
                write_samples(
                    model,
                    self.tokenizer,
                    prompts,
                    tokens=self.options.sample_tokens,
                    home=None if ctx.rank else self.site.kept,
                    ctx=ctx,
                )
        ctx.num_examples = count
        if not count:
            return {}
        loss = total / count
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
