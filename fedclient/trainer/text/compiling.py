"""`compile = true`: trainings run by code that torch.compile makes of the model.

The model stays what it is, with its names and its state; only the loops over its training data call it through
`Compiled`. Its dimensions are dynamic: batches of any size and length run by the same code.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.callback import callback_handler
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from fedclient.trainer.api import Context

CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""The variable that says where torch keeps what it has compiled."""


class CannotCompileError(RuntimeError):
    """The model cannot be compiled here; the text says what it takes."""


class Compiled:
    """Calls a model by compiled code; everything else is the model's own.

    Args:
        run: what `torch.compile` gave.
        model: the model.
    """

    def __init__(self, run: Callable[..., Any], model: torch.nn.Module) -> None:
        self._run = run
        self._model = model

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The model's outputs."""
        return self._run(self._model, *inputs, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Compiler:
    """Compiles a workload's model, once in a process.

    Args:
        kept: where the site keeps things for the workload; what was compiled is found again there. torch itself would
            take it from a directory that every user of the machine may write to.
    """

    def __init__(self, kept: Path | None) -> None:
        # torch itself sets the variable when it is first asked.
        if kept is not None and os.environ.get(CACHE) in (None, default_cache_dir()):
            os.environ[CACHE] = str(kept / "compiled")
        self._run: Callable[..., Any] = torch.compile(_call, dynamic=True)
        self._seconds = 0.0
        self._began = 0.0

    @contextmanager
    def compiled(self, model: torch.nn.Module, ctx: Context) -> Iterator[Compiled]:
        """The model to train with. Compiling is told of, and logged as the metric `compile_seconds`.

        Raises:
            CannotCompileError: there is no compiler, or it fails.
        """
        self._seconds = 0.0

        def begin(_: object) -> None:
            self._began = time.monotonic()
            if not self._seconds:
                ctx.note("compiling the model: this step takes longer")

        def end(_: object) -> None:
            self._seconds += time.monotonic() - self._began
            ctx.log(compile_seconds=self._seconds)

        callback_handler.register_start_callback(begin)
        callback_handler.register_end_callback(end)
        try:
            yield Compiled(self._run, model)
        except BackendCompilerFailed as e:
            cause = str(e.inner_exception).strip().partition("\n")[0]
            raise CannotCompileError(
                f"compile = true of site.toml: the model cannot be compiled here: {cause}; install a C++ compiler "
                "(g++, or name one by the variable CXX), or leave compile out"
            ) from None
        finally:
            callback_handler.remove_start_callback(begin)
            callback_handler.remove_end_callback(end)


def _call(model: torch.nn.Module, *inputs: Any, **named: Any) -> Any:
    return model(*inputs, **named)
