"""Training without a server: through the functions, and through the commands as a person runs them."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedclient.local import init_model, train_local
from fedclient.local_files import LocalModel, export_model, import_model, next_version
from fedclient.trainer.api import Context, Site, derive_seed
from fedclient.trainer.worker import seed_everything
from fedlink.companions import INDEX_NAME
from fedlink.errors import FedlinkError, Reason
from fedlink.run_file import RunSpec
from fedlink.tensors import DTYPES, Role, ShardWriter, TensorSpec, apply_metadata, read_header, roles_metadata
from tests.support.classes.toy import Toy
from tests.support.federation import PATIENCE, program
from tests.support.trainers import arrays, make_site, raw_tensors
from tests.support.zygote import Command

SITE = """
name = "site-1"
[workload.w]
trainer = "toy:Toy"
[workload.w.limits]
learning_rate = { max = 1.0 }
"""
RUN = """
workload = "w"
rounds = 3
seed = 11
[settings]
learning_rate = 0.25
"""


@pytest.fixture
def site(tmp_path):
    return make_site(tmp_path / "site")


def spec(**table) -> RunSpec:
    return RunSpec.model_validate({"workload": "w", "rounds": 3, "seed": 11} | table)


async def test_the_share_of_the_site_and_the_work_of_the_run_count_here_too(tmp_path):
    alone = make_site(tmp_path / "alone")
    run = await train_local(alone, spec(rounds=1, work={"steps": "balanced", "mean_steps": 2}))
    assert (run.versions[1].steps, run.versions[1].train_examples) == (2, 17)
    small = make_site(tmp_path / "small", share={"steps": 1})
    run = await train_local(small, spec(rounds=1, work={"steps": 2}))
    assert (run.versions[1].steps, run.versions[1].train_examples) == (1, 9)


async def test_rounds_follow_one_another(site, tmp_path):
    seen = []
    run = await train_local(site, spec(), output=tmp_path / "last.safetensors", on_version=seen.append)
    assert [v.version for v in run.versions] == [0, 1, 2, 3]
    assert list(run.versions) == seen
    start = tmp_path / "start.safetensors"
    await init_model(site, "w", start, seed=11)
    before, after = arrays(start), arrays(tmp_path / "last.safetensors")
    assert after["count"] == 9
    assert after["bias"] == before["bias"] - 9 * 0.25
    assert np.allclose(after["tied"], before["tied"] + 9)
    assert run.versions[0].train == {}
    assert run.versions[3].train_examples == 17
    assert run.versions[3].test_examples == 9
    assert run.versions[3].evaluation["accuracy"] == float(after["w"].mean())
    again = await train_local(site, spec(), model=start, output=tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "last.safetensors").read_bytes()
    assert again.best == max(run.versions, key=lambda v: v.evaluation["accuracy"]).version
    _, aliases = apply_metadata(read_header(tmp_path / "last.safetensors"))
    assert aliases == {"tied_again": "tied"}
    assert not list((site.state_dir / "local").glob("run-*")), "nothing is left behind"


async def test_a_model_begins_with_values_from_elsewhere(site, tmp_path):
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    await init_model(site, "w", theirs, seed=1)
    await init_model(site, "w", ours, seed=2, weights=theirs)
    assert ours.read_bytes() == theirs.read_bytes()
    save_file({"w": np.zeros(1, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(FedlinkError, match="'w'") as caught:
        await init_model(site, "w", ours, seed=2, weights=tmp_path / "other.safetensors")
    assert caught.value.reason is Reason.FAILED
    assert ours.read_bytes() == theirs.read_bytes(), "what was there is still there"


async def test_draws_are_those_of_a_federation(site, tmp_path):
    await train_local(site, spec(rounds=1), output=tmp_path / "one.safetensors")
    await init_model(site, "w", tmp_path / "start.safetensors", seed=11)
    model = {name: array.copy() for name, array in arrays(tmp_path / "start.safetensors").items()}
    seed = derive_seed(11, "site-1", 1)
    seed_everything(seed)
    Toy(Site("site-1", tmp_path, {})).train(model, Context(settings=Toy.Settings(), seed=seed))
    assert np.array_equal(model["w"], arrays(tmp_path / "one.safetensors")["w"])


async def test_gradient_steps(site, tmp_path):
    run = spec(strategy="fedsgd", server_optimizer={"learning_rate": 0.125}, rounds=2)
    await train_local(site, run, output=tmp_path / "last.safetensors")
    await init_model(site, "w", tmp_path / "start.safetensors", seed=11)
    before, after = arrays(tmp_path / "start.safetensors"), arrays(tmp_path / "last.safetensors")
    step = (before["w"].astype(np.float64) - 0.125 * 0.5).astype(np.float32)
    assert np.array_equal(after["w"], (step.astype(np.float64) - 0.125 * 0.5).astype(np.float32))
    assert after["bias"] == before["bias"] - 0.25 - 0.25
    assert np.array_equal(after["half"], before["half"])


async def test_stops_at_its_target(site):
    stop = {"stop": {"target": -1e9}, "rounds": 5}
    assert (await train_local(site, spec(**stop))).rounds == 1


@pytest.mark.parametrize(
    ("table", "reason", "text"),
    [
        ({"workload": "other"}, Reason.BAD_CONFIG, "no workload other"),
        ({"settings": {"nope": 1}}, Reason.BAD_RUN, "nope"),
        ({"settings": {"steps": 2.5}}, Reason.BAD_RUN, "steps"),
        ({"settings": {"fault": "exception"}}, Reason.FAILED, "secret patient 4711"),
    ],
)
async def test_refusals_say_what_to_change(site, table, reason, text):
    with pytest.raises(FedlinkError) as caught:
        await train_local(site, spec(**table))
    assert caught.value.reason is reason
    assert text in caught.value.message


async def test_a_model_that_is_none(site, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    for path in (tmp_path / "bad.safetensors", tmp_path / "absent", tmp_path):
        with pytest.raises(FedlinkError) as caught:
            await train_local(site, spec(), model=path)
        assert caught.value.reason is Reason.BAD_CONFIG


@pytest.fixture
def command(tmp_path):
    site = make_site(tmp_path / "site").directory
    (site / "site.toml").write_text(SITE)
    (site / "run.toml").write_text(RUN)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return Command(program("fedclient"), *arguments, cwd=site).ended(PATIENCE)

    return run


def test_commands(command, tmp_path):
    done = command("init-model", "w", "-o", "start.safetensors", "--seed", "11")
    assert done.returncode == 0, done.stderr
    assert "start.safetensors" in done.stdout
    done = command("train-local", "--settings", "run.toml", "--model", "start.safetensors", "-o", "last.safetensors")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("result ")
    record = json.loads(last.removeprefix("result "))
    assert (record["rounds"], record["site"], record["model_path"]) == (3, "site-1", "last.safetensors")
    assert set(record["evaluation"]) == {"accuracy", "pid", "secrets"}
    done = command("train-local", "--settings", "run.toml", "--config", "site.toml", "--json")
    versions = json.loads(done.stdout)["versions"]
    assert [v["version"] for v in versions] == [0, 1, 2, 3]
    assert versions[3]["train"] == record["versions"][3]["train"]


def test_command_errors_are_one_sentence(command, tmp_path):
    (tmp_path / "site" / "fast.toml").write_text(RUN.replace("0.25", "5.0"))
    for arguments, code, text in (
        (["train-local", "--settings", "fast.toml"], 2, "learning_rate"),
        (["train-local", "--settings", "none.toml"], 2, "does not exist"),
        (["init-model", "nope", "-o", "x.safetensors"], 2, "no workload nope"),
        (["init-model", "w"], 2, "-o"),
    ):
        done = command(*arguments)
        assert done.returncode == code, done.stderr
        assert text in done.stderr
        assert "Traceback" not in done.stderr


def test_layout_is_canonical_and_frozen_shards_are_linked(tmp_path, monkeypatch):
    monkeypatch.setattr("fedlink.tensors.SHARD_MIN_BYTES", 64)
    specs = [
        TensorSpec("a", "BF16", (40,)),
        TensorSpec("b", "F32", (3, 5)),
        TensorSpec("f", "F8_E4M3", (100,), Role.FROZEN),
        TensorSpec("n", "I64", (), Role.BUFFER),
    ]
    values = {s.name: np.random.default_rng(i).bytes(s.nbytes) for i, s in enumerate(specs)}
    values["a"] = np.linspace(-1, 1, 40, dtype=np.float32).view("<u2")[1::2].tobytes()
    sources = tmp_path / "source"
    sources.mkdir()
    for name, part in (("x.safetensors", specs[:2]), ("y.safetensors", specs[2:])):
        with ShardWriter(
            sources / name, part, roles_metadata(part, {"tied": part[0].name} if part[0].name == "a" else {})
        ) as w:
            for s in part:
                w.write(s.name, values[s.name])
    index = {"weight_map": {s.name: "x.safetensors" if s in specs[:2] else "y.safetensors" for s in specs}}
    (sources / INDEX_NAME).write_text(json.dumps(index))
    model = import_model(sources, tmp_path / "0")
    assert [[s.name for s in shard] for _, shard in model.shards] == [["a"], ["n", "b"], ["f"]]
    assert {n: d for n, (_, d) in raw_tensors(*files(model)).items()} == values
    assert json.loads((model.directory / "model.json").read_text())["aliases"] == {"tied": "a"}
    gradients = []
    for i, (_, shard) in enumerate(model.shards[:2]):
        path = tmp_path / f"g{i}"
        part = [s if not s.is_delta else TensorSpec(s.name, "F32", s.shape) for s in shard]
        with ShardWriter(path, part) as w:
            for s in part:
                w.write(s.name, np.full(s.shape, 2, DTYPES[s.dtype].raw).tobytes())
        gradients.append(path)
    stepped = next_version(model, gradients, tmp_path / "1", 0.5)
    before, after = arrays(*files(model)), arrays(*files(stepped))
    assert np.array_equal(after["b"], (before["b"].astype(np.float64) - 1).astype(np.float32))
    assert after["a"].tobytes() == (before["a"].astype(np.float64) - 1).astype(after["a"].dtype).tobytes()
    assert after["n"] == 2
    assert (tmp_path / "0" / model.shards[2][0]).samefile(tmp_path / "1" / model.shards[2][0])
    export_model(stepped, tmp_path / "out" / "m.safetensors")
    stored, aliases = apply_metadata(read_header(tmp_path / "out" / "m.safetensors"))
    assert {t.spec for t in stored} == set(specs)
    assert aliases == {"tied": "a"}
    assert raw_tensors(tmp_path / "out" / "m.safetensors") == raw_tensors(*files(stepped))


def test_what_lay_beside_a_model_goes_along_unless_one_file_is_asked_for(tmp_path):
    (tmp_path / "m").mkdir()
    with ShardWriter(tmp_path / "m" / "model.safetensors", [TensorSpec("a", "U8", (1,), Role.BUFFER)]) as out:
        out.write("a", b"x")
    for name in ("config.json", "evil.py"):
        (tmp_path / "m" / name).write_text("{}")
    model = import_model(tmp_path / "m", tmp_path / "0")
    export_model(model, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.safetensors", "config.json"}
    export_model(model, tmp_path / "out.safetensors")
    assert raw_tensors(tmp_path / "out.safetensors") == raw_tensors(tmp_path / "m" / "model.safetensors")


def files(model: LocalModel):
    return [model.directory / name for name, _ in model.shards]
