"""An optimizer's state that is kept at the site from one round to the next.

    DIRECTORY/RUN-ROUND.safetensors    as it was when that round's training was over; RUN is a digest of the name

A round that is done again finds the state that it began with the first time: two are kept of each run.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from fedclient.trainer.api import Context
from fedclient.trainer.checkpoint import write_parts
from fedclient.trainer.nested import CannotHoldError, flatten
from fedclient.trainer.saved import DamagedError, Saved
from fedclient.trainer.torch_state import load_optimizer

FORGOTTEN_AFTER = 30 * 86400.0
"""Seconds after which a run's state is deleted that no training has touched."""

_PART = "optimizer"


class KeptOptimizer:
    """The kept state of one run's optimizer.

    Args:
        home: the workload's directory in the site's state; None: nothing is kept.
        ctx: the job.
    """

    def __init__(self, home: Path | None, ctx: Context) -> None:
        self._directory = home / "optimizer" if home else None
        self._ctx = ctx
        self._run = hashlib.sha256(f"{ctx.run}/{ctx.client}".encode()).hexdigest()[:16]
        self._began_with: Path | None = None

    def load(self, optimizer: torch.optim.Optimizer) -> None:
        """Give a fresh optimizer the state of the last round before this one that the site took part in."""
        earlier = {n: path for n, path in self._files().items() if n < self._ctx.round}
        if not earlier:
            return
        path = self._began_with = earlier[max(earlier)]
        try:
            saved = Saved(path, self._ctx.device, self._ctx.alive)
        except (DamagedError, FileNotFoundError) as e:
            self._ctx.note(f"the optimizer's kept state is damaged ({e}): it begins anew")
            return
        try:
            if saved.owner == _owner(optimizer):
                load_optimizer(optimizer, saved.part(_PART))
            else:
                self._ctx.note("the optimizer's kept state is of another optimizer or model: it begins anew")
        finally:
            saved.close()

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the state that the round ended with; a disk that refuses is told of, and does no harm."""
        if self._directory is None or self._ctx.rank:
            return
        path = self._directory / f"{self._run}-{self._ctx.round}.safetensors"
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            parts = {_PART: flatten(optimizer.state_dict(), "the optimizer's state")}
            self._tidy(path)
            # The update is written next, and is what the round is for.
            write_parts(path, _owner(optimizer), parts, spare=_update_bytes(optimizer), alive=self._ctx.alive)
        except (OSError, CannotHoldError) as e:
            self._ctx.note(f"the optimizer's state could not be kept: {e}")

    def _tidy(self, written: Path) -> None:
        for path in self._files().values():
            if path not in (written, self._began_with):
                path.unlink(missing_ok=True)
        for path in written.parent.glob("*.safetensors"):
            if time.time() - path.stat().st_mtime > FORGOTTEN_AFTER:
                path.unlink(missing_ok=True)

    def _files(self) -> dict[int, Path]:
        if self._directory is None:
            return {}
        found = self._directory.glob(f"{self._run}-*.safetensors")
        return {int(path.stem.rpartition("-")[2]): path for path in found}


def _update_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The most that an update takes of what an optimizer moves."""
    return sum(8 * p.numel() for group in optimizer.param_groups for p in group["params"])


def _owner(optimizer: torch.optim.Optimizer) -> str:
    """What a state fits: an optimizer of this kind over parameters of these shapes."""
    shapes = [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    text: dict[str, Any] = {"optimizer": type(optimizer).__name__, "shapes": shapes}
    return json.dumps(text)
