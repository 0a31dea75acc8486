"""What operators do to a running federation: drain it, watch it through restarts, ask what it waits for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.classes.drift import expected
from tests.support.federation import Daemon, Federation, Gate, arrays_equal, program, until

pytestmark = pytest.mark.slow

SIZE = 800_000
SITES = {"ada": (1, 30), "bob": (2, 10)}


def begin(federation: Federation, name: str, *arguments: str) -> Daemon:
    """A `fedserver` command in the background; its output is in NAME.log."""
    command = [program("fedserver"), *arguments, "--data-dir", str(federation.data_dir)]
    daemon = Daemon(command, federation.root / f"{name}.log", cwd=federation.root)
    federation.callback(daemon.clean)
    return daemon


def events(watch: Daemon) -> list[dict[str, Any]]:
    return [json.loads(line) for line in watch.text().splitlines()]


@pytest.mark.timeout(300)
def test_drained_restarted_and_killed_under_the_eyes_of_a_watcher(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    start = {"w": rng.normal(size=SIZE).astype(np.float32), "b": rng.normal(size=3).astype(np.float32)}
    with Federation(tmp_path) as federation:
        federation.start_server(max_poll_wait=2)
        federation.import_model("start", start)
        with Gate(federation.address, after=SIZE * 2) as gate:
            ada, bob = (
                federation.site(
                    name,
                    "drift:Drift",
                    data={"size": SIZE, "number": number, "examples": examples},
                    server=gate.address if name == "ada" else "",
                )
                for name, (number, examples) in SITES.items()
            )
            bob.hold()
            federation.create_run("r", workload="work", model="start", rounds=2, evaluation={"enabled": False})
            watch = begin(federation, "watch", "run", "watch", "r", "--json")
            gate.until_reached()
            bob.until_training(1)
            said = until(lambda: (s := federation.json("run", "why", "r"))["clients"][0]["done"] and s, "heartbeats")
            assert [(c["name"], c["state"]) for c in said["clients"]] == [("ada", "running"), ("bob", "running")]
            assert [c["activity"] for c in said["clients"]] == ["uploading", "computing"]
            assert federation.call("run", "why", "r").stdout.startswith(
                "run r:  round 1 has 0 of 2 updates and waits for"
            )

            # Half of ada's update is here, bob still trains: ada's may arrive, bob's may not begin to.
            late = federation.call("drain", "--timeout", "0.1s", code=1).stderr
            assert late.startswith("fedserver: the server waits for 1 upload (ada); it goes on draining")
            drain = begin(federation, "drain", "drain")
            until(lambda: "waits for 1 upload (ada)" in drain.text(), "the drain to say what it waits for")
            bob.release()
            assert bob.daemon
            until(lambda: "the server is stopping" in bob.daemon.text(), "bob's update to be put off")
            assert drain.running
            gate.open()
            assert drain.wait() == 0
            assert drain.text().splitlines()[-1] == "the server has ended"
            assert federation.server
            assert federation.server.wait() == 0
            assert "Traceback" not in federation.server.text()
            accepted = [e["data"]["client"] for e in events(watch) if e["kind"] == "task_accepted"]
            assert accepted == ["ada"]

            # Nobody is restarted but the server, which then goes on, and is killed for good measure.
            ada.hold()
            federation.start_server(max_poll_wait=2)
            ada.until_training(2)
            federation.kill_server()
            federation.start_server(max_poll_wait=2)
            ada.release()
            assert watch.wait() == 0
        arrays_equal(federation.export("r"), expected(start, SITES.values(), 2))
        assert [r for r, _ in ada.trained].count(1) == [r for r, _ in bob.trained].count(1) == 1
        seen = events(watch)
        assert seen == federation.finish("r")
        # It is the only run, so that a missing event would leave a gap.
        assert [e["sequence"] for e in seen] == list(range(1, len(seen) + 1))
        assert federation.call("run", "why", "r").stdout == "run r:  it has ended (completed): all rounds are done\n"
