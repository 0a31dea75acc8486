"""A training script of the examples, run by hand: as it is, and as it was before a federation came into it.

    python -m tests.support.by_hand SCRIPT RESULTS [SEED=START[=ARGUMENTS] ...] -- ARGUMENT ...

In one process, for the libraries take long to import. RESULTS gets `as_is.safetensors` and `before.safetensors`, both
begun with the script's own weights; and for each SEED `SEED.safetensors`, begun with the weights in the file START,
under other ARGUMENTS, separated by commas, if there are any.
"""

from __future__ import annotations

import random
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

OWN = 11
"""The seed under which the script's own weights are drawn."""


def seeded(seed: int) -> None:
    """Seed as the worker does."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002
    torch.manual_seed(seed)


def before(text: str) -> str:
    """The script without what was added for a federation; the model is handed to `start` and `end` instead."""
    lines = []
    for line in text.splitlines():
        if not line.endswith("# federated"):
            lines.append(line)
            continue
        found = re.sub(r"fed\.setting\(\"\w+\", ([^,)]+)[^)]*\)", r"\1", line)
        found = re.sub(r"fed\.batches\((.*)\):", r"\1:", found)
        found = re.sub(r"fed\.load\(([\w.]+).*\)", r"start(\1)", found)
        found = re.sub(r"fed\.save\(([\w.]+),.*\)", r"end(\1)", found)
        lines += [] if "import" in found or "fed.watch" in found else [found]
    text = "\n".join(lines)
    assert "fed." not in text
    assert "fedclient" not in text
    return text


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """What a model has learned, as it is called in files."""
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        return {n: t.detach().clone() for n, t in get_peft_model_state_dict(model).items()}
    return {n: t.detach().clone().contiguous() for n, t in model.state_dict().items()}


def give(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Begin with other weights."""
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        found = set_peft_model_state_dict(model, weights)
        assert not found.unexpected_keys
    else:
        model.load_state_dict(weights)


def run_before(script: Path, start: Callable[[Any], None]) -> dict[str, torch.Tensor]:
    """Run it as it was."""
    found: list[dict[str, torch.Tensor]] = []
    code = compile(before(script.read_text()), str(script), "exec")
    names = {"__name__": "__main__", "start": start, "end": lambda model: found.append(tensors(model))}
    exec(code, names)
    return found[0]


def main(script: Path, results: Path, starts: list[str], arguments: list[str]) -> None:
    sys.argv = [str(script), *arguments]
    seeded(OWN)
    names = runpy.run_path(str(script), run_name="__main__")
    as_is = tensors(names["trainer"].model if "trainer" in names else names["model"])
    save_file(as_is, results / "as_is.safetensors")
    seeded(OWN)
    save_file(run_before(script, lambda _: None), results / "before.safetensors")
    for seed, start, *own in (given.split("=") for given in starts):
        sys.argv[1:] = own[0].split(",") if own else arguments

        def begin(model: Any, seed: int = int(seed), start: str = start) -> None:
            give(model, load_file(start))
            seeded(seed)

        save_file(run_before(script, begin), results / f"{seed}.safetensors")


if __name__ == "__main__":
    cut = sys.argv.index("--")
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:cut], sys.argv[cut + 1 :])
