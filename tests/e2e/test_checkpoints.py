"""A daemon killed in training, between a real server and a real trainer: what was done is not done again."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from tests.support.federation import Federation, Site, alive, arrays_equal, until

pytestmark = pytest.mark.slow

START = {"w": np.zeros((3, 4), np.float32), "bias": np.zeros(3, np.float32)}


def steps(site: Site, round_: int) -> list[int]:
    """The steps of a round that a site has taken, in order."""
    path = site.control / "steps"
    lines = path.read_text().splitlines() if path.exists() else []
    return [int(step) for number, step, _ in (line.split() for line in lines) if int(number) == round_]


def pid(site: Site) -> int:
    return int((site.control / "steps").read_text().splitlines()[-1].split()[2])


@pytest.mark.timeout(300)
def test_killed_in_training_it_goes_on_inside_the_round(federation: Federation) -> None:
    federation.import_model("start", START)
    site = federation.site("a", "steady:Steady", options={"checkpoint_every": 1e-9})
    site.hold()
    federation.create_run("r", workload="work", model="start", rounds=2, seed=7, cohort={"min_clients": 1})
    until(lambda: 5 in steps(site, 1), "step 5")
    trainer = pid(site)
    site.kill()
    until(lambda: not alive(trainer), "the trainer to go with its daemon")
    site.start()
    until(lambda: steps(site, 1).count(5) == 2, "step 5 again")
    # Now the trainer alone: the server gives the task once more, under another token.
    os.kill(pid(site), signal.SIGKILL)
    until(lambda: steps(site, 1).count(5) == 3, "step 5 once more")
    site.release()
    federation.finish("r")
    assert steps(site, 1) == [0, 1, 2, 3, 4, 5, 5, 5, 6, 7, 8, 9]
    assert steps(site, 2) == list(range(10))
    assert site.daemon is not None
    assert site.daemon.text().count("resumed from a local checkpoint") == 2
    assert list((site.directory / "fedclient-state" / "checkpoints").iterdir()) == []

    federation.create_run("undisturbed", workload="work", model="start", rounds=2, seed=7, cohort={"min_clients": 1})
    federation.finish("undisturbed")
    arrays_equal(federation.export("r"), federation.export("undisturbed"))
    assert federation.export("r")["w"].any()
