"""Sites that are not alike: each does its share, which is weighed and recorded, and balanced ones finish together."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlink.v1 import coordination_service_pb2 as pb
from tests.support.federation import Federation
from tests.support.peer import Peer

MODEL = {"w": np.zeros(1, np.float32)}
EVALUATION = {"evaluation": {"enabled": False}}
ACCEPTED = pb.CompleteTaskResponse.OUTCOME_ACCEPTED


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with Federation(tmp_path_factory.mktemp("uneven")) as federation:
        federation.start_server()
        federation.import_model("start", MODEL)
        yield federation


def trained(federation: Federation, run: str, number: int) -> dict[str, dict[str, Any]]:
    """The record of a round's trainings, by site."""
    found = federation.json("round", "show", run, str(number))[0]
    return {task["client"]: task for task in found["tasks"] if task["kind"] == "train"}


def test_shares_of_sites_and_of_the_run_are_kept_weighed_and_recorded(federation: Federation) -> None:
    pace = {"pace": 0.01, "examples": 80}
    for name, share in (("few", {"steps": 10}), ("timed", {"max_seconds": "300ms"}), ("all", {})):
        federation.site(name, "paced:Paced", workload="shares", data=pace, options={"share": share})
    settings = {"settings": {"epochs": 1000}, "work": {"steps": 40}, "cohort": {"min_clients": 3}}
    federation.create_run("shares", workload="shares", model="start", **settings, **EVALUATION)
    federation.finish("shares")
    tasks = trained(federation, "shares", 1)
    assert {name: t["cut"] for name, t in tasks.items()} == {
        "few": "site steps",
        "timed": "site max_seconds",
        "all": "run steps",
    }
    steps = {name: t["steps"] for name, t in tasks.items()}
    assert (steps["few"], steps["all"]) == (10, 40)
    assert 1 <= steps["timed"] < 40
    assert {t["given_steps"] for t in tasks.values()} == {40}
    for task in tasks.values():
        assert task["examples_seen"] == 4 * task["steps"]
        # A half is rounded up.
        assert task["num_examples"] == (2 * 80 * task["steps"] + 40) // 80
    total = sum(t["num_examples"] for t in tasks.values())
    mean = sum(t["num_examples"] * t["steps"] for t in tasks.values()) / total
    np.testing.assert_allclose(federation.export("shares")["w"], mean, rtol=1e-6)

    few = tasks["few"]
    rate = few["steps"] / few["compute_seconds"]
    clients = {c["name"]: c["speeds"] for c in federation.json("client", "list")}
    assert [(s["workload"], s["trainings"]) for s in clients["few"]] == [("shares", 1)]
    assert clients["few"][0]["steps_per_second"] == pytest.approx(rate)
    assert clients["few"][0]["examples_per_second"] == pytest.approx(4 * rate)
    assert federation.json("client", "show", "few")["speeds"] == clients["few"]
    assert "median of 1" in federation.call("client", "show", "few").stdout
    assert "there is no client 'nobody'" in federation.call("client", "show", "nobody", code=4).stderr
    shown = federation.json("run", "show", "shares")["speeds"]
    assert [s["client"] for s in shown] == ["all", "few", "timed"]
    said = federation.call("round", "show", "shares", "1").stdout
    assert "10 of 40" in said
    assert "site max_seconds" in said
    for command in (("client", "list"), ("run", "show", "shares"), ("round", "show", "shares", "1")):
        assert "steps/s" in federation.call(*command).stdout


