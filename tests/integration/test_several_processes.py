"""Several real trainer processes under torch's launcher: the update of one process, and what happens if one fails."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedclient.launch import FailReason, Job, JobKind, Trainer, TrainerFailed, Write
from fedclient.settings import SiteSettings, load_site
from tests.support.federation import alive, program, until
from tests.support.interrupted import ALWAYS
from tests.support.tiny_models import reviews, save_bert, save_llama, write_jsonl
from tests.support.trainers import arrays, describe_model, evaluate, ignore, init, make_site, make_trainer, train

TOLERANCE = 2e-5
"""Between updates of one and of several processes, for numbers of 0.01 to 1: sums of float32 in another order."""

BLOCKS = 24
WHOLE = 4
"""Blocks that are whole at once in a step: weights of this one and the next, and a gradient, which is also sent."""


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def user_site(directory: Path, processes: int, strategy: str = "ddp", **data: Any) -> SiteSettings:
    several = {"processes": processes, "strategy": strategy}
    return make_site(directory, "pairs:Pairs", data=data, distributed=several, stall_after=data.pop("stall", 120.0))


async def trained(trainer: Trainer, model: Path, out: Path, **job: Any) -> dict[str, np.ndarray]:
    result = await train(trainer, model, out, **job)
    return arrays(*result.files)


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    assert max(float(np.abs(array).max()) for array in wanted.values()) > 0.005
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
async def test_two_processes_give_the_update_of_one_for_a_users_class(tmp_path: Path, strategy: str):
    one, two = make_trainer(user_site(tmp_path / "1", 1)), make_trainer(user_site(tmp_path / "2", 2, strategy))
    try:
        model = await init(two, tmp_path / "model", seed=3)
        for i, settings in enumerate([{}, {"accumulation": 2, "batch_size": 5}]):
            wanted = await trained(one, model, tmp_path / f"one-{i}", settings=settings, seed=5)
            result = await train(two, model, tmp_path / f"two-{i}", settings=settings, seed=5)
            assert_close(arrays(*result.files), wanted)
            assert result.num_examples == 33
            assert result.metrics["seen"] < 40, "each has seen its part alone"
        assert not wanted["unused.weight"].any()
        wanted = await trained(one, model, tmp_path / "g1", write=Write.GRADIENT)
        assert_close(await trained(two, model, tmp_path / "g2", write=Write.GRADIENT), wanted)
        measured = [await evaluate(trainer, model, tmp_path / "e") for trainer in (one, two)]
        assert measured[1].metrics == pytest.approx(measured[0].metrics, abs=1e-6), "all of it, in one process"
    finally:
        await one.close()
        await two.close()


BERT = """
name = "site-1"
[workload.w]
trainer = "sequence_classification"
model = "bert"
[workload.w.data]
train = "train.jsonl"
test = "test.jsonl"
labels = ["neg", "pos"]
[workload.w.precision]
autocast = "float32"
[workload.w.distributed]
"""
BUILT_IN = {"learning_rate": 0.005, "batch_size": 3, "accumulation": 2, "epochs": 2, "optimizer": "adamw"}


def text_site(directory: Path, distributed: str, **config: Any) -> SiteSettings:
    save_bert(directory / "bert", **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | config)
    write_jsonl(directory / "train.jsonl", reviews(19))
    write_jsonl(directory / "test.jsonl", reviews(10, first=100))
    (directory / "site.toml").write_text(BERT + distributed)
    return load_site(directory / "site.toml")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
async def test_two_processes_give_the_update_of_one_for_a_built_in_workload(tmp_path: Path, strategy: str):
    one = make_trainer(text_site(tmp_path / "1", "processes = 1"))
    two = make_trainer(text_site(tmp_path / "2", f'processes = 2\nstrategy = "{strategy}"'))
    try:
        model = await init(one, tmp_path / "model", seed=3)
        # The last step has one example: the second process then has none of its own.
        wanted = await train(one, model, tmp_path / "one", settings=BUILT_IN)
        found = await train(two, model, tmp_path / "two", settings=BUILT_IN)
        assert_close(arrays(*found.files), arrays(*wanted.files))
        assert found.num_examples == wanted.num_examples == 19
        assert found.metrics["loss"] == pytest.approx(wanted.metrics["loss"], abs=1e-5)
        gradients = [await train(t, model, tmp_path / n, write=Write.GRADIENT) for t, n in ((one, "g1"), (two, "g2"))]
        assert_close(*(arrays(*result.files) for result in gradients))
        settings = {"eval_batch_size": 3, "metrics": ["auroc"]}
        measured = [await evaluate(t, model, tmp_path / "e", settings=settings) for t in (one, two)]
        assert [m.num_examples for m in measured] == [10, 10]
        assert measured[1].metrics == pytest.approx(measured[0].metrics, abs=1e-5)
    finally:
        await one.close()
        await two.close()


LLAMA = """
name = "site-1"
[workload.w]
trainer = "causal_lm"
model = "llama"
data = { train = "train.jsonl", test = "train.jsonl", max_length = 16, prompts = ["the"], sample_tokens = 4 }
precision = { autocast = "float32", gradient_checkpointing = true }
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("adapters", ["", "lora = { rank = 4, alpha = 8 }\n"], ids=["tied", "lora"])
async def test_tied_weights_and_adapters_train_as_in_one_process(tmp_path: Path, strategy: str, adapters: str):
    trainers = []
    for processes in (1, 2):
        directory = tmp_path / str(processes)
        save_llama(directory / "llama")
        write_jsonl(directory / "train.jsonl", reviews(13))
        several = f'distributed = {{ processes = {processes}, strategy = "{strategy}" }}\n'
        (directory / "site.toml").write_text(LLAMA + adapters + several)
        trainers.append(make_trainer(load_site(directory / "site.toml")))
    try:
        model = await init(trainers[0], tmp_path / "model", seed=3)
        # A rule whose steps are as large as the gradient: Adam's tell not zero from nearly zero.
        settings = {"optimizer": "sgd", "learning_rate": 0.2, "batch_size": 3, "epochs": 2}
        results = [await train(t, model, tmp_path / f"out-{i}", settings=settings) for i, t in enumerate(trainers)]
        one, two = (arrays(*result.files) for result in results)
        assert_close(two, one)
        measured = [await evaluate(t, model, tmp_path / "e", settings={"samples": 1}) for t in trainers]
        assert measured[1].metrics["loss"] == pytest.approx(measured[0].metrics["loss"], abs=1e-5)
    finally:
        for trainer in trainers:
            await trainer.close()


