"""The machine loses power, and with it everything that was not synced (promise 1): nothing committed is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedlink.v1 import types_pb2
from tests.support.classes.drift import expected
from tests.support.federation import Federation, arrays_equal, until
from tests.support.lying_disk import LyingDisk, OnDisks, library

pytestmark = pytest.mark.slow

SIZE = 800_000
SITES = {"a": (1, 30), "b": (2, 11)}
"""Number and examples of each site."""
ROUNDS = 4


@pytest.fixture(scope="module")
def so(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return library(tmp_path_factory.getbasetemp())


@pytest.fixture
def federation(tmp_path: Path) -> OnDisks:
    return OnDisks(tmp_path)


def accepted(federation: Federation, number: int) -> set[str]:
    """The sites whose update to a round is in."""
    found = federation.round("r", number)
    state = types_pb2.TASK_STATE_ACCEPTED
    return {t.client for t in found.tasks if t.kind == "train" and t.state == state} if found else set()


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("seed", "survives"), [(1, 0.0), (2, 0.5)])
def test_the_server_loses_power(federation: OnDisks, tmp_path: Path, so: Path, seed: int, survives: float) -> None:
    rng = np.random.default_rng(seed)
    start = {"w": rng.normal(size=SIZE).astype(np.float32), "b": rng.normal(size=3).astype(np.float32)}
    disk = LyingDisk(tmp_path / "disk", so)
    federation.disks["server"] = disk
    federation.data_dir = disk.root / "server"
    losses = []

    def lose_power() -> None:
        before = federation.run_state("r")
        assert before is not None
        federation.kill_server()
        losses.append(disk.lose_power(seed + len(losses), survives))
        federation.start_server()
        after = until(lambda: federation.run_state("r"), "the server to answer")
        assert after.version >= before.version
        files = federation.json("model", "verify")  # ends with 1 if one is damaged
        assert {f["model"] for f in files} >= {"start", *(f"r@{v}" for v in range(before.version + 1))}

    with federation:
        federation.start_server()
        federation.import_model("start", start)
        federation.create_run("r", workload="work", model="start", rounds=ROUNDS, retention={"keep_versions": 9})
        a, b = (
            federation.site(name, "drift:Drift", data={"size": SIZE, "number": number, "examples": examples})
            for name, (number, examples) in SITES.items()
        )
        # In mid-round: one update is in, the other site trains.
        a.hold()
        until(lambda: accepted(federation, 1) == {"b"}, "b's first update")
        lose_power()
        until(lambda: accepted(federation, 1) == {"b"}, "b's first update once more")
        b.hold()
        a.release()
        # The moment a version is there.
        federation.until_version("r", 1)
        lose_power()
        until(lambda: accepted(federation, 2) == {"a"}, "a's second update")
        b.release()
        # Whenever it happens.
        until(lambda: rng.random() < 0.05, "chance")
        lose_power()
        events = federation.finish("r")
        arrays_equal(federation.export("r@4"), expected(start, SITES.values(), ROUNDS))
        assert {name for name, s in federation.sites.items() if s.daemon and s.daemon.running} == {"a", "b"}
    assert events[-1]["data"]["state"] == "completed"
    assert [e["data"]["version"] for e in events if e["kind"] == "round_committed"] == [1, 2, 3, 4]
    # An update that was lost was asked for again, and sent again without being computed again.
    assert ("b", 1) in {(e["data"]["client"], e["data"]["round"]) for e in events if e["kind"] == "task_reopened"}
    assert [r for r, _ in b.trained].count(1) == 1
    assert all(loss.files or loss.entries for loss in losses)
    assert disk.fired("synced_files")
    assert disk.fired("answered") == 1 + len(losses) == 4


@pytest.mark.parametrize("at", ["once the result is safe", "once it is there"])
def test_a_site_loses_power(federation: OnDisks, tmp_path: Path, so: Path, at: str) -> None:
    start = {"w": np.linspace(-1, 1, 50_000, dtype=np.float32), "b": np.ones(3, np.float32)}
    disk = LyingDisk(tmp_path / "disk", so)
    federation.disks["a"] = disk
    with federation:
        federation.start_server()
        federation.import_model("start", start)
        number, examples = SITES["a"]
        a = federation.site(
            "a",
            "drift:Drift",
            data={"size": 50_000, "number": number, "examples": examples},
            extra={"state_dir": str(disk.root / "state")},
        )
        a.hold()
        federation.create_run("r", workload="work", model="start", cohort={"min_clients": 1})
        a.until_training(1)
        federation.kill_server()
        a.release()
        daemon = a.daemon
        assert daemon is not None
        # The result is there, and nobody to send it to.
        said = "synced the result" if at == "once the result is safe" else '"activity": "train", "examples"'
        until(lambda: said in daemon.text(), "the result")
        a.kill()
        safe = "synced the result" in daemon.text()
        lost = disk.lose_power(3)
        assert lost.files or lost.entries
        a.start()
        federation.start_server()
        federation.finish("r")
        arrays_equal(federation.export("r"), expected(start, [SITES["a"]], 1))
        assert [r for r, _ in a.trained] == ([1] if safe else [1, 1])
