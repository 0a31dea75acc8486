"""Sites with built-in workloads, made in the test's own process, and jobs for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedclient.settings import WorkloadSettings
from fedclient.trainer import Context, Site
from fedclient.trainer.options import BUILT_IN
from fedclient.trainer.state import state_of
from fedclient.trainer.text.causal_lm import CausalLm
from fedclient.trainer.text.classification import SequenceClassification
from fedclient.trainer.text.finetuning import FineTuning
from fedclient.trainer.worker import seed_everything

_CLASSES: dict[str, type[FineTuning]] = {"causal_lm": CausalLm, "sequence_classification": SequenceClassification}
assert _CLASSES.keys() == BUILT_IN.keys()


def workload(directory: Path, trainer: str, **table: Any) -> FineTuning:
    """A workload as a fresh process has it, from what site.toml says of it."""
    settings = WorkloadSettings.model_validate({"trainer": trainer, **table})
    return _CLASSES[trainer](Site("site-1", directory, settings.data, settings.options, directory / "kept"))


def built(found: FineTuning, seed: int = 7) -> Any:
    """Its model, as the worker builds it, ready to be trained."""
    seed_everything(seed)
    model = found.build_model()
    state_of(model).begin(training=True, device="cpu", frozen=())
    return model


def job(
    found: FineTuning,
    *,
    seed: int = 5,
    round: int = 1,  # noqa: A002 - the context's name for it
    rounds: int = 0,
    run: str = "r",
    **settings: Any,
) -> Context:
    """A job's context; the generators are seeded for it, too."""
    seed_everything(seed)
    return Context(settings=found.Settings(**settings), seed=seed, client="site-1", run=run, round=round, rounds=rounds)


def weights(model: Any) -> dict[str, bytes]:
    """All tensors of a model, bit for bit."""
    return {name: tensor.detach().clone().numpy().tobytes() for name, tensor in model.state_dict().items()}


def measured(found: FineTuning, model: Any, **settings: Any) -> dict[str, float]:
    """What an evaluation says, with the weight it gives itself."""
    import torch

    ctx = job(found, **settings)
    model.eval()
    with torch.no_grad():
        metrics = found.evaluate(model, ctx)
    model.train()
    return {**metrics, "num_examples": ctx.counted()}
