"""The trainer under a Python of the site's own, which has none of the daemon's packages."""

from __future__ import annotations

import sysconfig
import venv
from pathlib import Path

import pytest

from fedclient.launch import FailReason, TrainerFailed, link_packages
from tests.support.trainers import arrays, evaluate, init, make_site, make_trainer, model_files, raw_tensors, train

DAEMON_ONLY = (
    "grpc",
    "google",
    "pydantic",
    "structlog",
    "blake3",
    "typer",
    "rich",
    "ml_dtypes",
    "safetensors",
    "fedlink",
)
PROBE = """
import importlib.util
from {module} import {name} as Base

class Probe(Base):
    def evaluate(self, model, ctx):
        super().evaluate(model, ctx)
        daemon_only = {daemon_only!r}
        found = [n for n in daemon_only if n != "fedlink" and importlib.util.find_spec(n)]
        ctx.log(foreign=len(found))
        return {{}}
"""


def make_python(directory: Path, wanted) -> Path:
    """A virtual environment that holds those of our packages that are wanted, by link."""
    venv.create(directory, with_pip=False, symlinks=True)
    target = next(directory.glob("lib/python*/site-packages"))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if wanted(entry.name.lower()):
            (target / entry.name).symlink_to(entry)
    return directory / "bin" / "python"


def only_numpy(name: str) -> bool:
    return name.startswith("numpy")


def all_but_the_daemons(name: str) -> bool:
    return not name.startswith(DAEMON_ONLY) and not name.endswith((".pth", ".egg-info")) and "editable" not in name


@pytest.mark.parametrize(
    ("wanted", "module", "name"),
    [(only_numpy, "toy", "Toy"), (all_but_the_daemons, "nets", "Nets")],
    ids=["numpy", "torch"],
)
async def test_trains_without_the_daemon_s_packages(tmp_path, monkeypatch, wanted, module, name):
    monkeypatch.setenv("PYTHONPATH", sysconfig.get_path("purelib"))
    site = make_site(tmp_path / "site", "probe:Probe", python=make_python(tmp_path / "venv", wanted))
    (tmp_path / "site" / "probe.py").write_text(PROBE.format(module=module, name=name, daemon_only=DAEMON_ONLY))
    foreign, own = make_trainer(site), make_trainer(make_site(tmp_path / "own", f"{module}:{name}"))
    try:
        model = await init(foreign, tmp_path / "model")
        same = await init(own, tmp_path / "same")
        assert raw_tensors(*model_files(model)) == raw_tensors(*model_files(same))
        assert (await evaluate(foreign, model, tmp_path / "e")).metrics["foreign"] == 0
        a = await train(foreign, model, tmp_path / "a")
        b = await train(own, model, tmp_path / "b")
        assert raw_tensors(*a.files) == raw_tensors(*b.files)
        if name == "Nets":
            assert "small" in arrays(*a.files)
            assert (await train(foreign, model, tmp_path / "c", update_dtype="BF16")).num_examples == 24
    finally:
        await foreign.close()
        await own.close()


async def test_a_python_without_numpy_is_reported(tmp_path):
    site = make_site(tmp_path / "site", python=make_python(tmp_path / "venv", lambda _: False))
    trainer = make_trainer(site)
    with pytest.raises(TrainerFailed) as caught:
        await trainer.describe()
    assert caught.value.reason is FailReason.CRASHED
    assert caught.value.exit_code == 1
    assert "No module named 'numpy'" in caught.value.output
    await trainer.close()


def test_import_path_holds_our_packages_and_follows_an_upgrade(tmp_path):
    assert link_packages(tmp_path / "python") == link_packages(tmp_path / "python")
    assert sorted(p.name for p in (tmp_path / "python").iterdir()) == ["fedclient", "fedlink"]
    (tmp_path / "python" / "fedlink").unlink()
    (tmp_path / "python" / "fedlink").symlink_to(tmp_path)
    link_packages(tmp_path / "python")
    assert (tmp_path / "python" / "fedlink" / "tensors.py").exists()
