"""A disk is nearly full, full, or read-only: reads go on, nothing is lost, and the round goes on by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedlink.v1 import types_pb2
from tests.support.classes.drift import expected
from tests.support.federation import Federation, Gate, arrays_equal, until
from tests.support.lying_disk import LyingDisk, OnDisks, library

pytestmark = pytest.mark.slow

SIZE = 800_000
SITES = {"a": (1, 30), "b": (2, 11)}
"""Number and examples of each site."""
MB = 1_000_000


@pytest.fixture(scope="module")
def so(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return library(tmp_path_factory.getbasetemp())


def accepted(federation: Federation, number: int) -> set[str]:
    """The sites whose update to a round is in."""
    found = federation.round("r", number)
    state = types_pb2.TASK_STATE_ACCEPTED
    return {t.client for t in found.tasks if t.kind == "train" and t.state == state} if found else set()


@pytest.mark.timeout(400)
def test_the_servers_disk_fills_up_and_is_read_only(tmp_path: Path, so: Path) -> None:
    rng = np.random.default_rng(1)
    start = {"w": rng.normal(size=SIZE).astype(np.float32), "b": rng.normal(size=3).astype(np.float32)}
    disk = LyingDisk(tmp_path / "disk", so)
    with OnDisks(tmp_path) as federation:
        federation.disks["server"] = disk
        federation.data_dir = disk.root / "server"
        federation.start_server(disk_reserve="2MB")

        def says(text: str) -> bool:
            """Whether `run show` does."""
            run = federation.run_state("r")
            return run is not None and text in run.waiting

        def readable() -> None:
            arrays_equal(federation.export("start"), start)

        federation.import_model("start", start)
        with Gate(federation.address, after=SIZE * 2) as gate:
            a, b = (
                federation.site(
                    name,
                    "drift:Drift",
                    data={"size": SIZE, "number": number, "examples": examples},
                    server=gate.address if name == "b" else "",
                )
                for name, (number, examples) in SITES.items()
            )
            federation.create_run("r", workload="work", model="start", rounds=2)
            until(lambda: accepted(federation, 1) == {"a"}, "a's first update")
            a.hold()

            # Full, with b in mid-upload: what was admitted comes in; the version has to wait, and its updates stay.
            gate.until_reached()
            b.hold()
            disk.fill(MB)
            gate.open()
            until(lambda: says("is full") and says("holds up the next version"), "the operator to be told")
            assert disk.fired("full")
            readable()
            # A server that starts on a full disk serves.
            federation.kill_server()
            disk.fill(200_000)
            federation.start_server(disk_reserve="2MB")
            until(lambda: says("holds up the next version"), "the operator to be told again")
            found = federation.round("r", 1)
            assert found is not None
            assert (found.phase, found.attempt) == ("aggregate", 1)
            disk.heal()
            federation.until_version("r", 1)

            # Files that are there to be written over need no room; a server that begins has none.
            until(lambda: not list((federation.data_dir / "spool").iterdir()), "round 1's updates to go")
            federation.kill_server()
            federation.start_server(disk_reserve="2MB")

            # Nearly full: no further upload is let in, while there is room for the version and the database.
            a.until_training(2)
            disk.fill(6 * MB)
            fired = disk.fired("full")
            a.release()
            until(lambda: says("no room for further uploads"), "the operator to be told of uploads")
            federation.call("client", "add", "x")
            readable()
            assert disk.fired("asked")
            assert disk.fired("full") == fired
            # Not even room for the database.
            disk.fill(0)
            assert "no room for the database" in federation.call("client", "add", "y", code=1).stderr
            readable()
            disk.heal()
            until(lambda: accepted(federation, 2) == {"a"}, "a's second update")

            # Read-only.
            disk.freeze()
            b.release()
            until(lambda: says("cannot be written"), "the operator to be told that nothing can be written")
            assert disk.fired("readonly")
            assert "cannot be written" in federation.call("client", "add", "y", code=1).stderr
            readable()
            disk.heal()
            events = federation.finish("r")
        arrays_equal(federation.export("r@2"), expected(start, SITES.values(), 2))
        assert events[-1]["data"]["state"] == "completed"
        assert {name for name, s in federation.sites.items() if s.daemon and s.daemon.running} == {"a", "b"}
        assert [r for r, _ in a.trained] == [r for r, _ in b.trained] == [1, 2]
        assert federation.server
        log = federation.server.text()
        assert "Traceback" not in log
        # Once an episode, not at every try.
        assert log.count("no room for further uploads") == 1
        assert log.count("holds up the next version") == 2
        assert log.count("cannot be written, which holds up further uploads") == 1
        assert log.count("cannot be written, which holds up the database") == 1


@pytest.mark.timeout(400)
def test_a_sites_disk_fills_up(tmp_path: Path, so: Path) -> None:
    start = {"w": np.linspace(-1, 1, SIZE, dtype=np.float32), "b": np.ones(3, np.float32)}
    disk = LyingDisk(tmp_path / "disk", so)
    with OnDisks(tmp_path) as federation:
        federation.disks["a"] = disk
        federation.start_server()
        federation.import_model("start", start)
        number, examples = SITES["a"]
        site = federation.site(
            "a",
            "drift:Drift",
            data={"size": SIZE, "number": number, "examples": examples},
            extra={"state_dir": str(disk.root / "state")},
        )

        def said(text: str, times: int = 1) -> bool:
            return site.daemon is not None and site.daemon.text().count(text) >= times

        until(lambda: said("registered"), "the site to come")
        # While it downloads: it says so, and is given the task again.
        disk.fill(MB)
        cohort = {"min_clients": 1, "task_retries": 9}
        federation.create_run(
            "r", workload="work", model="start", rounds=1, cohort=cohort, evaluation={"enabled": False}
        )
        until(lambda: said("the site's disk: No space left on device"), "the download to fail")
        site.hold()
        disk.heal()
        # While the trainer writes its update: the training waits for room, and is no failure at the server.
        site.until_training(1)
        found = federation.round("r", 1)
        assert found is not None
        attempts = len(found.tasks)
        disk.fill(MB)
        site.release()
        until(lambda: said("no room for the update"), "the update not to be written")
        assert said("the site's disk is full")
        site.hold()
        disk.heal()
        # With the update written, and no room to note it: the finished work is kept, not done again.
        site.until_training(1, times=2)
        disk.freeze()
        site.release()
        until(lambda: said("cannot be written, step"), "the update not to be written once more")
        until(lambda: said("no room for the update", times=2), "the training to wait once more")
        site.hold()
        disk.heal()
        site.until_training(1, times=3)
        disk.fill((federation.root / "start.safetensors").stat().st_size + 500)
        site.release()
        until(lambda: said("the finished result waits"), "the journal not to be written")
        disk.heal()
        federation.finish("r")
        arrays_equal(federation.export("r@1"), expected(start, [SITES["a"]], 1))
        assert site.daemon is not None
        assert site.daemon.running
        assert [r for r, _ in site.trained] == [1, 1, 1]
        found = federation.round("r", 1)
        assert found is not None
        assert len(found.tasks) == attempts
        assert "defect" not in site.daemon.text()
        assert disk.fired("full") >= 3
        assert disk.fired("readonly")
