"""What there is to know of a site's texts: for `fedclient doctor`, and as metrics that the site may let out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedclient.trainer.text.corpus import Corpus

DATA = "data."
"""What the names of these metrics begin with."""
_MOST_METRICS = 40
_LONGEST = 64


def described(corpus: Corpus, max_length: int, labels: Sequence[str] = ()) -> dict[str, Any]:
    """What there is to know of a corpus: counts, lengths in tokens, what is cut, what is there twice.

    Args:
        corpus: the examples.
        max_length: where they are cut.
        labels: names of the classes, if there are any.
    """
    rows = len(corpus.lengths)
    cut = 0 if corpus.packed else int((corpus.lengths > max_length).sum())
    found: dict[str, Any] = {
        "examples": rows,
        "tokens": int(corpus.lengths.sum()),
        "length": _quantiles(corpus),
        "max_length": max_length,
        "truncated": round(cut / rows, 4) if rows else 0.0,
        "duplicates": rows - len(np.unique(corpus.hashes)),
        "without_target": corpus.dropped,
    }
    if corpus.packed:
        found["blocks"] = len(corpus)
    if labels:
        counts = np.bincount(corpus.labels, minlength=len(labels))
        found["labels"] = {name: int(count) for name, count in zip(labels, counts, strict=True)}
    return found


def overlap(one: Corpus, other: Corpus) -> int:
    """How many different rows are in both."""
    return len(np.intersect1d(one.hashes, other.hashes))


def _quantiles(corpus: Corpus) -> dict[str, int]:
    if not len(corpus.lengths):
        return {}
    median, most = np.percentile(corpus.lengths, [50, 95], method="higher")
    return {"median": int(median), "p95": int(most), "max": int(corpus.lengths.max())}


def as_metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """What `described` gave as metrics: `data.examples`, `data.length.median`, `data.labels.NAME` and so on.

    Of many labels the commonest come along. A name that is too long for a metric is left out.
    """
    flat: dict[str, float] = {}
    for key, value in found.items():
        parts = value.items() if isinstance(value, Mapping) else [("", value)]
        flat |= {f"{DATA}{key}.{name}".rstrip("."): float(part) for name, part in sorted(parts, key=_largest_first)}
    kept = [(name, value) for name, value in flat.items() if len(name) <= _LONGEST]
    return dict(kept[:_MOST_METRICS])


def _largest_first(item: tuple[str, Any]) -> tuple[float, str]:
    return -item[1], item[0]
