"""What a language model says when it is begun for it: written to a file of the site's, never sent anywhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedclient.trainer.api import Context
from fedclient.trainer.text.tokens import boundaries

LIMIT = 4 << 20
"""Bytes after which a file of samples is begun anew."""


def write_samples(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, tokens: int, home: Path | None, ctx: Context
) -> None:
    """Continue prompts, always with the likeliest token, and add a line for each to the run's file of samples.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: what is to be continued.
        tokens: how long at most.
        home: the workload's directory in the site's state; None: nothing is written.
        ctx: the job.
    """
    head, _ = boundaries(tokenizer)
    lines = []
    for prompt in prompts:
        ctx.alive()
        ids = head + tokenizer(prompt, add_special_tokens=False)["input_ids"]
        text = tokenizer.decode(_continued(model, tokenizer, ids, tokens), skip_special_tokens=True)
        lines.append(json.dumps({"run": ctx.run, "version": ctx.version, "prompt": prompt, "text": text}))
    if home is None:
        return
    path = home / "samples" / f"{hashlib.sha256(ctx.run.encode()).hexdigest()[:16]}.jsonl"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    begun = path.is_file() and path.stat().st_size < LIMIT
    with path.open("a" if begun else "w", encoding="utf-8") as f:
        f.write("".join(f"{line}\n" for line in lines))
    ctx.note(f"samples of version {ctx.version} are in {path}")


def _continued(model: Any, tokenizer: Any, ids: list[int], tokens: int) -> list[int]:
    prompt = torch.tensor([ids], device=model.device)
    end = tokenizer.eos_token_id
    made = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end,
    )
    return [int(token) for token in made[0, len(ids) :]]