async def failed(trainer: Trainer, model: Path, out: Path, **job: Any) -> TrainerFailed:
    with pytest.raises(TrainerFailed) as caught:
        await train(trainer, model, out, **job)
    return caught.value


def gone(marker: Path) -> bool:
    """Whether the process that wrote its number there is no more."""
    try:
        return Path(f"/proc/{marker.read_text()}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
async def test_a_process_that_is_killed_fails_the_job_and_another_number_goes_on(tmp_path: Path, strategy: str):
    checked = {"checkpoint_dir": tmp_path / "checkpoints", "checkpoint_every": ALWAYS, "seed": 5}
    one, two = (make_trainer(user_site(tmp_path / "site", n, strategy, trouble="kill")) for n in (1, 2))
    marker = tmp_path / "site" / "marker"
    try:
        model = await init(one, tmp_path / "model", seed=3)
        # As if its trouble had been before.
        marker.write_text("0")
        wanted = await trained(one, model, tmp_path / "whole", seed=5)
        marker.unlink()
        failure = await failed(two, model, tmp_path / "killed", **checked)
        assert (failure.reason, failure.exit_code, failure.retryable) == (FailReason.CRASHED, -9, True)
        assert "rank 1 of the trainer's processes ended by signal 9 (SIGKILL), step 4" in failure.message
        assert (tmp_path / "checkpoints" / "checkpoint.safetensors").exists()
        until(lambda: gone(marker), "the killed one to go")
        shutil.copytree(tmp_path / "checkpoints", tmp_path / "again")
        notes: list[str] = []
        for trainer, name, kept in ((two, "same", "checkpoints"), (one, "fewer", "again")):
            found = await train(
                trainer,
                model,
                tmp_path / name,
                on_progress=lambda p: notes.append(p.note),
                **checked | {"checkpoint_dir": tmp_path / kept},
            )
            assert_close(arrays(*found.files), wanted)
            assert notes.count("resumed from a local checkpoint") == 1
            notes.clear()
    finally:
        await one.close()
        await two.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("trouble", "reason", "text"),
    [
        ("stop", FailReason.STALLED, "rank 1 of the trainer's processes made no progress for 60 s"),
        ("raise", FailReason.EXCEPTION, "LookupError, step 4"),
        ("differ", FailReason.EXCEPTION, "RanksDifferError"),
    ],
)
async def test_a_process_that_hangs_or_raises_fails_the_job_by_name(
    tmp_path: Path, trouble: str, reason: FailReason, text: str
):
    trainer = make_trainer(user_site(tmp_path, 2, trouble=trouble, stall=60.0))
    try:
        model = await init(trainer, tmp_path / "model")
        failure = await failed(trainer, model, tmp_path / "out")
        assert failure.reason is reason
        assert text in failure.message
        until(lambda: gone(tmp_path / "marker"), "the processes to end")
        await train(trainer, model, tmp_path / "next")
    finally:
        await trainer.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("trouble", ["child", "orphan"])
