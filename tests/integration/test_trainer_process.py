"""A real trainer process with a numpy workload: what it gives, and every way it can end."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedclient import launch
from fedclient.launch import FailReason, Job, JobKind, Progress, TrainerFailed, Write
from fedclient.trainer.api import derive_seed
from fedlink.errors import FedlinkError, Reason
from fedlink.settings_schema import Schema, check_settings
from tests.support.trainers import arrays, evaluate, init, make_site, make_trainer, model_files, raw_tensors, train

pytestmark = pytest.mark.slow


@pytest.fixture
async def trainer(tmp_path):
    trainer = make_trainer(make_site(tmp_path / "site"))
    yield trainer
    await trainer.close()


async def test_describes_itself(trainer):
    description = await trainer.describe()
    assert description.abilities == ("train", "gradient", "evaluate")
    assert [d.name for d in description.devices] == ["cpu"]
    schema = Schema.model_validate(description.settings_schema)
    assert not check_settings(schema, {"learning_rate": 1, "fault": "hang", "scales": [1, 2.5]})
    assert len(check_settings(schema, {"learning_rate": 11, "steps": 2.0, "fault": "x", "scales": ["a"], "no": 1})) == 5


async def test_update_is_the_difference(trainer, tmp_path):
    model = await init(trainer, tmp_path / "model", seed=5)
    before = arrays(*model_files(model))
    weights = await train(trainer, model, tmp_path / "y", write=Write.WEIGHTS)
    delta = await train(trainer, model, tmp_path / "d")
    after, change = arrays(*weights.files), arrays(*delta.files)
    assert [p.name for p in delta.files] == ["update.safetensors"]
    assert set(change) == set(before) == set(after) == {"w", "bias", "tied", "empty", "half", "count", "mask"}
    for name in ("w", "tied", "empty"):
        assert change[name].dtype == np.float32
        assert np.array_equal(change[name], after[name] - before[name])
    assert change["half"].dtype == np.float32
    assert np.array_equal(change["half"], after["half"].astype(np.float32) - before["half"].astype(np.float32))
    assert change["bias"].dtype == np.float64
    assert change["bias"] == -0.75
    assert change["count"] == 3
    assert change["mask"].tolist() == [True, False]
    assert (delta.num_examples, delta.steps) == (17, 3)
    assert set(delta.metrics) == {"loss"}, "a metric that is not finite is not reported"
    assert delta.compute_seconds > 0


@pytest.mark.parametrize(("dtype", "name"), [("BF16", "bfloat16"), ("F16", "float16")])
async def test_update_dtype_rounds_the_difference_once(trainer, tmp_path, dtype, name):
    model = await init(trainer, tmp_path / "model")
    full = arrays(*(await train(trainer, model, tmp_path / "f")).files)
    small = arrays(*(await train(trainer, model, tmp_path / "s", update_dtype=dtype)).files)
    assert small["w"].dtype.name == name
    assert small["w"].tobytes() == full["w"].astype(small["w"].dtype).tobytes()
    assert small["bias"].dtype == np.float64


async def test_gradient_missing_parameters_are_zero(trainer, tmp_path):
    model = await init(trainer, tmp_path / "model")
    result = await train(trainer, model, tmp_path / "g", write=Write.GRADIENT)
    found = arrays(*result.files)
    assert np.array_equal(found["w"], np.full((4, 5), 0.5, np.float32))
    assert found["bias"] == 2.0
    assert not found["half"].any()
    assert found["count"] == 0
    assert (result.num_examples, result.steps) == (5, 0)


async def test_warm_and_fresh_processes_give_the_same_bits(tmp_path):
    site = make_site(tmp_path / "site")
    warm, fresh = make_trainer(site), make_trainer(site)
    try:
        model = await init(warm, tmp_path / "model")
        await train(warm, model, tmp_path / "0", round=1)
        await evaluate(warm, model, tmp_path / "e", model_key="k")
        a = await train(warm, model, tmp_path / "a", round=2, model_key="k")
        b = await train(fresh, model, tmp_path / "b", round=2, model_key="k")
        c = await train(warm, model, tmp_path / "c", round=3, model_key="k")
        assert raw_tensors(*a.files) == raw_tensors(*b.files)
        assert raw_tensors(*c.files) != raw_tensors(*a.files), "rounds draw differently"
    finally:
        await warm.close()
        await fresh.close()


async def test_process_is_kept_and_let_go(tmp_path):
    trainer = make_trainer(make_site(tmp_path / "site", keep_warm=0.2))
    model = await init(trainer, tmp_path / "model")
    first = await evaluate(trainer, model, tmp_path / "e")
    again = await evaluate(trainer, model, tmp_path / "e")
    assert first.metrics["pid"] == again.metrics["pid"]
    await until(lambda: not alive(int(first.metrics["pid"])))
    later = await evaluate(trainer, model, tmp_path / "e")
    assert later.metrics["pid"] != first.metrics["pid"]
    assert later.metrics["accuracy"] == first.metrics["accuracy"]
    await trainer.close()
    assert not alive(int(later.metrics["pid"]))


async def test_killed_between_jobs_it_is_started_again(trainer, tmp_path):
    model = await init(trainer, tmp_path / "model")
    pid = int((await evaluate(trainer, model, tmp_path / "e")).metrics["pid"])
    os.kill(pid, 9)
    await until(lambda: not trainer._child.alive)
    assert (await evaluate(trainer, model, tmp_path / "e")).metrics["pid"] != pid


FAULTS = {
    "exception": (FailReason.EXCEPTION, "ValueError", 0, False),
    "sys_exit": (FailReason.EXCEPTION, "SystemExit", 0, False),
    "no_count": (FailReason.EXCEPTION, "ValueError", 0, False),
    "dtype": (FailReason.EXCEPTION, "ModelMismatchError", 0, False),
    "memory": (FailReason.OUT_OF_MEMORY, "MemoryError", 0, True),
    "segfault": (FailReason.CRASHED, "", -11, True),
    "kill": (FailReason.CRASHED, "", -9, True),
    "exit": (FailReason.CRASHED, "", 3, True),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_each_failure_is_reported_and_survived(trainer, tmp_path, fault):
    model = await init(trainer, tmp_path / "model")
    good = await train(trainer, model, tmp_path / "good")
    with pytest.raises(TrainerFailed) as caught:
        await train(trainer, model, tmp_path / "bad", settings={"fault": fault, "pause": 0.3})
    e = caught.value
    assert (e.reason, e.exception_class, e.exit_code, e.retryable) == FAULTS[fault]
    assert e.step >= 1
    assert e.memory_bytes > 1 << 20
    assert "secret" not in e.message
    assert str(tmp_path) not in e.message
    again = await train(trainer, model, tmp_path / "again")
    assert raw_tensors(*again.files) == raw_tensors(*good.files)


async def test_output_goes_to_the_log_and_the_tail_is_at_hand(trainer, tmp_path):
    model = await init(trainer, tmp_path / "model")
    with pytest.raises(TrainerFailed) as caught:
        await train(trainer, model, tmp_path / "bad", settings={"fault": "exception"})
    assert caught.value.output.startswith("secret patient 4711\n")
    assert "about to fail" in caught.value.output
    text = trainer.log_path.read_text()
    assert "about to fail" in text
    assert "Traceback" in text
    assert trainer.log_path.stat().st_mode & 0o077 == 0


async def test_log_is_bounded(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("fedclient.child.LOG_LIMIT", 300_000)
    model = await init(trainer, tmp_path / "model")
    for i in range(5):
        await train(trainer, model, tmp_path / str(i), settings={"fault": "noisy"})
    sizes = [p.stat().st_size for p in trainer.log_path.parent.glob("trainer-*")]
    assert len(sizes) == 2
    assert max(sizes) <= 300_000


async def test_hang_is_noticed_and_killed_with_its_children(tmp_path):
    trainer = make_trainer(make_site(tmp_path / "site", stall_after=3.0))
    model = await init(trainer, tmp_path / "model")
    with pytest.raises(TrainerFailed) as caught:
        await train(trainer, model, tmp_path / "bad", settings={"fault": "hang", "child_pid_file": "pids"})
    assert caught.value.reason is FailReason.STALLED
    assert caught.value.retryable
    pids = [int(p) for p in (tmp_path / "site" / "pids").read_text().split()]
    await until(lambda: not any(map(alive, pids)))
    await trainer.close()


async def test_slow_but_moving_is_no_stall(tmp_path):
    trainer = make_trainer(make_site(tmp_path / "site", stall_after=3.0))
    model = await init(trainer, tmp_path / "model")
    result = await train(trainer, model, tmp_path / "u", settings={"steps": 9, "pause": 0.4, "at": -1})
    assert result.steps == 9
    await trainer.close()


async def test_progress_is_relayed(trainer, tmp_path):
    model = await init(trainer, tmp_path / "model")
    (tmp_path / "u").mkdir()
    seen: list[Progress] = []
    job = Job(
        JobKind.TRAIN, {"steps": 8, "pause": 0.1}, model_dir=model, out_dir=tmp_path / "u", client="site-1", round=1
    )
    await trainer.run(job, seen.append)
    steps = [p.step for p in seen]
    assert steps == sorted(steps)
    assert 3 <= len(seen) <= 8
    assert seen[-1].total == 8
    assert "loss" in seen[-1].metrics


async def test_cancel_stops_at_the_next_step_and_keeps_the_process(trainer, tmp_path):
    model = await init(trainer, tmp_path / "model")
    pid = (await evaluate(trainer, model, tmp_path / "e")).metrics["pid"]
    running = asyncio.create_task(
        train(trainer, model, tmp_path / "u", settings={"steps": 1000, "pause": 0.02, "at": -1})
    )
    await asyncio.sleep(0.3)
    await trainer.cancel()
    with pytest.raises(TrainerFailed) as caught:
        await running
    assert caught.value.reason is FailReason.CANCELLED
    assert (await evaluate(trainer, model, tmp_path / "e")).metrics["pid"] == pid
    await trainer.cancel()


async def test_cancel_kills_what_does_not_listen(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "CANCEL_GRACE", 0.3)
    model = await init(trainer, tmp_path / "model")
    running = asyncio.create_task(train(trainer, model, tmp_path / "u", settings={"fault": "hang"}))
    await asyncio.sleep(0.3)
    await trainer.cancel()
    with pytest.raises(TrainerFailed) as caught:
        await running
    assert caught.value.reason is FailReason.CANCELLED
    assert (await train(trainer, model, tmp_path / "v")).num_examples == 17


async def test_cancelling_the_awaiting_task_kills(trainer, tmp_path):
    model = await init(trainer, tmp_path / "model")
    pid = int((await evaluate(trainer, model, tmp_path / "e")).metrics["pid"])
    running = asyncio.create_task(train(trainer, model, tmp_path / "u", settings={"fault": "hang"}))
    await asyncio.sleep(0.3)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not alive(pid)


async def test_close_ends_a_running_job(trainer, tmp_path):
    model = await init(trainer, tmp_path / "model")
    running = asyncio.create_task(train(trainer, model, tmp_path / "u", settings={"fault": "hang"}))
    await asyncio.sleep(0.3)
    await trainer.close()
    with pytest.raises(TrainerFailed) as caught:
        await running
    assert caught.value.reason is FailReason.CANCELLED
    with pytest.raises(TrainerFailed):
        await evaluate(trainer, model, tmp_path / "e")


DAEMON = """
import asyncio, pathlib, sys
sys.path.insert(0, {root!r})
from tests.support.trainers import *
async def main():
    trainer = make_trainer(make_site(pathlib.Path({site!r})))
    model = await init(trainer, pathlib.Path({site!r}) / "model")
    await train(trainer, model, pathlib.Path({site!r}) / "u", settings={{"fault": "hang", "child_pid_file": "pids"}})
