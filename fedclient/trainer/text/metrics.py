"""What a classifier is measured by."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

Name = Literal[
    "auroc",
    "average_precision",
    "balanced_accuracy",
    "calibration_error",
    "cohen_kappa",
    "matthews",
    "precision",
    "recall",
    "weighted_f1",
]

_TORCHMETRICS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "auroc": ("multiclass_auroc", {}),
    "average_precision": ("multiclass_average_precision", {}),
    "balanced_accuracy": ("multiclass_accuracy", {"average": "macro"}),
    "calibration_error": ("multiclass_calibration_error", {}),
    "cohen_kappa": ("multiclass_cohen_kappa", {}),
    "matthews": ("multiclass_matthews_corrcoef", {}),
    "precision": ("multiclass_precision", {}),
    "recall": ("multiclass_recall", {}),
    "weighted_f1": ("multiclass_f1_score", {"average": "weighted"}),
}


def further_metrics(names: Sequence[Name], logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Metrics of torchmetrics, by the names that a run may ask for.

    Args:
        names: which.
        logits: a row for each example, a column for each class.
        labels: the classes.
    """
    if not names:
        return {}
    functional: Any = importlib.import_module("torchmetrics.functional.classification")
    found: dict[str, float] = {}
    for name in names:
        function, options = _TORCHMETRICS[name]
        value = getattr(functional, function)(logits.softmax(-1), labels, num_classes=logits.shape[1], **options)
        found[name] = float(value)
    return found


def confusion(predicted: npt.NDArray[Any], labels: npt.NDArray[Any], classes: int) -> npt.NDArray[np.int64]:
    """How often each class (a row) was taken for each (a column)."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def macro_f1(counts: npt.NDArray[np.int64]) -> float:
    """The mean of the classes' F1 scores, over those that occur or were predicted."""
    both = counts.sum(0) + counts.sum(1)
    there = both > 0
    return float(np.mean(2 * counts.diagonal()[there] / both[there])) if there.any() else 0.0
