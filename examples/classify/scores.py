"""How good an exported model is: loaded by transformers alone, as whoever gets it would load it."""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.classify import data
from fedclient.trainer.text.metrics import confusion, macro_f1

BATCH = 32

Score = dict[str, float]
"""`accuracy` and `macro_f1`."""


def score(models: Sequence[Path], tests: Path, max_length: int, processes: int) -> list[Score]:
    """Accuracy and macro-F1 of models on the texts of a file.

    Args:
        models: directories as `fedserver model export` writes them.
        tests: the file.
        max_length: where texts are cut, in tokens.
        processes: how many models are looked at at a time, each on one thread.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(partial(_score, tests=tests, max_length=max_length), models))


def _score(model: Path, tests: Path, max_length: int) -> Score:
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(str(model)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(model))
    # Texts of like length together, so that little is padded.
    texts = sorted(data.read(tests), key=lambda text: len(text["text"]))
    predicted: list[int] = []
    for first in range(0, len(texts), BATCH):
        batch = [text["text"] for text in texts[first : first + BATCH]]
        inputs = tokenizer(batch, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        with torch.inference_mode():
            predicted += classifier(**inputs).logits.argmax(-1).tolist()
    expected = [classifier.config.label2id[text["label"]] for text in texts]
    counts = confusion(np.array(predicted), np.array(expected), len(data.LABELS))
    return {"accuracy": float(counts.trace() / counts.sum()), "macro_f1": macro_f1(counts)}
