"""What runs in the trainer process, and the one class a data scientist writes.

    from fedclient.trainer import Bounds, Context, Workload

    class HeartDisease(Workload):
        def build_model(self): ...
        def train(self, model, ctx): ...
        def evaluate(self, model, ctx): ...

A script that is there already needs no class: it calls `load` and `save`, and what else is in
`fedclient.trainer.inscript`.

Stands on the standard library and numpy alone; torch is used where the class brings it.
"""

from fedclient.trainer.api import Bounds, Context, Site, Workload, derive_seed, measured
from fedclient.trainer.inscript import batches, context, load, log, save, seed, setting, step, watch
from fedclient.trainer.largest_batch import find_batch_size
from fedclient.trainer.range_test import find_learning_rate

__all__ = [
    "Bounds",
    "Context",
    "Site",
    "Workload",
    "batches",
    "context",
    "derive_seed",
    "find_batch_size",
    "find_learning_rate",
    "load",
    "log",
    "measured",
    "save",
    "seed",
    "setting",
    "step",
    "watch",
]
