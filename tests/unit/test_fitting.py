"""The searches for a learning rate and a batch size, by themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedclient.trainer import Bounds, Context, find_batch_size, find_learning_rate, measured
from fedclient.trainer.found import Attempts, CannotMeasureError, Finding, Found, fingerprint
from fedclient.trainer.largest_batch import CLOSE, NothingFitsError
from fedclient.trainer.range_test import TRIAL_STEPS
from fedclient.trainer.schema import SettingsError, check_found, parse_settings, settings_schema
from fedclient.trainer.state import state_of
from fedlink.settings_schema import check_settings, narrow, open_settings, parse_schema
from tests.support.classes.measuring import Measuring


@dataclass(frozen=True)
class NoSettings:
    pass


def context(**options) -> Context:
    return Context(settings=NoSettings(), seed=7, **options)


# --- The rate


def quadratic(curvature: float):
    """A bowl whose best rate over a few steps is known: 1 / curvature goes to its bottom in one."""
    model = {"w": np.full(4, 3.0)}

    def loss() -> float:
        return float(curvature * (model["w"] ** 2).sum() / 2)

    def descend(rates, _fold):
        for rate in rates:
            before = loss()
            model["w"] -= rate * curvature * model["w"]
            yield before

    return model, descend, lambda _fold: loss()


@pytest.mark.parametrize("curvature", [0.3, 3.0, 300.0])
def test_rate_of_a_bowl_is_near_the_one_that_reaches_its_bottom(curvature):
    model, descend, held_out = quadratic(curvature)
    rate = find_learning_rate(model, context(), descend=descend, held_out=held_out, schedule=[1.0] * 3)
    assert 0.5 <= rate * curvature <= 1.6


def test_rate_stays_within_its_limits_and_the_weights_stay_what_they_were():
    model, descend, held_out = quadratic(3.0)
    limits = {"learning_rate": Bounds(1e-5, 0.02)}
    rate = find_learning_rate(model, context(limits=limits), descend=descend, held_out=held_out)
    assert 0.01 <= rate <= 0.02
    assert model["w"].tobytes() == np.full(4, 3.0).tobytes()


@pytest.mark.parametrize("curvature", [0.3, 3.0, 300.0])
def test_a_loss_below_zero_gives_a_rate_as_good(curvature):
    model, descend, held_out = quadratic(curvature)
    start = float(curvature * 9 * 4 / 2)

    def below(rates, fold):
        for loss in descend(rates, fold):
            yield loss - 1.5 * start

    rate = find_learning_rate(
        model, context(), descend=below, held_out=lambda fold: held_out(fold) - 1.5 * start, schedule=[1.0] * 3
    )
    # What is within 1 % of the least is wider here: 1.5 % of the loss that there was in the beginning.
    assert 0.3 <= rate * curvature <= 1.6


@pytest.mark.parametrize("where", ["training", "held-out"])
def test_where_no_trial_is_finite_there_is_no_rate_but_the_reason(where):
    def descend(rates, _fold):
        for _ in rates:
            yield float("nan") if where == "training" else 1.0

    with pytest.raises(CannotMeasureError, match="no learning rate could be measured: at each one tried"):
        find_learning_rate({"w": np.zeros(1)}, context(), descend=descend, held_out=lambda _: float("inf"))


def network() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Dropout(0.2), torch.nn.Linear(7, 1)
    )


def search(model: torch.nn.Module, ctx: Context) -> float:
    torch.set_num_threads(1)
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    y = (x.sum(1, keepdim=True) > 0).float()

    def descend(rates, fold):
        optimizer, draw = torch.optim.Adam(model.parameters()), ctx.generator(fold)
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            batch = torch.randint(48, (8,), generator=draw)
            optimizer.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            yield loss.detach()

    def held_out(_fold):
        model.eval()
        with torch.no_grad():
            return float(torch.nn.functional.binary_cross_entropy_with_logits(model(x[48:]), y[48:]))

    return find_learning_rate(model, ctx, descend=descend, held_out=held_out, schedule=[1.0] * 5, folds=2)


def test_search_is_repeatable_and_leaves_no_trace_in_a_module():
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = search(model, context())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert search(model, context()) == search(network(), context()) == first
    assert 1e-4 < first < 1


def test_trials_are_as_long_as_the_run_and_no_longer_than_the_limit():
    seen = []

    def descend(rates, _fold):
        seen.append(len(rates))
        for _ in rates:
            yield 1.0

    for steps, expected in ((4, 4), (1000, TRIAL_STEPS)):
        seen.clear()
        schedule = [1.0] * steps
        find_learning_rate({"w": np.zeros(1)}, context(), descend=descend, held_out=lambda _: 1.0, schedule=schedule)
        assert set(seen[1:]) == {expected}


# --- The batch


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 63, 64, 100, 1000, 12345])
def test_batch_is_within_a_tenth_of_the_limit(limit):
    def attempt(size):
        if size > limit:
            raise MemoryError

    found = find_batch_size(context(), attempt, most=1 << 20)
    assert limit / CLOSE <= found <= limit


def test_batch_is_no_larger_than_wanted_and_one_must_fit():
    assert find_batch_size(context(), lambda _: None, most=48) == 48

    def attempt(_size):
        raise MemoryError

    with pytest.raises(NothingFitsError):
        find_batch_size(context(), attempt, most=48)


def test_an_error_that_is_not_of_memory_ends_the_search():
    def attempt(_size):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        find_batch_size(context(), attempt, most=8)


def test_a_search_whose_process_is_killed_goes_on_below(tmp_path):
    program = f"""
