"""What site.toml may say of the built-in workloads, with its defaults; `fedclient.text_settings` validates it.

Standard library alone: the daemon reads this file, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

BUILT_IN: Mapping[str, str] = {
    "causal_lm": "fedclient.trainer.text.causal_lm:CausalLm",
    "sequence_classification": "fedclient.trainer.text.classification:SequenceClassification",
}
"""Workloads that need no code: what `trainer` of site.toml says, and the class that it means."""

SCRIPT_SUFFIX = ".py"
"""How `trainer` of site.toml ends where it names a script."""

Files = str | tuple[str, ...]
"""One file, or several; relative to site.toml."""
Truncation = Literal["right", "left"]
Autocast = Literal["auto", "float32", "bf16", "fp16"]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """`[workload.NAME.data]` of every built-in workload."""

    train: Files
    """jsonl, csv, parquet or txt."""
    test: Files = ()
    """What evaluations measure on; without it the site measures nothing."""
    text: str = "text"
    """The column with the text."""
    template: str = ""
    """A text made of columns, as `"{title}\\n{body}"`; instead of `text`."""
    max_length: int = 512
    """Tokens of an example at most; never more than the model takes."""
    truncation: Truncation = "right"
    """Where an example loses what is too long."""


@dataclass(frozen=True, kw_only=True)
class CausalOptions(DataOptions):
    """`[workload.NAME.data]` of `causal_lm`."""

    prompt: str = ""
    """The column with a prompt, which is given and not learned; needs `completion`."""
    completion: str = ""
    """The column with what is to follow the prompt, or the template."""
    messages: str = ""
    """The column with a chat: a list of `{role, content}`; only what the assistant says is learned."""
    packing: bool | None = None
    """Lay texts one after another and cut them into blocks of `max_length`; None: where nothing is masked."""
    prompts: tuple[str, ...] = ()
    """What samples are begun with."""
    sample_tokens: int = 64
    """Tokens in a sample at most."""


@dataclass(frozen=True, kw_only=True)
class ClassificationOptions(DataOptions):
    """`[workload.NAME.data]` of `sequence_classification`."""

    pair: str = ""
    """The column with a second text, for tasks over two."""
    label: str = "label"
    """The column with the label: a name of `labels`, or its number from 0."""
    labels: tuple[str, ...] = ()
    """Names of all labels, the same at every site; without them, those of the model's config.json."""


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """`[workload.NAME.lora]`: train low-rank adapters, and leave the model itself as it is."""

    rank: int = 8
    alpha: float = 16.0
    """The adapters' product is scaled by alpha / rank."""
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    """Names of the modules that get adapters, as peft takes them."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole; a classifier's new head always is."""


@dataclass(frozen=True, kw_only=True)
class ParameterOptions:
    """`[workload.NAME.parameters]`: which parameters of a full model train, by shell patterns."""

    train: tuple[str, ...] = ("*",)
    """Those that match one of these train,"""
    freeze: tuple[str, ...] = ()
    """except those that match one of these."""


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """`[workload.NAME.precision]`."""

    autocast: Autocast = "auto"
    """What the costly operations compute in; auto: what the device is fast at."""
    weights: Dtype = "float32"
    """What the model's weights are held in; auto: as they are stored."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: much less memory, a third more time."""
