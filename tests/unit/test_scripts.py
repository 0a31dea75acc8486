"""What is read from a script's text, what site.toml may say of one, and what it does by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedclient import trainer as fed
from fedclient.launch import visible_devices
from fedclient.settings import WorkloadSettings
from fedclient.trainer import Context, Site, Workload
from fedclient.trainer.declared import read_declared
from fedclient.trainer.play import ScriptError
from fedclient.trainer.schema import parse_settings, settings_schema
from fedclient.trainer.script import script_class
from fedclient.trainer.state import state_of
from fedlink.config import load_toml
from fedlink.errors import FedlinkError, Reason
from fedlink.settings_schema import Schema

EXAMPLES = Path(__file__).parents[2] / "examples" / "scripts"


@pytest.fixture
def script(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "train.py"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    "text",
    [
        "from fedclient import trainer as fed\nfed.load(m, evaluate=f)\nr = fed.setting('rate', 0.5)",
        "import fedclient.trainer as t\nt.load(m, evaluate=f)\nr = t.setting('rate', 0.5)",
        "import fedclient.trainer\nfedclient.trainer.load(m, f)\nr = fedclient.trainer.setting('rate', 0.5)",
        "from fedclient.trainer import load as l, setting\ndef main():\n    l(m, evaluate=f)\n    setting('rate', 0.5)",
    ],
)
def test_calls_are_found_however_they_are_imported(script: Any, text: str) -> None:
    declared = read_declared(script(text))
    assert declared.evaluates
    assert settings_schema(declared.settings)["properties"] == {"rate": {"type": "number", "default": 0.5}}


def test_calls_of_others_are_none_of_ours(script: Any) -> None:
    declared = read_declared(
        script("import torch\ntorch.load(m, evaluate=f)\nsetting('rate', x)\nself.load(evaluate=1)")
    )
    assert not declared.evaluates
    assert not settings_schema(declared.settings)["properties"]
    plain = "from fedclient import trainer as fed\nfed.load(m)\nfed.load(m, evaluate=None)"
    assert not read_declared(script(plain)).evaluates


def test_settings_have_the_types_of_their_defaults_and_limits(script: Any) -> None:
    text = """