asyncio.run(main())
"""


async def test_a_killed_daemon_leaves_no_orphan(tmp_path):
    root = str(Path(__file__).parents[2])
    code = DAEMON.format(root=root, site=str(tmp_path / "site"))
    daemon = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    pid_file = tmp_path / "site" / "pids"
    await until(lambda: pid_file.exists() and len(pid_file.read_text().split()) == 2)
    pids = [int(p) for p in pid_file.read_text().split()]
    assert all(map(alive, pids))
    daemon.kill()
    await daemon.wait()
    await until(lambda: not any(map(alive, pids)))


async def test_no_credential_reaches_the_process(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLINK_TOKEN_FILE", "/x")
    monkeypatch.setenv("SITE_TOKEN", "x")
    trainer = make_trainer(make_site(tmp_path / "site"))
    model = await init(trainer, tmp_path / "model")
    assert (await evaluate(trainer, model, tmp_path / "e")).metrics["secrets"] == 0
    await trainer.close()


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("toy:NotOne", "derives from fedclient.trainer.Workload"),
        ("toy:Missing", "no class Missing"),
        ("toy:NoMethods", "at least one of"),
        ("toy:BadSettings", "table: a setting cannot be"),
        ("nowhere:Toy", "nowhere"),
    ],
)
async def test_a_class_that_cannot_be_used_is_said_plainly(tmp_path, name, cause):
    trainer = make_trainer(make_site(tmp_path / "site", name))
    with pytest.raises(TrainerFailed) as caught:
        await trainer.describe()
    assert caught.value.reason is FailReason.EXCEPTION
    assert f"its trainer {name} cannot be used" in caught.value.message
    assert cause in caught.value.output
    await trainer.close()


async def test_abilities_are_what_is_overridden(tmp_path):
    trainer = make_trainer(make_site(tmp_path / "site", "toy:Minimal"))
    assert (await trainer.describe()).abilities == ("train",)
    model = await init(trainer, tmp_path / "model")
    with pytest.raises(TrainerFailed) as caught:
        await evaluate(trainer, model, tmp_path / "e")
    assert caught.value.exception_class == "WorkloadError"
    await trainer.close()


async def test_an_interpreter_that_is_not_there(tmp_path):
    trainer = make_trainer(make_site(tmp_path / "site", python=Path("no/python")))
    with pytest.raises(FedlinkError) as caught:
        await trainer.describe()
    assert caught.value.reason is Reason.BAD_CONFIG
    await trainer.close()


async def test_settings_that_do_not_fit_name_the_field(trainer, tmp_path):
    model = await init(trainer, tmp_path / "model")
    with pytest.raises(TrainerFailed) as caught:
        await train(trainer, model, tmp_path / "u", settings={"steps": 2.5})
    assert "steps: 2.5 is not an integer" in caught.value.output


async def test_another_model_is_refused_by_name(tmp_path):
    toy, minimal = (make_trainer(make_site(tmp_path / "site", f"toy:{name}")) for name in ("Toy", "Minimal"))
    model = await init(toy, tmp_path / "model")
    other = await init(minimal, tmp_path / "other")
    with pytest.raises(TrainerFailed) as caught:
        await train(minimal, model, tmp_path / "u")
    assert "has 'w'" not in caught.value.output
    assert "the run's model has" in caught.value.output
    with pytest.raises(TrainerFailed) as caught:
        await train(toy, other, tmp_path / "v")
    assert "no such tensor" in caught.value.output or "in the run's model and" in caught.value.output
    await toy.close()
    await minimal.close()


def test_seeds_differ_by_everything():
    one = derive_seed(1, "a", 1)
    others = [derive_seed(2, "a", 1), derive_seed(1, "b", 1), derive_seed(1, "a", 2)]
    others.append(derive_seed(1, "a", 1, JobKind.EVALUATE))
    assert len({one, *others}) == 5
    assert all(0 <= s < 1 << 63 for s in others)
    assert derive_seed(1, "a", 1) == one


async def test_init_repeats_by_seed(trainer, tmp_path):
    a, b, c = [await init(trainer, tmp_path / str(i), seed) for i, seed in enumerate((7, 7, 8))]
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert (a / "model.safetensors").read_bytes() != (c / "model.safetensors").read_bytes()
    assert list(raw_tensors(a / "model.safetensors")) == ["bias", "count", "empty", "tied", "w", "half", "mask"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.02)