import os, signal
from pathlib import Path
from fedclient.trainer import Context, find_batch_size

class Settings:
    pass

def attempt(size):
    with open({str(tmp_path / "tried")!r}, "a") as f:
        print(size, file=f)
    if size > 40:
        os.kill(os.getpid(), signal.SIGKILL)

print(find_batch_size(Context(settings=Settings(), kept=Path({str(tmp_path)!r})), attempt, most=512))
"""
    outputs = []
    while not outputs or not outputs[-1]:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode in (0, -9), done.stderr
        outputs.append(done.stdout.strip())
    tried = [int(line) for line in (tmp_path / "tried").read_text().split()]
    assert tried[:8] == [1, 2, 4, 8, 16, 32, 64, 64]
    assert all(tried.count(size) == (1 if size <= 40 else 2) for size in tried)
    assert 36 < int(outputs[-1]) <= 40
    assert not (tmp_path / "attempts.json").exists()


MEMORY = """
import os, resource
from pathlib import Path
import torch
from fedclient.trainer import Context, find_batch_size
from fedclient.trainer.memory import is_out_of_memory, keep_whole

class Settings:
    pass

torch.set_num_threads(1)
weight = torch.nn.Parameter(torch.ones(1))

def attempt(size):
    value = torch.zeros(size << 16)
    for _ in range(8):
        value = (value * weight).tanh()
    value.sum().backward()

def fits(size):
    child = os.fork()
    if not child:
        try:
            attempt(size)
        except Exception as e:
            os._exit(1 if is_out_of_memory(e) else 2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1)
    return code == 0

keep_whole()
attempt(1)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), resource.RLIM_INFINITY))
limit, above = 1, 128
while above - limit > 1:
    middle = (limit + above) // 2
    limit, above = (middle, above) if fits(middle) else (limit, middle)
print(limit, find_batch_size(Context(settings=Settings()), attempt, most=1 << 20))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_under_a_limit_of_memory_the_search_is_within_a_tenth_of_the_limit():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    limit, found = map(int, done.stdout.split())
    assert limit > 15
    assert limit / CLOSE <= found <= limit