from fedclient import trainer as fed
fed.setting("epochs", 3, minimum=1, maximum=10)
fed.setting("rate", 0.1)
fed.setting("optimizer", "sgd", choices=("sgd", "adam"))
fed.setting("nesterov", False)
fed.setting("widths", [64, 32])
fed.setting("scales", [1, 0.5])
fed.setting("epochs", 3, minimum=1, maximum=10)
"""
    settings = read_declared(script(text)).settings
    schema = settings_schema(settings)
    Schema.model_validate(schema)
    assert schema["properties"] == {
        "epochs": {"type": "integer", "minimum": 1, "maximum": 10, "default": 3},
        "rate": {"type": "number", "default": 0.1},
        "optimizer": {"type": "string", "enum": ["sgd", "adam"], "default": "sgd"},
        "nesterov": {"type": "boolean", "default": False},
        "widths": {"type": "array", "items": {"type": "integer"}, "default": [64, 32]},
        "scales": {"type": "array", "items": {"type": "number"}, "default": [1.0, 0.5]},
    }
    assert parse_settings(settings, {"epochs": 4, "rate": 1}).rate == 1.0


@pytest.mark.parametrize(
    "call",
    [
        "fed.setting('rate', args.rate)",
        "fed.setting(name, 0.1)",
        "fed.setting('rate', None)",
        "fed.setting('rate', 0.1, minimum=low)",
        "fed.setting('rate')",
        "fed.setting('two words', 1)",
        "fed.setting('widths', [])",
        "fed.setting('mode', 'c', choices=('a', 'b'))",
        "fed.setting('rate', 0.1, **limits)",
    ],
)
def test_a_setting_that_cannot_be_told_from_the_text_is_named_by_its_line(script: Any, call: str) -> None:
    with pytest.raises(ScriptError, match=r"train.py, line 3: the server is told of a setting from the script's text"):
        read_declared(script(f"from fedclient import trainer as fed\n\n{call}"))


def test_a_setting_is_declared_in_one_way(script: Any) -> None:
    text = "from fedclient import trainer as fed\nfed.setting('rate', 0.1)\nfed.setting('rate', 0.2)"
    with pytest.raises(ScriptError, match="line 3: setting 'rate' is given otherwise elsewhere"):
        read_declared(script(text))


def test_a_script_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ScriptError, match=r"no\.py cannot be read: No such file"):
        read_declared(tmp_path / "no.py")


@pytest.mark.parametrize("key", ["model", "data", "lora", "parameters", "precision", "trust_remote_code"])
def test_what_a_script_does_not_read_is_refused(key: str) -> None:
    values = {"model": "m", "trust_remote_code": True, "data": {"train": "x"}}
    with pytest.raises(FedlinkError, match=f"a script does not read {key}: give it what it takes by args") as e:
        WorkloadSettings.checked({"trainer": "train.py", key: values.get(key, {})}, "site.toml")
    assert e.value.reason is Reason.BAD_CONFIG


def test_arguments_are_for_scripts() -> None:
    found = WorkloadSettings.checked({"trainer": "jobs/train.py", "args": ["--fast"]}, "site.toml")
    assert found.script
    assert found.options == {"args": ["--fast"]}
    with pytest.raises(FedlinkError, match="args are for a script"):
        WorkloadSettings.checked({"trainer": "train:Train", "args": ["--fast"]}, "site.toml")
    with pytest.raises(FedlinkError, match=r"nor a script's path with \.py"):
        WorkloadSettings.checked({"trainer": "train.sh"}, "site.toml")


@pytest.mark.parametrize(
    ("device", "given", "seen"),
    [
        ("cpu", None, ""),
        ("cpu", "0,1", ""),
        ("cuda:0", None, "0"),
        ("cuda:3", None, "3"),
        ("cuda:1", "4,GPU-77,6", "GPU-77"),
        ("cuda:5", "4,6", ""),
        ("auto", "4,6", "4"),
        ("auto", "", ""),
    ],
)
def test_a_script_sees_its_own_device_alone(device: str, given: str | None, seen: str) -> None:
    environ = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    assert visible_devices(device, environ) == {"CUDA_VISIBLE_DEVICES": seen}
    assert visible_devices("xpu:1", environ) == {"ZE_AFFINITY_MASK": "1"}


def performing(path: Path) -> tuple[Workload, Callable[[], None]]:
    """A script as a workload, whose main thread is one of ours; and what ends that."""
    workload = script_class(path)(Site("site-1", path.parent, {}))
    thread = threading.Thread(target=lambda: [call() for call in iter(workload.main_thread.get, None)], daemon=True)
    thread.start()
    return workload, lambda: workload.main_thread.put(None)  # type: ignore[arg-type]


def test_what_the_script_had_in_eval_mode_is_trained_in_eval_mode(script: Any) -> None:
    path = script("""
import torch
from fedclient import trainer as fed
model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1)).train()
model[1].eval()
fed.load(model)
for number in (batches := fed.batches([1, 2, 3])):
    pass
fed.save(torch.nn.DataParallel(model), num_examples=len(batches), bn=model[1].training, linear=model[0].training)
""")
    workload, end = performing(path)
    ctx = Context(settings=None)
    workload.begin_job(ctx)
    model = workload.build_model()
    state_of(model).begin(training=True, device="cpu", frozen=())
    workload.train(model, ctx)
    workload.end_job(failed=False)
    end()
    assert (ctx.num_examples, ctx.step, ctx.metrics) == (3, 3, {"bn": 0.0, "linear": 1.0})


def test_by_hand_nothing_happens() -> None:
    model, data = object(), [1, 2, 3]
    assert fed.load(model, evaluate=lambda _: {}) is model
    assert fed.setting("rate", 0.1, minimum=0) == 0.1
    assert fed.batches(data) is data
    assert fed.step(10)
    assert fed.seed(42) == 42
    assert fed.context() is None
    fed.log(loss=1.0)
    fed.watch(object())
    fed.save(object(), num_examples=3, loss=0.1)


def test_each_example_is_changed_in_at_most_five_lines() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    offered = {table["trainer"] for table in load_toml(EXAMPLES / "site.toml")["workload"].values()}
    assert offered == {path.name for path in scripts}
    assert len(scripts) == 4
    for path in scripts:
        lines = path.read_text().splitlines()
        assert 3 <= sum(line.endswith("# federated") for line in lines) <= 5, path
        assert all("fed." not in line for line in lines if not line.endswith("# federated")), path
