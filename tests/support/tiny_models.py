"""Small random transformers with tokenizers, in Hugging Face layout: all that the real ones have, in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as token_decoders
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = ["good", "bad", "fine", "poor", "nice", "awful", "film", "book", "play", "song", "the", "was", "very", "a"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(*, chat: str | None = CHAT, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token for each byte, <|im_start|> and <|im_end|>, which is the end of a text, too."""
    specials = ["<|im_start|>", "<|im_end|>", "<s>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 2)])
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<s>")
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    found.chat_template = chat
    return found


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of WORDS, with BERT's boundaries."""
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def save_llama(directory: Path, *, shards: bool = False, **config: Any) -> Path:
    """A LLaMA of 20,000 weights with tied embeddings, as SmolLM2 has."""
    torch.manual_seed(3)
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["max_position_embeddings"] = 128
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            tie_word_embeddings=True,
            bos_token_id=2,
            eos_token_id=tokenizer.eos_token_id,
            **(sizes | config),
        )
    )
    model.save_pretrained(directory, max_shard_size="40KB" if shards else "5GB")
    tokenizer.save_pretrained(directory)
    return directory


def save_bert(directory: Path, *, head: bool = False, **config: Any) -> Path:
    """A BERT of 20,000 weights without a head, as MiniLM is; its file holds the old `position_ids`, too."""
    torch.manual_seed(4)
    tokenizer = word_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    given = {**sizes, "max_position_embeddings": 64, "hidden_dropout_prob": 0.1, **config}
    whole = BertConfig(vocab_size=len(tokenizer), **given)
    model = BertForSequenceClassification(whole) if head else BertModel(whole)
    tensors = {**model.state_dict(), "embeddings.position_ids": torch.arange(64).unsqueeze(0)}
    model.save_pretrained(directory, state_dict=tensors)
    tokenizer.save_pretrained(directory)
    return directory


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def reviews(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Sentences whose first word says their label."""
    kinds = [("pos", ("good", "fine", "nice")), ("neg", ("bad", "poor", "awful"))]
    things = ("film", "book", "play", "song")
    rows = []
    for i in range(first, first + count):
        label, words = kinds[i % 2]
        rows.append({"text": f"the {things[i % 4]} was {words[i % 3]} very", "label": label})
    return rows
