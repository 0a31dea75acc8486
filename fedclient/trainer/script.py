"""A training script that somebody already has, as a workload: `trainer = "train.py"` in site.toml.

What the script calls is in `inscript`; how it takes turns with the job, in `play`.
"""

from __future__ import annotations

import contextlib
import importlib
import queue
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedclient.trainer.api import Context, Site, Workload
from fedclient.trainer.declared import read_declared
from fedclient.trainer.play import Place, Play, ScriptError
from fedlink.companions import ADAPTER_CONFIG


class Script(Workload):
    """A script: it is run once, from its start to its end, for each training."""

    path: ClassVar[Path]
    """The script."""
    reuses_model = False

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.main_thread: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._play: Play | None = None
        self._modes: list[tuple[Any, bool]] = []

    def begin_job(self, ctx: Context) -> None:
        """See `Workload`."""
        self._play = Play(self.path, self.site.options.get("args", ()), ctx)

    def build_model(self) -> Any:
        """See `Workload`: let the script run up to `load`, and take its model."""
        play = self._playing
        self.main_thread.put(play.perform)
        play.until(Place.LOADED)
        peft = sys.modules.get("peft")
        self.frozen_base = peft is not None and isinstance(play.model, peft.PeftModel)
        torch = sys.modules.get("torch")
        modules = play.model.modules() if torch is not None and isinstance(play.model, torch.nn.Module) else ()
        self._modes = [(module, module.training) for module in modules]
        return play.model

    def tensor_names(self, model: Any) -> Mapping[str, str]:
        """See `Workload`: of an adapter, the names that peft gives them."""
        if not self.frozen_base:
            return {}
        from fedclient.trainer.adapters import adapter_names  # noqa: PLC0415 - imports torch

        return adapter_names(model)

    def model_files(self) -> Mapping[str, bytes]:
        """See `Workload`: what peft or transformers wants besides the weights, if the model is one of theirs."""
        model = self._playing.model
        transformers = sys.modules.get("transformers")
        if self.frozen_base:
            from fedclient.trainer.adapters import adapter_file  # noqa: PLC0415 - imports torch

            base = next(iter(model.peft_config.values())).base_model_name_or_path
            return {ADAPTER_CONFIG: adapter_file(model, Path(base or "").name)}
        if transformers is not None and isinstance(model, transformers.PreTrainedModel):
            from fedclient.trainer.text.pretrained import config_file  # noqa: PLC0415 - imports torch

            return {"config.json": config_file(model.config)}
        return {}

    def train(self, model: Any, ctx: Context) -> None:  # noqa: ARG002 - both are the script's already
        """See `Workload`: let the script train, up to `save`."""
        # As the script left it: it may train with a part of the model in eval mode.
        for module, training in self._modes:
            module.training = training
        self._playing.go_on()
        self._playing.until(Place.SAVED)

    def end_job(self, *, failed: bool) -> None:
        """See `Workload`: let the script run to its end after `save`; elsewhere it is left."""
        play, self._play, self._modes = self._play, None, []
        if play is None:
            return
        if failed or not play.saved:
            play.leave()
        else:
            play.go_on()
            play.until(Place.OVER)

    @property
    def _playing(self) -> Play:
        if self._play is None:
            raise ScriptError("a script is run for jobs alone")
        return self._play


class MeasuringScript(Script):
    """A script that gives `load` a function to measure with."""

    def evaluate(self, model: Any, ctx: Context) -> Mapping[str, float]:  # noqa: ARG002 - it is the script's already
        """See `Workload`."""
        found = dict(self._playing.measure())
        if "num_examples" not in found:
            raise ScriptError(f"{self.path.name}: what load is given as evaluate returns no num_examples: its weight")
        ctx.num_examples = int(found.pop("num_examples"))
        return found


def script_class(path: Path) -> type[Script]:
    """The workload that a script is.

    Raises:
        ScriptError: its text does not say what it is to say.
        SyntaxError: it is no Python.
    """
    declared = read_declared(path)
    # Before the first job, so that it is seeded for it, and the devices are known.
    with contextlib.suppress(ImportError):
        importlib.import_module("torch")
    kind = MeasuringScript if declared.evaluates else Script
    return type(path.name, (kind,), {"path": path, "Settings": declared.settings})
