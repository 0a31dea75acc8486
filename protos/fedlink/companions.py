"""The files that tools want beside a model's weights, and which of them travel with it."""

from __future__ import annotations

MAX_COMPANION_BYTES = 128 << 20
"""Bytes in all of them together; the largest tokenizers have a quarter of it."""
ADAPTER_CONFIG = "adapter_config.json"
"""What peft calls the description of an adapter."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""What peft calls an adapter's weights; always one file."""
MODEL_WEIGHTS = "model.safetensors"
"""What transformers calls a model's weights in one file."""
INDEX_NAME = "model.safetensors.index.json"
"""What transformers calls the list of a model's shards."""

_NAMES = frozenset(
    f"{name}.json"
    for name in (
        "adapter_config",
        "added_tokens",
        "chat_template",
        "config",
        "generation_config",
        "modules",
        "preprocessor_config",
        "processor_config",
        "sentence_bert_config",
        "special_tokens_map",
        "tokenizer",
        "tokenizer_config",
        "vocab",
    )
) | {
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "vocab.txt",
}


def is_companion(name: str) -> bool:
    """Whether a file of this name may travel with a model: data that a loader reads and that holds no code."""
    return name in _NAMES
