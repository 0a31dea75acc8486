"""Settings that a run gives as "auto": real daemons measure, the server puts it together, and it outlasts restarts."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest

from tests.support.federation import Federation, alive, call, toml, until

MODEL = {"w": np.zeros(3, np.float32)}


@pytest.fixture
def federation(tmp_path):
    with Federation(tmp_path) as federation:
        yield federation.start_server(lease_term="5s", max_poll_wait="2s")


def site(federation, name, start=True, options=None, **table):
    made = federation.site(name, "measuring:Measuring", start=False, options=options)
    (made.directory / "measure.json").write_text(json.dumps(table))
    if start:
        made.start()
    return made


def run(federation, name="run", clients=2, rounds=2, quorum=None, **tables):
    settings = tables.pop("settings", {"learning_rate": "auto", "batch_size": "auto"})
    federation.create_run(
        name,
        workload="work",
        model="start",
        rounds=rounds,
        settings=settings,
        cohort={"min_clients": clients} | ({"quorum": quorum} if quorum else {}),
        **tables,
    )


def calls(made):
    return int((made.directory / "calls").read_text())


def test_the_median_goes_for_all_and_each_keeps_its_own_batch(federation):
    federation.import_model("start", MODEL)
    rates = {"a": 0.125, "b": 0.25, "c": 1.0}
    sites = [
        site(federation, name, learning_rate=rate, batch_size=n + 1) for n, (name, rate) in enumerate(rates.items())
    ]
    run(federation, clients=3)
    events = federation.finish("run")
    kinds = [e["kind"] for e in events]
    assert kinds.index("run_calibration_started") < kinds.index("run_calibrated") < kinds.index("round_started")
    told = next(e["data"] for e in events if e["kind"] == "run_calibrated")
    assert told["settings"] == {"learning_rate": 0.25}
    assert told["sites"] == {n: {"learning_rate": r, "batch_size": i + 1} for i, (n, r) in enumerate(rates.items())}
    # Two rounds of one step each.
    assert federation.export("run@2")["w"].tolist() == [0.5] * 3
    losses = {t.client: t.metrics["loss"] for t in federation.round("run", 2).tasks if t.kind == "train"}
    assert losses == {"a": 1, "b": 2, "c": 3}
    shown = federation.json("run", "show", "run")["measured"]
    assert shown == [
        {"name": "batch_size", "value": None, "sites": {"a": 1, "b": 2, "c": 3}},
        {"name": "learning_rate", "value": 0.25, "sites": rates},
    ]
    assert "0.25, the median of a 0.125, b 0.25, c 1" in federation.call("run", "show", "run").stdout
    # What was found is kept: neither the rounds nor another run of the kind has searched again.
    run(federation, "again", clients=3)
    federation.finish("again")
    assert [calls(s) for s in sites] == [1, 1, 1]


def test_each_its_own_rate(federation):
    federation.import_model("start", MODEL)
    site(federation, "a", learning_rate=0.25, batch_size=1)
    site(federation, "b", learning_rate=0.75, batch_size=1)
    run(federation, calibration={"own": ["batch_size", "learning_rate"]})
    federation.finish("run")
    assert federation.export("run@2")["w"].tolist() == [1.0] * 3


def waiting(federation, text):
    return until(lambda: text in federation.run_state("run").waiting, text)


def test_those_that_a_round_needs_are_waited_for_while_they_are_away(federation):
    federation.import_model("start", MODEL)
    sites = [site(federation, name, learning_rate=rate, batch_size=1) for name, rate in (("a", 0.25), ("b", 0.5))]
    until(lambda: sum(c["connected"] for c in federation.json("client", "list")) == 2, "two sites")
    for made in sites:
        made.daemon.process.send_signal(signal.SIGSTOP)
    try:
        run(federation, rounds=1)
        waiting(federation, "a (away")
        waiting(federation, "b (away")
        sites[0].daemon.process.send_signal(signal.SIGCONT)
        waiting(federation, "waits for b (away")
        assert federation.run_state("run").measured == []
    finally:
        for made in sites:
            made.daemon.process.send_signal(signal.SIGCONT)
    told = next(e["data"] for e in federation.finish("run") if e["kind"] == "run_calibrated")
    assert told["settings"] == {"learning_rate": 0.375}


def test_past_its_deadline_it_goes_on_with_the_first_that_answers(federation):
    federation.import_model("start", MODEL)
    for name, rate in (("a", 0.25), ("b", 0.5)):
        site(federation, name, learning_rate=rate, batch_size=1, after="go")
    run(federation, rounds=1, calibration={"deadline": "1s"})
    waiting(federation, "it goes on with the first that answers")
    (federation.sites["a"].directory / "go").touch()
    told = until(lambda: federation.run_state("run").measured, "the first answer")
    assert {m.name: dict(m.sites) for m in told} == {"batch_size": {"a": 1}, "learning_rate": {"a": 0.25}}
    (federation.sites["b"].directory / "go").touch()
    federation.finish("run")


def test_one_that_fails_and_one_that_is_away_are_gone_without(federation):
    federation.import_model("start", MODEL)
    site(federation, "fails", fail="no")
    well = site(federation, "well", learning_rate=0.5, batch_size=1)
    away = site(federation, "away", start=False, learning_rate=1.0, batch_size=1)
    away.start()
    until(lambda: sum(c["connected"] for c in federation.json("client", "list")) == 3, "three sites")
    away.daemon.process.send_signal(signal.SIGSTOP)
    try:
        run(federation, clients=3, rounds=1, quorum=1)
        calibrated = until(lambda: federation.run_state("run").measured, "the measuring to end")
    finally:
        away.daemon.process.send_signal(signal.SIGCONT)
    assert {m.name: dict(m.sites) for m in calibrated} == {"batch_size": {"well": 1}, "learning_rate": {"well": 0.5}}
    assert calls(well) == 1


def test_without_any_value_the_run_fails_and_says_why(federation):
    federation.import_model("start", MODEL)
    for name in ("a", "b"):
        site(federation, name, fail="no")
    run(federation)
    end = federation.finish("run", code=1)[-1]["data"]
    assert end["state"] == "failed"
    assert "no site could measure batch_size, learning_rate (a: EXCEPTION" in end["reason"]


def test_a_search_outlives_its_process_and_the_server(federation):
    federation.import_model("start", MODEL)
    killed = site(federation, "a", learning_rate=0.5, batch_size=3, die=3)
    site(federation, "b", start=False, learning_rate=0.25, batch_size=1)
    second = federation.sites["b"]
    second.start()
    until(lambda: len(federation.json("client", "list")) == 2, "two sites")
    run(federation, rounds=1)
    until((killed.directory / "calls").exists, "the first search")
    federation.kill_server()
    federation.start_server(lease_term="5s", max_poll_wait="2s")
    federation.finish("run")
    assert alive(killed.daemon.pid)
    assert calls(killed) == 4
    assert calls(second) == 1
    assert federation.export("run@1")["w"].tolist() == [0.375] * 3


def test_a_search_as_the_documentation_shows_it_goes_on_below_what_kills_its_process(federation):
    federation.import_model("start", MODEL)
    made = site(federation, "a", fits=3)
    run(federation, clients=1, rounds=1, settings={"batch_size": "auto"})
    federation.finish("run")
    assert federation.run_state("run").measured[0].sites == {"a": 3}
    assert (made.directory / "tried").read_text().split() == ["1", "2", "4", "4", "3"]
    assert calls(made) == 3
    assert alive(made.daemon.pid)


def test_a_training_that_runs_out_of_memory_at_the_measured_batch_goes_on_with_less(federation):
    federation.import_model("start", MODEL)
    made = site(federation, "a", batch_size=9, room=4)
    run(federation, clients=1, settings={"batch_size": "auto"})
    federation.finish("run")
    rounds = [federation.round("run", number).tasks for number in (1, 2)]
    tasks = [[(t.attempt, t.metrics["loss"]) for t in tasks if t.kind == "train" and t.metrics] for tasks in rounds]
    assert tasks == [[(2, 4)], [(1, 4)]]
    assert "memory ran out with the measured batch of 9: from now on 4 are taken" in made.daemon.log.read_text()
    assert calls(made) == 1


def test_a_site_that_cannot_measure_is_told_so(federation):
    federation.import_model("start", MODEL)
    federation.site("old", "steady:Steady")
    until(lambda: federation.json("client", "list"), "the site")
    path = federation.root / "run.toml"
    path.write_text(
        toml({"name": "run", "workload": "work", "model": "start", "rounds": 1, "settings": {"epochs": "auto"}})
    )
    said = federation.call("run", "create", str(path), code=2).stderr
    assert "cannot measure it" in said


def test_train_local(federation):
    made = site(federation, "a", start=False, learning_rate=0.25, batch_size=7)
    path = made.directory / "run.toml"
    path.write_text(
        toml({"workload": "work", "rounds": 2, "settings": {"learning_rate": "auto", "batch_size": "auto"}})
    )
    found = json.loads(
        call("fedclient", "train-local", "--settings", str(path), "--config", str(made.config), "--json").stdout
    )
    assert found["measured"] == {"batch_size": 7, "learning_rate": 0.25}
    assert [v["train"].get("loss") for v in found["versions"]] == [None, 7, 7]
    assert calls(made) == 1
