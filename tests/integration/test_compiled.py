"""`compile = true`: one compilation for batches of all sizes, kept from round to round, and the run's own names."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from fedclient.trainer.state import state_of
from fedclient.trainer.text.compiling import CACHE, CannotCompileError
from fedclient.trainer.text.finetuning import FineTuning
from tests.support.interrupted import MEMORY, Run, dying
from tests.support.text_sites import built, job, workload
from tests.support.tiny_models import save_llama

# peft 0.21 asks transformers 5 under an old name; compilers warn of what they do not care for.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.timeout(900),
]


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(CACHE, raising=False)
    # pytest would keep all that torch says of every step of a compilation.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.set_num_threads(before)


def language(home: Path, quantize: str = "none", *, compiled: bool = True) -> FineTuning:
    if not (home / "llama").exists():
        save_llama(home / "llama", num_hidden_layers=1)
        texts = [{"text": "To be, or not to be. " * (1 + i % 5)} for i in range(20)]
        (home / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    data = {"train": "train.jsonl", "packing": False, "max_length": 128}
    held = {"quantize": quantize, "compile": compiled}
    return workload(home, "causal_lm", model="llama", data=data, lora={"rank": 2}, precision=held)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_it_is_compiled_once_for_batches_of_all_sizes(tmp_path: Path, quantize: str):
    if quantize != "none":
        pytest.importorskip("bitsandbytes")
    found, plain = language(tmp_path, quantize), language(tmp_path, quantize, compiled=False)
    model, reference = built(found), built(plain)
    names = list(model.state_dict())
    notes: list[str] = []
    seconds = []
    for _ in range(2):
        # Lengths vary from batch to batch, and the last one of an epoch is smaller.
        ctx = job(found, epochs=2, batch_size=3, learning_rate=0.01)
        ctx.note = notes.append  # type: ignore[method-assign]
        found.train(model, ctx)
        seconds.append(ctx.metrics.get("compile_seconds", 0.0))
    assert seconds[0] > 0 == seconds[1]
    assert notes == ["compiling the model: this step takes longer"]
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert list(model.state_dict()) == names
    assert state_of(model, found.tensor_names(model), frozen_base=True).specs()
    assert (tmp_path / "kept" / "compiled").is_dir()
    for _ in range(2):
        ctx_plain = job(plain, epochs=2, batch_size=3, learning_rate=0.01)
        plain.train(reference, ctx_plain)
    assert ctx.metrics["loss"] == pytest.approx(ctx_plain.metrics["loss"], rel=2e-3)


@pytest.mark.slow
def test_killed_at_a_step_it_goes_on_to_the_same_bits(tmp_path: Path):
    given = {"steps": 6, "batch_size": 3, "learning_rate": 0.01}

    def trained(directory: Path, die_at: int | None, *, every: float = 1e-9) -> Run:
        found = language(tmp_path)
        return Run(directory, found.build_model, dying(found, die_at, **given), every=every)

    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        whole = trained(Path(scratch), None, every=0)
        killed = trained(Path(scratch), 4)
        assert killed.interrupted
        # As a fresh process would.
        torch._dynamo.reset()
        resumed = trained(Path(scratch), None)
    assert "resumed from a local checkpoint" in resumed.notes
    assert resumed.weights == whole.weights != killed.weights


@pytest.mark.slow
def test_without_a_compiler_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torch._inductor.config

    found = language(tmp_path)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/no/compiler"))
    with pytest.raises(CannotCompileError, match=r"No working C\+\+ compiler .*; install a C\+\+ compiler"):
        found.train(built(found), job(found, steps=1))
