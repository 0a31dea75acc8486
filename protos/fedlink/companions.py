"""The files that tools want beside a model's weights, and which of them travel with it."""

from __future__ import annotations

import re

MAX_COMPANIONS = 32
"""Files beside one model's weights."""
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

_NAMES = re.compile(
    r"(config|generation_config|adapter_config|(special_tokens|added_tokens|tokenizer|tokenizer_[a-z_]+)(_map)?"
    r"|preprocessor_config|processor_config|video_preprocessor_config|feature_extractor_config|vocab|modules"
    r"|config_sentence_transformers|sentence_bert_config)\.json"
    r"|(vocab|merges|bpe)\.(txt|codes)|tokenizer\.model|(spiece|sentencepiece(\.bpe)?|source|target)\.(model|spm)"
    r"|chat_template\.(jinja|json)"
)


def is_companion(name: str) -> bool:
    """Whether a file of this name may travel with a model: data that a loader reads and that holds no code."""
    return _NAMES.fullmatch(name) is not None
