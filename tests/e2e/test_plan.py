"""`fedserver plan` before a run, and what its rounds have really moved and taken beside that; with real processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.federation import Federation, toml

SIZE = 200_000
SITES = {"ada": (1, 30), "bob": (2, 10)}
RUN = {"name": "planned", "workload": "work", "model": "start", "rounds": 3, "retention": {"keep_versions": 9}}


def test_a_run_moves_and_takes_what_was_planned(tmp_path: Path) -> None:
    file = tmp_path / "planned.toml"
    file.write_text(toml(RUN))
    with Federation(tmp_path / "federation") as federation:
        federation.start_server(max_poll_wait=2)
        # The base is a quarter of the model, so that a later round is plainly not a first one.
        start = {"w": np.zeros(SIZE, np.float32), "b": np.ones(SIZE // 3, np.float32)}
        federation.import_model("start", start, "--frozen", "b")

        unknown = federation.call("plan", str(file), code=2).stderr
        assert unknown == (
            "fedserver: no site is known that offers workload 'work'; say with --clients how many there will be\n"
        )
        slow = federation.call("plan", str(file), "--clients", "2", "--link", "fast", code=2).stderr
        assert slow.startswith("fedserver: --link: 'fast' is no speed of a line: write \"100mbit\"")
        missing = federation.call("plan", str(file), "--clients", "2", "--model", "nowhere", code=4).stderr
        assert "there is no model or run 'nowhere'" in missing

        plan = federation.json("plan", str(file), "--clients", "2", "--link", "1mbit")
        predicted = plan["prediction"]
        assert plan["seconds_up"] == pytest.approx(SIZE * 4 * 8 / 930_000, rel=0.01)

        # What does not fit is told in the words of the refusal, after the plan.
        large = federation.call("plan", str(file), "--clients", "1000000", code=1)
        assert large.stderr.startswith(
            "fedserver: the server's disk cannot hold it: it takes up to 1000000 updates of "
        )
        said = [line.split("  ")[0] for line in large.stdout.splitlines()]
        assert said[0] == "3 rounds from start"
        assert said[2:] == [
            *("down, first round", "down, each later round", "up, each round"),
            *("server disk", "server memory", "site disk", "site memory"),
        ]

        for name, (number, examples) in SITES.items():
            data = {"size": SIZE, "bias": SIZE // 3, "number": number, "examples": examples}
            federation.site(name, "drift:Drift", data=data)
        federation.call("run", "create", str(file))
        federation.finish("planned")
        run = federation.json("run", "show", "planned")
        table = federation.call("run", "show", "planned").stdout

        # The run was created with the sites known or still to come, and knew the same of each.
        same = ("bytes_down_first", "bytes_down_later", "bytes_up", "version", "cohort", "server_disk")
        assert {k: run["prediction"][k] for k in same} == {k: predicted[k] for k in same}
        assert [u["round"] for u in run["used"]] == [1, 2, 3]
        for used, down in zip(run["used"], ("first", "later", "later"), strict=True):
            assert (used["clients"], used["fetching"]) == (2, 2)
            assert used["bytes_down"] == pytest.approx(2 * predicted[f"bytes_down_{down}"], rel=0.02)
            assert used["bytes_up"] == pytest.approx(2 * predicted["bytes_up"], rel=0.02)
            disk = 2 * predicted["bytes_up"] + used["round"] * predicted["version"]
            assert used["server_disk"] == pytest.approx(disk, rel=0.02)
            assert used["server_disk"] == pytest.approx(used["predicted_server_disk"], rel=0.02)
            assert 30e6 < used["server_memory"] < used["predicted_server_memory"]
        assert run["used"][1]["bytes_down"] < 0.8 * run["used"][0]["bytes_down"]
        numbered = [line.split()[:2] for line in table.splitlines() if line.split()[:1] in (["1"], ["2"], ["3"])]
        assert numbered == [["1", "2"], ["2", "2"], ["3", "2"]]

        federation.kill_server()
        gone = federation.call("plan", str(file), "--clients", "2", code=3).stderr
        assert "start one with `fedserver serve`" in gone