ACCUMULATED = """
import resource, sys
from dataclasses import replace
from pathlib import Path
import torch
from tests.support.text_sites import built, job, workload
from tests.support.tiny_models import reviews, save_bert, write_jsonl

home = Path(sys.argv[1])
torch.set_num_threads(1)
# Its gradients are 128 MB, nearly all of them of a table whose gradient is the last that a backward pass makes.
save_bert(home / "bert", max_position_embeddings=125_000, hidden_size=256)
rows = [row | {"text": " ".join([row["text"]] * 12)} for row in reviews(512)]
write_jsonl(home / "train.jsonl", rows)
data = {"train": "train.jsonl", "labels": ["neg", "pos"], "max_length": 64}
found = workload(home, "sequence_classification", model="bert", data=data, precision={"autocast": "float32"})
ctx = job(found, batch_size="auto", effective_batch_size=512, steps=1, optimizer="sgd", weight_decay=0.0)
assert found.train_corpus and len(found.train_weights) == 512
model = built(found)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (384 << 20), resource.RLIM_INFINITY))
size = int(found.calibrate(model, ctx)["batch_size"])
print(size, flush=True)
ctx.measured, ctx.settings = frozenset(["batch_size"]), replace(ctx.settings, batch_size=size)
found.train(model, ctx)
print(ctx.step)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_size_found_trains_where_gradients_add_up_under_the_same_limit_of_memory(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ACCUMULATED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    size, steps = map(int, done.stdout.split())
    assert 8 < size <= 256
    assert steps == 1


# --- What is kept


def test_findings_are_for_a_kind_and_a_model_or_for_a_run(tmp_path):
    finding = Finding("run/a", ("rate",), "auto", "kind", "model")
    kept = Found(tmp_path / "kept")
    assert kept.look(finding, by_run=True) is None
    kept.put(finding, {"rate": 0.5})
    later = Finding("run/a", ("rate",), "0.1", "kind", "trained")
    other = Finding("other/a", ("rate",), "auto", "kind", "model")
    assert kept.look(later, by_run=True) == {"rate": 0.5}
    assert kept.look(later, by_run=False) is None
    assert kept.look(Finding("run/a", ("rate",), "auto", "other kind", "model"), by_run=True) is None
    assert kept.look(Finding("run/a", ("rate", "batch"), "auto", "kind", "model"), by_run=True) is None
    assert kept.look(other, by_run=False) == {"rate": 0.5}
    assert kept.look(Finding("other/a", ("rate",), "", "kind", ""), by_run=True) == {"rate": 0.5}
    for damaged in ("{", "[7]", '[{"run": "run/a"}]', "{}"):
        (tmp_path / "kept" / "found.json").write_text(damaged)
        assert kept.look(finding, by_run=True) is None


def test_attempts_of_another_search_are_forgotten(tmp_path):
    attempts = Attempts(tmp_path, "one")
    attempts.tried(8, fits=True)
    attempts.tried(16, fits=False)
    assert (Attempts(tmp_path, "one").fits, Attempts(tmp_path, "one").fails) == (8, 16)
    assert (Attempts(tmp_path, "two").fits, Attempts(tmp_path, "two").fails) == (0, 0)


def test_a_size_is_too_large_once_two_processes_have_ended_with_it(tmp_path):
    def ends_while_trying(size):
        attempts = Attempts(tmp_path, "one")
        before = attempts.fits, attempts.fails
        attempts.trying(size)
        return before

    assert ends_while_trying(8) == (0, 0)
    assert Attempts(tmp_path, "one").fails == 0
    # It was a reboot: the size fits, and what comes next begins anew.
    again = Attempts(tmp_path, "one")
    again.trying(8)
    again.tried(8, fits=True)
    assert ends_while_trying(16) == (8, 0)
    assert ends_while_trying(16) == (8, 0)
    assert ends_while_trying(12) == (8, 16)
    assert ends_while_trying(12) == (8, 16)
    assert (Attempts(tmp_path, "one").fits, Attempts(tmp_path, "one").fails) == (8, 12)
    again = Attempts(tmp_path, "one")
    again.trying(9)
    # A job that was cancelled, or an error, is no death.
    again.broken_off()
    again.trying(9)
    assert Attempts(tmp_path, "one").fails == 12


def test_fingerprint_is_of_values_and_names():
    model = network()
    one = fingerprint(state_of(model), lambda: None)
    assert fingerprint(state_of(network()), lambda: None) == one
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    assert fingerprint(state_of(model), lambda: None) != one


# --- As a setting


def test_a_number_or_the_word():
    described = settings_schema(Measuring.Settings)
    assert described["properties"]["learning_rate"] == {
        "type": "number", "minimum": 0, "maximum": 1, "default": 0.5, "auto": True,
    }  # fmt: skip
    schema = parse_schema(json.dumps(described))
    assert check_settings(schema, {"learning_rate": "auto", "batch_size": 3}) == []
    assert "above the maximum" in check_settings(schema, {"learning_rate": 2})[0]
    assert "is not" in check_settings(schema, {"learning_rate": "other"})[0]
    assert open_settings(schema, {"learning_rate": "auto", "batch_size": 3}) == ("learning_rate",)
    assert narrow(schema, {"learning_rate": (None, 0.6)}).properties["learning_rate"].auto
    assert parse_settings(Measuring.Settings, {"learning_rate": "auto"}).learning_rate == "auto"
    with pytest.raises(SettingsError, match="above the maximum"):
        parse_settings(Measuring.Settings, {"learning_rate": 2})
    with pytest.raises(ValueError, match="measured first"):
        measured("auto")


def test_what_a_class_finds_is_checked():
    schema, limits = settings_schema(Measuring.Settings), {"learning_rate": Bounds(0, 0.1)}
    assert check_found(schema, ["batch_size"], {"batch_size": 3}, limits) == {"batch_size": 3}
    for name, given in (
        ("learning_rate", {}),
        ("learning_rate", {"learning_rate": 0.2}),
        ("batch_size", {"batch_size": 2.5}),
    ):
        with pytest.raises(SettingsError, match=name):
            check_found(schema, [name], given, limits)
