"""Built-in workloads over pretrained transformers: fine-tuning by site.toml alone, and the parts they are made of.

    rows       jsonl, csv, parquet, txt ──▶ rows
    templates  rows ──▶ texts, and what of them is to be learned
    corpus     texts ──▶ tokens, once
    batches    tokens ──▶ padded batches, in an order drawn from the job's seed
    pretrained, lora        the model
    optimizers, schedules   how it learns
    finetuning              the loop, and what `causal_lm` and `classification` share

Needs `pip install 'fedlink[text]'`. Nothing is fetched from a hub: site.toml names directories.
"""

from __future__ import annotations

import os

# Before transformers and huggingface_hub are imported: they look at it then.
for _variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_variable, "1")
