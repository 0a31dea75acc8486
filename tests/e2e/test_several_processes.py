"""A site whose trainer is two processes, with a real server and daemon: a run like that of one process."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.federation import Federation, call, until

RUN = """
name = "alone"
workload = "work"
rounds = 2
seed = 4
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_is_that_of_one_process(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    site = federation.site("a", "pairs:Pairs", start=False, options={"distributed": {"processes": 2}})
    init = federation.root / "init.safetensors"
    one = site.directory / "one.toml"
    one.write_text(site.config.read_text().replace("processes = 2", "processes = 1"))
    assert one.read_text() != site.config.read_text()
    call("fedclient", "init-model", "work", "--config", str(one), "--seed", "1", "-o", str(init))
    federation.call("model", "import", str(init))
    site.start()
    federation.create_run("two", workload="work", model="init", rounds=2, seed=4, cohort={"min_clients": 1})
    # Each start of the trainer takes three imports of torch.
    until(lambda: (r := federation.run_state("two")) and r.version >= 2, "two rounds", seconds=400)
    found = federation.export("two@2")

    run, output = federation.root / "run.toml", federation.root / "alone.safetensors"
    run.write_text(RUN)
    options = ("--config", str(one), "--settings", str(run), "--model", str(init), "-o", str(output))
    call("fedclient", "train-local", *options)
    wanted = load_file(output)
    start = load_file(init)
    assert max(float(np.abs(wanted[name] - start[name]).max()) for name in wanted) > 0.01
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=5e-5, err_msg=name)
