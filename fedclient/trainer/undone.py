"""Trying something out with a model, and having it as it was before."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from fedclient.trainer.api import Context


def starting_over(model: Any, ctx: Context) -> Callable[[], AbstractContextManager[None]]:
    """A context in which a model may be changed at will, as often as needed.

    It begins each time with the weights of now, the job's seed in the global generators and no gradients, and leaves
    those weights behind, bit for bit, and no gradients. Half as much memory as an optimizer of the Adam family takes
    is needed for the copy: parameters that require no gradient are not copied, for nothing trains them.

    Args:
        model: a torch module, or a dict of numpy arrays.
        ctx: the job.
    """
    if isinstance(model, dict):
        arrays = {name: value.copy() for name, value in model.items()}

        def bring_back() -> None:
            model.clear()
            model.update({name: value.copy() for name, value in arrays.items()})
    else:
        from fedclient.trainer.torch_state import copied  # noqa: PLC0415 - imports torch

        bring_back = copied(model)

    @contextmanager
    def begin() -> Iterator[None]:
        seed_everything(ctx.seed)
        try:
            yield
        finally:
            bring_back()

    return begin


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and (where it is loaded) torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002 - user code may draw from the global one
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)
