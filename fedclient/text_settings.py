"""The tables of site.toml that the built-in workloads read (docs/site-file.md); the defaults are the trainer's own."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from fedclient.trainer.options import (
    Autocast,
    CausalOptions,
    ClassificationOptions,
    DataOptions,
    Dtype,
    LoraOptions,
    ParameterOptions,
    PrecisionOptions,
    Quantize,
    Truncation,
)
from fedlink.config import Config, explain


def _one_or_several(value: Any) -> Any:
    several = value if isinstance(value, list | tuple) else [value]
    if not several or not all(isinstance(v, str) and v for v in several):
        raise ValueError("neither a text nor a list of texts")
    return value


_Text = Annotated[str, Field(min_length=1)]
_Texts = Annotated[str | tuple[str, ...], BeforeValidator(_one_or_several)]


class LoraSettings(Config):
    """`[workload.NAME.lora]`: train low-rank adapters; without the table the model itself is trained."""

    rank: int = Field(LoraOptions.rank, ge=1, le=4096)
    """The adapters' inner dimension."""
    alpha: float = Field(LoraOptions.alpha, gt=0)
    """The adapters' product is scaled by alpha / rank."""
    dropout: float = Field(LoraOptions.dropout, ge=0, lt=1)
    """Share of the adapters' inputs that is left out in training."""
    targets: _Texts = LoraOptions.targets
    """Names of the modules that get adapters; "all-linear": every linear layer but the head."""
    modules_to_save: tuple[_Text, ...] = LoraOptions.modules_to_save
    """Modules that are trained whole."""
    dora: bool = LoraOptions.dora
    """Train the length of each output's weights apart from their direction."""


class ParameterSettings(Config):
    """`[workload.NAME.parameters]`: which parameters of a full model train."""

    train: tuple[_Text, ...] = Field(ParameterOptions.train, min_length=1)
    """Shell patterns: those that match one of them train,"""
    freeze: tuple[_Text, ...] = ParameterOptions.freeze
    """except those that match one of these."""


class PrecisionSettings(Config):
    """`[workload.NAME.precision]`: what is computed and held in which dtype."""

    autocast: Autocast = PrecisionOptions.autocast
    """What costly operations compute in."""
    weights: Dtype = PrecisionOptions.weights
    """What the model's weights are held in."""
    gradient_checkpointing: bool = PrecisionOptions.gradient_checkpointing
    """Compute activations twice instead of keeping them."""
    quantize: Quantize = PrecisionOptions.quantize
    """What the linear layers of a base that adapters train on are held in."""
    compile: bool = PrecisionOptions.compile
    """Train by code that torch.compile makes of the model."""


class DataSettings(Config):
    """`[workload.NAME.data]` of every built-in workload."""

    train: _Texts
    test: _Texts = DataOptions.test
    text: _Text = DataOptions.text
    template: str = DataOptions.template
    max_length: int = Field(DataOptions.max_length, ge=8, le=1 << 20)
    truncation: Truncation = DataOptions.truncation

    @model_validator(mode="after")
    def _template(self) -> Self:
        try:
            names = [name for _, name, _, _ in Formatter().parse(self.template) if name is not None]
        except ValueError as e:
            raise ValueError(f"template: {e}; write {{{{ and }}}} for braces that belong to the text") from None
        if self.template and not all(name.isidentifier() for name in names):
            raise ValueError("template: write columns as {name}, and {{ and }} for braces that belong to the text")
        return self

    def check_one_source(self, *sources: str) -> None:
        """Refuse more than one of the keys that say where the text comes from."""
        given = [name for name in sources if name in self.model_fields_set]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other: give one of them")


class CausalSettings(DataSettings):
    """`[workload.NAME.data]` of `trainer = "causal_lm"`."""

    prompt: str = CausalOptions.prompt
    completion: str = CausalOptions.completion
    messages: str = CausalOptions.messages
    packing: bool | None = CausalOptions.packing
    prompts: tuple[_Text, ...] = Field(CausalOptions.prompts, max_length=64)
    sample_tokens: int = Field(CausalOptions.sample_tokens, ge=1, le=4096)

    @model_validator(mode="after")
    def _sources(self) -> Self:
        self.check_one_source("text", "template", "prompt", "messages")
        if self.prompt and not self.completion:
            raise ValueError("prompt needs completion: the column with what is to follow it")
        if self.completion and not (self.prompt or self.template):
            raise ValueError("completion needs prompt, the column with what it is to follow, or template")
        if self.packing and (self.completion or self.messages):
            raise ValueError("packing cuts texts anywhere: it is for text and template without completion")
        return self


class ClassificationSettings(DataSettings):
    """`[workload.NAME.data]` of `trainer = "sequence_classification"`."""

    pair: str = ClassificationOptions.pair
    label: _Text = ClassificationOptions.label
    labels: tuple[_Text, ...] = ClassificationOptions.labels

    @model_validator(mode="after")
    def _labels(self) -> Self:
        self.check_one_source("text", "template")
        if len(set(self.labels)) != len(self.labels) or len(self.labels) == 1:
            raise ValueError("labels: name at least two, each once")
        return self


_DATA: Mapping[str, type[DataSettings]] = {
    "causal_lm": CausalSettings,
    "sequence_classification": ClassificationSettings,
}


def check_data(trainer: str, table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The data table of a workload: as it is, or, of a built-in one, checked.

    Raises:
        ValueError: naming the key.
    """
    if trainer not in _DATA:
        return table
    try:
        return _DATA[trainer].model_validate(table).model_dump(mode="json", exclude_unset=True)
    except ValidationError as e:
        raise ValueError(explain(e, _DATA[trainer])) from None


def data_files(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Key and path of each file that a built-in workload's data table names."""
    found = [(key, table.get(key, ())) for key in ("train", "test")]
    return [(key, path) for key, paths in found for path in ([paths] if isinstance(paths, str) else paths)]