def test_balanced_shares_follow_the_speeds_are_recorded_and_outlive_the_server(federation: Federation) -> None:
    """Sites that say what speed a test wants: round 1 is equal, round 2 is not, also to a server that was killed."""
    spec = {"name": "shared", "workload": "shared", "model": "start", "rounds": 2, **EVALUATION}
    spec |= {"work": {"steps": "balanced", "mean_steps": 70, "max_seconds": 60}, "cohort": {"min_clients": 3}}
    path = federation.root / "shared.json"
    path.write_text(json.dumps(spec))
    with Peer(federation.address, "a") as a, Peer(federation.address, "b") as b, Peer(federation.address, "c") as c:
        peers, seconds = (a, b, c), (10.0, 20.0, 40.0)
        instances = [os.urandom(16) for _ in peers]
        for peer, instance in zip(peers, instances, strict=True):
            peer.register(workload="shared", instance=instance)
        federation.create_run("shared", **{k: v for k, v in spec.items() if k != "name"})
        for peer, took in zip(peers, seconds, strict=True):
            task = peer.task()
            assert (task.train.limits.steps, task.train.limits.max_seconds) == (70, 60.0)
            update = peer.send(task.token, MODEL)
            done = peer.complete(task.token, update, steps=70, compute_seconds=took, cut="run steps")
            assert done.outcome == ACCEPTED
        tokens = {}
        for peer, steps in zip(peers, (120, 60, 30), strict=True):
            task = peer.task()
            assert (task.round, task.train.limits.steps) == (2, steps)
            tokens[peer.name] = task.token
        federation.kill_server()
        federation.start_server()
        for peer, instance, steps in zip(peers, instances, (120, 60, 30), strict=True):
            peer.register(workload="shared", instance=instance)
            again = peer.task()
            assert (again.token, again.train.limits.steps) == (tokens[peer.name], steps)
            # One fails, in a way that may pass: a further attempt is as long as the first.
            if peer is c:
                failure = pb.FailTaskRequest(
                    token=again.token, reason=pb.FailTaskRequest.REASON_OUT_OF_MEMORY, retryable=True
                )
                peer.call(peer.coordination.FailTask, failure)
                again = peer.task()
                assert (again.attempt, again.train.limits.steps) == (2, 30)
            done = peer.complete(again.token, peer.send(again.token, MODEL), steps=steps, compute_seconds=20.0)
            assert done.outcome == ACCEPTED
        events = federation.finish("shared")
    started = [e["data"]["steps"] for e in events if e["kind"] == "round_started"]
    assert started == [{"a": 70, "b": 70, "c": 70}, {"a": 120, "b": 60, "c": 30}]


def balanced(federation: Federation, name: str, *, pace: float, mean: int) -> tuple[float, float, float, float]:
    """Let sites of speeds 1, 2 and 4 train three rounds.

    Returns:
        The seconds of the best possible round; the longest training of the first, equal one; the longest of the
        better balanced one; and the seconds of that round in all.
    """
    for number, slowness in enumerate((1, 2, 4)):
        data = {"pace": pace * slowness, "examples": 8}
        federation.site(f"{name}-{number}", "paced:Paced", workload=name, data=data)
    work = {"work": {"steps": "balanced", "mean_steps": mean}, "cohort": {"min_clients": 3}}
    federation.create_run(name, workload=name, model="start", rounds=3, **work, **EVALUATION)
    events = federation.finish(name)
    rounds = [list(trained(federation, name, number).values()) for number in (1, 2, 3)]
    assert [sum(t["steps"] for t in tasks) for tasks in rounds] == [3 * mean] * 3
    speeds = [t["steps"] / t["compute_seconds"] for t in rounds[0]]
    ideal = 3 * mean / sum(speeds)
    longest = [max(t["compute_seconds"] for t in tasks) for tasks in rounds]
    whole = [e["data"]["seconds"] for e in events if e["kind"] == "round_committed"]
    print(f"\nsteps: {[{t['client']: t['steps'] for t in tasks} for tasks in rounds]}")
    print(f"ideal {ideal:.2f} s; longest training by round {[round(s, 2) for s in longest]}; rounds {whole}")
    return ideal, longest[0], min(longest[1:]), min(whole[1:])


def test_balanced_sites_finish_together(federation: Federation) -> None:
    ideal, equal, training, _ = balanced(federation, "together", pace=0.02, mean=42)
    assert equal > 1.8 * ideal, "the sites are uneven"
    assert training < 1.15 * ideal


@pytest.mark.slow
def test_a_balanced_round_takes_hardly_longer_than_the_ideal(tmp_path: Path) -> None:
    with Federation(tmp_path) as federation:
        federation.start_server()
        federation.import_model("start", MODEL)
        ideal, equal, _, whole = balanced(federation, "whole", pace=0.05, mean=98)
    assert equal > 1.8 * ideal
    assert whole < 1.15 * ideal
