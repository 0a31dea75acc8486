"""What a workload's methods are given, what goes over the pipe, and the trainer's environment."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedclient.launch import trainer_environment
from fedclient.trainer import Context, Site, Workload
from fedclient.trainer import api as api_module
from fedclient.trainer.api import CancelledJob
from fedclient.trainer.memory import is_out_of_memory
from fedclient.trainer.wire import (
    Description,
    Device,
    FailReason,
    Failure,
    Job,
    JobKind,
    Progress,
    Result,
    Start,
    Write,
)
from fedclient.trainer.worker import WorkloadError, abilities, check_protocol, seed_everything


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_steps_count_and_report_at_a_bounded_rate(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(api_module, "time", clock)
    seen: list[Progress] = []
    ctx = Context(settings=None, report=seen.append)
    for i in ctx.steps(100):
        assert ctx.step == i
        ctx.log(loss=i)
        clock.now += 0.1
    assert ctx.step == 100
    for _ in ctx.steps(5):
        pass
    assert ctx.step == 105
    assert [(p.step, p.total) for p in seen[:3]] == [(0, 100), (3, 100), (6, 100)]
    assert seen[1].metrics == {"loss": 2.0}
    assert 30 <= len(seen) <= 40


def test_no_steps_at_all():
    assert list(Context(settings=None).steps(0)) == []


def test_a_cancelled_job_ends_at_its_next_step_whatever_handles_exceptions():
    done: list[int] = []
    ctx = Context(settings=None, cancelled=lambda: 3 in done)

    def user_code() -> None:
        try:
            done.extend(i for i in ctx.steps(10))
        except Exception:  # noqa: BLE001 - what user code does
            pytest.fail("a broad handler caught it")

    with pytest.raises(CancelledJob):
        user_code()
    assert done == [0, 1, 2, 3]


def test_metrics_are_the_last_finite_values():
    ctx = Context(settings=None)
    loss = torch.ones(1, requires_grad=True) * 2
    ctx.log(loss=5, accuracy=np.float32(0.5))
    ctx.log(loss=loss, bad=math.nan, worse=-math.inf)
    assert ctx.metrics == {"loss": 2.0, "accuracy": 0.5}
    with pytest.raises(ValueError, match="64"):
        ctx.log(**{"x" * 65: 1})
    with pytest.raises(ValueError, match="64"):
        ctx.log(**{f"m{i}": i for i in range(64)})


@pytest.mark.parametrize("count", [0, 7, np.int64(7), 2**53])
def test_counts(count):
    ctx = Context(settings=None)
    ctx.num_examples = count
    assert ctx.counted() == count
    assert type(ctx.counted()) is int


@pytest.mark.parametrize(
    ("count", "error"), [(None, ValueError), (-1, ValueError), (2**53 + 1, ValueError), (1.0, TypeError)]
)
def test_what_is_no_count(count, error):
    ctx = Context(settings=None)
    ctx.num_examples = count
    with pytest.raises(error):
        ctx.counted()


def test_generators_repeat_by_seed_and_stream():
    a, b = Context(settings=None, seed=5), Context(settings=None, seed=6)
    assert a.rng().random() == a.rng().random() != b.rng().random()
    assert a.rng(1).random() != a.rng().random()
    draws = [torch.rand(1, generator=c.generator(s)).item() for c, s in ((a, 0), (a, 0), (a, 1), (b, 0))]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_seed_everything():
    seed_everything(2**63 - 1)
    first = torch.rand(1).item(), np.random.random()  # noqa: NPY002
    seed_everything(2**63 - 1)
    assert first == (torch.rand(1).item(), np.random.random())  # noqa: NPY002


def test_paths_are_relative_to_the_site_file(tmp_path):
    site = Site("s", tmp_path, {"train": "a/b.csv", "absolute": "/x", "size": 3})
    assert site.path("train") == tmp_path / "a" / "b.csv"
    assert site.path("absolute") == Path("/x")
    for key in ("size", "missing"):
        with pytest.raises(KeyError, match=key):
            site.path(key)


def test_base_class_can_do_nothing(tmp_path):
    base = Workload(Site("s", tmp_path, {}))
    assert abilities(Workload) == ()
    for method in (base.train, base.gradient, base.evaluate):
        with pytest.raises(NotImplementedError):
            method(None, Context(settings=None))
    with pytest.raises(NotImplementedError):
        base.build_model()


MESSAGES = [
    Start("m:C", "w", "s", "/d", {"train": "x", "deep": {"a": [1]}}, "auto"),
    Description({"type": "object"}, ("train",), (Device("cuda:0", "H200", 5), Device("cpu"))),
    Job(
        JobKind.TRAIN,
        {"a": 4, "b": 4.0, "c": [1]},
        2**63,
        "c",
        "r",
        1,
        2,
        Path("/m"),
        "k",
        Path("/o"),
        Write.GRADIENT,
        "BF16",
        3,
        Path("/c"),
        0.5,
        12,
    ),
    Job(JobKind.EVALUATE),
    Progress(1, 2, {"loss": 0.5}, 7, "resumed"),
    Result(1, 2, {"loss": 0.5}, 0.25, (Path("/a"), Path("/b"))),
    Failure(FailReason.STALLED, "E", 1, 2, "t"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_messages_survive_json_and_unknown_keys(message):
    table = json.loads(json.dumps(message.to_json())) | {"type": "x", "later": 1}
    again = type(message).from_json(table)
    assert again == message
    if isinstance(message, Job) and message.settings:
        assert [type(v) for v in again.settings.values()] == [int, float, list]


def test_another_protocol_is_refused():
    with pytest.raises(WorkloadError, match="protocol 99"):
        check_protocol(99)


def test_out_of_memory_by_any_name():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_peak_memory_follows_an_allocation():
    # In a process of its own: this one has had its peak long ago.
    code = """
import numpy as np
from fedlink.memory import peak_memory
before = peak_memory()
block = np.ones(64 << 20, np.uint8)
after = peak_memory()
del block
print(after - before, peak_memory() > after - (1 << 20))  # the kernel counts in batches
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, never_falls = done.stdout.split()
    assert int(grown) >= 60 << 20
    assert never_falls == "True"


def test_environment_holds_no_credential_and_one_import_path(tmp_path):
    environ = {
        "PATH": "/bin",
        "FEDLINK_X": "1",
        "fedclient_y": "1",
        "MY_TOKEN": "1",
        "FEDLINK_FAILPOINTS": "a@1",
        "FEDLINK_FAILPOINTS_LOG": "/log",
        "PYTHONPATH": "/daemon",
        "PYTHONHOME": "/daemon",
        "CUDA_VISIBLE_DEVICES": "1",
    }
    own = trainer_environment(environ, Path(sys.executable), tmp_path)
    assert own["PYTHONPATH"] == f"{tmp_path}:/daemon"
    allowed = {"PATH", "PYTHONPATH", "PYTHONHOME", "CUDA_VISIBLE_DEVICES", "PYTHONUNBUFFERED"}
    assert own.keys() == allowed | {"FEDLINK_FAILPOINTS", "FEDLINK_FAILPOINTS_LOG"}
    foreign = trainer_environment(environ, Path("/other/python"), tmp_path)
    assert foreign["PYTHONPATH"] == str(tmp_path)
    assert "PYTHONHOME" not in foreign