async def test_what_a_process_started_ends_with_it(tmp_path: Path, trouble: str):
    """In a session of its own, of a job that is given up; and in that of a process that was killed."""
    trainer = make_trainer(user_site(tmp_path, 2, trouble=trouble))
    try:
        model = await init(trainer, tmp_path / "model")
        training = asyncio.create_task(train(trainer, model, tmp_path / "out"))
        marker = tmp_path / "marker"
        await asyncio.to_thread(until, lambda: marker.exists() and marker.read_text(), "the child to be started")
        if trouble == "child":
            assert not gone(marker)
            training.cancel()
        with pytest.raises((TrainerFailed, asyncio.CancelledError)):
            await training
        until(lambda: gone(marker), "the child to end")
    finally:
        await trainer.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_two_commands_train_beside_each_other(tmp_path: Path):
    site = user_site(tmp_path, 2)
    trainers = [make_trainer(site) for _ in range(2)]
    try:
        models = await asyncio.gather(*(init(t, tmp_path / f"model-{i}", seed=3) for i, t in enumerate(trainers)))
        found = await asyncio.gather(
            *(trained(t, m, tmp_path / f"out-{i}") for i, (t, m) in enumerate(zip(trainers, models, strict=True)))
        )
        assert_close(*found)
    finally:
        for trainer in trainers:
            await trainer.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rank", [0, 1])
async def test_a_process_that_others_wait_for_long_is_let_be_as_long_as_it_is_alive(tmp_path: Path, rank: int):
    # Importing torch counts, too, which takes its time on a busy machine.
    data = {"seconds": 40.0, "rank": rank, "update": rank == 0}
    several = {"processes": 2, "strategy": "ddp"}
    site = make_site(tmp_path / "site", "lingering:Lingering", data=data, distributed=several, stall_after=30.0)
    trainer = make_trainer(site)
    try:
        model = await init(trainer, tmp_path / "model")
        result = await train(trainer, model, tmp_path / "out")
        assert result.steps == 10
    finally:
        await trainer.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_processes_of_two_nodes_train_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    one = make_trainer(text_site(tmp_path / "1", "processes = 1"))
    nodes = f'processes = 1\nnodes = 2\nrendezvous = "127.0.0.1:{port}"'
    first = make_trainer(text_site(tmp_path / "2", nodes))
    command = [program("fedclient"), "join", "w", "--config", str(tmp_path / "2" / "site.toml"), "--node", "1"]
    others = [subprocess.Popen(command)]
    try:
        model = await init(one, tmp_path / "model", seed=3)
        wanted = await train(one, model, tmp_path / "one", settings=BUILT_IN)

        async def train_together(name: str) -> None:
            found = await train(first, model, tmp_path / name, settings=BUILT_IN)
            assert_close(arrays(*found.files), arrays(*wanted.files))

        await train_together("two")
        # Let go, they meet again.
        await first._end()
        await train_together("again")
        began = descendants(others[0].pid)
        assert len(began) >= 2, "the launcher and a rank"
        others[0].kill()
        others[0].wait()
        until(lambda: not any(map(alive, began)), "what it started to end")
        others.append(subprocess.Popen(command))
        # The first machine's processes have lost one, and are let go.
        await first._end()
        await train_together("another time")
        others[1].terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            others[1].wait(3)
        await train_together("after the signal")
        await first.close()
        assert others[1].wait(60) == 0
        others.append(subprocess.Popen(command))
        launchers = until(lambda: descendants(others[2].pid), "its launcher to be started")
        others[2].terminate()
        assert others[2].wait(60) == 0, "nothing is under way"
        until(lambda: not any(map(alive, launchers)), "its launcher to end")
    finally:
        for other in others:
            other.kill()
            other.wait()
        await one.close()
        await first.close()


