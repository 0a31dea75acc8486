"""SIGKILL of the server, of a daemon and of a trainer: the run goes on by itself and its weights are exact."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable

import numpy as np
import pytest

from fedlink.v1 import types_pb2
from tests.support.classes.drift import expected
from tests.support.federation import Federation, Gate, Site, alive, arrays_equal, until

pytestmark = pytest.mark.slow

SIZE = 800_000
SITES = {"a": (1, 30), "b": (2, 11)}
"""Number and examples of each site."""
ROUNDS = 4


def kill_server(federation: Federation, site: Site) -> None:
    federation.kill_server()


def restart_server(federation: Federation, site: Site) -> None:
    federation.start_server()


def kill_client(federation: Federation, site: Site) -> None:
    _, trainer = site.trained[-1]
    site.kill()
    until(lambda: not alive(trainer), "the trainer to go with its daemon")


def restart_client(federation: Federation, site: Site) -> None:
    site.start()


def kill_trainer(federation: Federation, site: Site) -> None:
    with contextlib.suppress(ProcessLookupError):  # there may be none between two tasks
        os.kill(site.trained[-1][1], signal.SIGKILL)


def nothing(federation: Federation, site: Site) -> None:
    """The daemon starts a trainer again by itself."""


def accepted(federation: Federation, number: int, client: str) -> bool:
    """Whether a site's update to a round is in."""
    found = federation.round("r", number)
    tasks = found.tasks if found else ()
    return any(t.client == client and t.kind == "train" and t.state == types_pb2.TASK_STATE_ACCEPTED for t in tasks)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("kill", "restart"),
    [
        pytest.param(kill_server, restart_server, id="server"),
        pytest.param(kill_client, restart_client, id="client"),
        pytest.param(kill_trainer, nothing, id="trainer"),
    ],
)
def test_killed_four_times(federation: Federation, kill: Callable[..., None], restart: Callable[..., None]) -> None:
    rng = np.random.default_rng(3)
    start = {"w": rng.normal(size=SIZE).astype(np.float32), "b": rng.normal(size=3).astype(np.float32)}
    federation.import_model("start", start)
    with Gate(federation.address, after=SIZE * 2) as gate:
        a, b = (
            federation.site(
                name,
                "drift:Drift",
                data={"size": SIZE, "number": number, "examples": examples},
                server=gate.address if name == "a" else "",
            )
            for name, (number, examples) in SITES.items()
        )
        federation.create_run("r", workload="work", model="start", rounds=ROUNDS)

        # In mid-upload: half of a's first update has left it.
        gate.until_reached()
        kill(federation, a)
        a.hold()
        gate.open()
        restart(federation, a)

        # In training.
        a.until_training(2)
        until(lambda: accepted(federation, 2, "b"), "b's second update")
        b.hold()
        kill(federation, a)
        a.release()
        restart(federation, a)

        # Between two trainings of a, with the round open.
        until(lambda: accepted(federation, 3, "a"), "a's third update")
        kill(federation, a)
        b.release()
        restart(federation, a)

        # Between rounds.
        federation.until_version("r", 3)
        kill(federation, a)
        restart(federation, a)

        events = federation.finish("r")
    assert events[-1]["data"]["state"] == "completed"
    assert [e["data"]["version"] for e in events if e["kind"] == "round_committed"] == [1, 2, 3, 4]
    arrays_equal(federation.export("r@4"), expected(start, SITES.values(), ROUNDS))
    # An update that was whole is sent, not computed again.
    assert [r for r, _ in a.trained].count(1) == 1
    assert [r for r, _ in b.trained].count(3) == 1
    assert {name for name, s in federation.sites.items() if s.daemon and s.daemon.running} == {"a", "b"}


def test_killed_before_there_is_anything_to_do(federation: Federation) -> None:
    start = {"w": np.zeros(5, np.float32), "b": np.ones(3, np.float32)}
    federation.import_model("start", start)
    federation.create_run("r", workload="work", model="start", rounds=1)
    until(lambda: (r := federation.run_state("r")) and r.waiting, "the run to say what it waits for")
    federation.kill_server()
    federation.start_server()
    for name, (number, examples) in SITES.items():
        federation.site(name, "drift:Drift", data={"size": 5, "number": number, "examples": examples})
    federation.finish("r")
    arrays_equal(federation.export("r"), expected(start, SITES.values(), 1))