def descendants(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_machines_that_do_not_come_are_missed_by_name(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        meeting = f"127.0.0.1:{taken.getsockname()[1]}"
    distributed = {"processes": 1, "nodes": 3, "rendezvous": meeting}
    trainer = make_trainer(make_site(tmp_path, "pairs:Pairs", distributed=distributed, stall_after=20.0))
    try:
        with pytest.raises(TrainerFailed, match=f"3 machines were to come to rendezvous {meeting}.* `fedclient join`"):
            await trainer.describe()
    finally:
        await trainer.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("learns", [False, True], ids=["moved", "learning"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
async def test_with_fsdp_no_process_ever_holds_the_whole_model(tmp_path: Path, strategy: str, learns: bool):
    several = {"processes": 2, "strategy": strategy}
    data = {"learns": learns}
    site = make_site(tmp_path / "site", "blocks:Blocks", data=data, distributed=several, stall_after=120.0)
    directory = tmp_path / "model"
    directory.mkdir()
    block = 4 * 2048 * 2048
    for i in range(BLOCKS):
        save_file({f"blocks.{i}.weight": torch.full((2048, 2048), 0.5)}, directory / f"{i}.safetensors")
    describe_model(directory, [f"{i}.safetensors" for i in range(BLOCKS)])
    trainer = make_trainer(site)
    kept = tmp_path / "checkpoints"
    try:
        result = await train(trainer, directory, tmp_path / "out", checkpoint_dir=kept, checkpoint_every=ALWAYS)
    finally:
        await trainer.close()
    moved = load_file(result.files[3])
    if learns:
        assert all(((tensor + 0.02).abs() < 0.002).all() for tensor in moved.values()), "two steps of 0.01 each"
        assert (kept / "checkpoint.safetensors").stat().st_size > 3 * BLOCKS * block
    else:
        assert all((tensor == 0.25).all() for tensor in moved.values())
    # What the processes had before there was a model; and the most they had, with loading and, for the first, writing.
    before, after = ([int(p.read_text()) for p in sorted(site.directory.glob(f"{n}-*"))] for n in ("before", "after"))
    used = [result.memory_bytes - before[0], *(a - b for a, b in zip(after, before, strict=True))]
    print(f"\n{strategy}: of {BLOCKS * block >> 20} MiB the processes held {[n >> 20 for n in used]} MiB at most")
    # Its share, a file, and some room for windows and for what torch loads late.
    bound = BLOCKS * block // 2 + block + (80 << 20)
    if learns:
        # As large again: its share of the gradient, and of two states of AdamW. Then the blocks that are whole.
        bound += 3 * (BLOCKS * block // 2) + WHOLE * block
    assert all(n < bound for n in used) == (strategy == "fsdp")


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_where_there_is_one_process_nothing_is_shared(tmp_path: Path):
    site = make_site(tmp_path / "site", "pairs:Pairs", distributed={}, stall_after=120.0)
    assert site.workload["w"].distributed is not None
    assert site.workload["w"].distributed.processes == "auto"
    trainer = make_trainer(site)
    try:
        model = await init(trainer, tmp_path / "model")
        assert (await train(trainer, model, tmp_path / "out")).metrics["seen"] == 2 * 33
        assert not [*site.state_dir.glob("ranks-w-cpu*")], "nor started"
    finally:
        await trainer.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_one_process_with_fsdp_trains_shares_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    plain, alone = (make_trainer(user_site(tmp_path / name, 1, name)) for name in ("ddp", "fsdp"))
    notes: list[str] = []
    try:
        model = await init(alone, tmp_path / "model", seed=3)
        wanted = await train(plain, model, tmp_path / "plain", seed=5)
        found = await train(alone, model, tmp_path / "alone", seed=5, on_progress=lambda p: notes.append(p.note))
        assert_close(arrays(*found.files), arrays(*wanted.files))
        assert (wanted.metrics["shares"], found.metrics["shares"]) == (0, 6)
        assert sum("Net has no parts that could be gathered one at a time" in note for note in notes) == 1
    finally:
        await plain.close()
        await alone.close()
    assert not [*temporary.glob("torchelastic*")]


def calibrate(model: Path, settings: dict[str, Any]) -> Job:
    return Job(JobKind.CALIBRATE, settings=settings, client="site-1", run="r", model_dir=model)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
async def test_limits_and_what_is_measured_are_those_of_all_processes(tmp_path: Path, strategy: str):
    trainer = make_trainer(user_site(tmp_path, 2, strategy, room=11))
    try:
        model = await init(trainer, tmp_path / "model", seed=3)
        for i, says in enumerate((False, True)):
            result = await train(trainer, model, tmp_path / f"{i}", settings={"says": says}, asked={"examples": 20})
            assert (result.steps, result.examples_seen, result.cut) == (3, 24, "run examples")
        # Rank 1's clock stands at another time altogether.
        settings = {"pause": 0.1, "epochs": 200}
        result = await train(trainer, model, tmp_path / "time", settings=settings, share={"max_seconds": 1.0})
        assert 0 < result.steps < 11
        epochs, steps = divmod(result.steps, 5)
        assert (result.cut, result.examples_seen) == ("site max_seconds", 33 * epochs + 8 * steps)
        settings = {"learning_rate": "auto"} | ({"batch_size": "auto"} if strategy == "ddp" else {})
        result = await trainer.run(calibrate(model, settings), ignore)
        assert result.found.get("batch_size", 11) == 11
        assert result.found["learning_rate"] > 1e-6
        again = await train(trainer, model, tmp_path / "measured", settings=settings)
        assert again.steps == (6 if strategy == "ddp" else 10)
        if strategy == "fsdp":
            with pytest.raises(TrainerFailed) as caught:
                await trainer.run(calibrate(model, {"batch_size": "auto"}), ignore)
            assert 'batch_size = "auto" cannot be measured with strategy = "fsdp"' in caught.value.own_words
    finally:
        await trainer.close()


def assert_as_close_as_adam(
    found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], *, rate: float, steps: int
) -> None:
    """As close as rounding leaves what AdamW made of the gradients.

    A step is rate * g / (|g| + 1e-8). Here gradients differ by 1e-10 at most, which moves a weight by at most
    rate * 1e-10 / 1e-8, a hundredth of the rate, and by so much only where the gradient is nearly zero. Zero but for
    rounding are those of the keys' biases, for softmax does not see them, and of words that the loss hardly sees.
    """
    apart = np.concatenate([np.abs(found[name] - array).reshape(-1) for name, array in wanted.items()])
    assert found.keys() == wanted.keys()
    assert (apart > TOLERANCE).mean() < 0.02
    assert apart.max() < steps * rate / 100


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("strategy", "optimizer"), [("ddp", "adamw"), ("ddp", "sgd"), ("fsdp", "sgd")])
async def test_two_processes_find_the_rate_of_one_and_train_with_it(tmp_path: Path, strategy: str, optimizer: str):
    one = make_trainer(text_site(tmp_path / "1", "processes = 1"))
    two = make_trainer(text_site(tmp_path / "2", f'processes = 2\nstrategy = "{strategy}"'))
    whole = {"batch_size": "auto"} if strategy == "ddp" else {"batch_size": 4}
    settings = {"learning_rate": "auto", "effective_batch_size": 4, "steps": 3, "optimizer": optimizer} | whole
    try:
        model = await init(one, tmp_path / "model", seed=3)
        searched = [(await t.run(calibrate(model, settings), ignore)).found for t in (one, two)]
        assert searched[1] == searched[0]
        results = [await train(t, model, tmp_path / n, settings=settings) for t, n in ((one, "one"), (two, "two"))]
        assert [result.steps for result in results] == [3, 3]
        wanted, found = (arrays(*result.files) for result in results)
        if optimizer == "sgd":
            assert_close(found, wanted)
        else:
            assert_as_close_as_adam(found, wanted, rate=searched[0]["learning_rate"], steps=3)
    finally:
        await one.close()
        await two.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_cancelled_they_stop_and_stay_warm(tmp_path: Path):
    trainer = make_trainer(user_site(tmp_path, 2))
    try:
        model = await init(trainer, tmp_path / "model")
        child = trainer._child
        begun = asyncio.Event()
        endless = asyncio.create_task(
            train(trainer, model, tmp_path / "out", settings={"epochs": 100000}, on_progress=lambda _: begun.set())
        )
        await begun.wait()
        await trainer.cancel()
        with pytest.raises(TrainerFailed, match="cancelled"):
            await endless
        await train(trainer, model, tmp_path / "next")
        assert trainer._child is child
    finally:
        await trainer.close()
