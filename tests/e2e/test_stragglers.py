"""Who takes part in a round and whose update counts: late ones, new ones, repeats; and what operators do about it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from fedlink.blobs import ref_of
from fedlink.errors import Reason
from fedlink.v1 import admin_service_pb2 as admin_pb
from fedlink.v1 import coordination_service_pb2 as pb
from fedlink.v1 import types_pb2
from fedserver.cli.output import enum_name
from tests.support.federation import Federation, until
from tests.support.peer import Peer, refusal

MODEL = {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}
UPDATE = {"w": np.full((3, 4), 0.5, np.float32)}
ACCEPTED = pb.CompleteTaskResponse.OUTCOME_ACCEPTED
Make = Callable[..., list[Peer]]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A server with a model; every test here has a run and sites of its own."""
    with Federation(tmp_path_factory.mktemp("federation")) as federation:
        federation.start_server()
        federation.import_model("start", MODEL)
        yield federation


@pytest.fixture
def peers(federation: Federation) -> Iterator[Make]:
    """Makes sites that are registered for a workload."""
    with contextlib.ExitStack() as stack:

        def make(workload: str, *names: str) -> list[Peer]:
            found = [stack.enter_context(Peer(federation.address, f"{workload}-{name}")) for name in names]
            return [p.register(workload=workload) for p in found]

        yield make


def create(federation: Federation, name: str, **tables: Any) -> None:
    """A run that only its own sites take part in, for its workload is called like it."""
    spec = {"name": name, "workload": name, "model": "start", "rounds": 2, "evaluation": {"enabled": False}, **tables}
    with federation.admin() as admin:
        admin.CreateRun(admin_pb.CreateRunRequest(spec_json=json.dumps(spec), request_id=os.urandom(16)), timeout=60)


def hand_in(peer: Peer, task: pb.Task) -> None:
    assert peer.complete(task.token, peer.send(task.token, UPDATE)).outcome == ACCEPTED


def fates(federation: Federation, run: str, number: int, attempt: int = 0) -> dict[tuple[str, int], tuple[str, str]]:
    """State and reason of each training task of an attempt at a round, by site and attempt."""
    with federation.admin() as admin:
        request = admin_pb.GetRoundRequest(run=run, number=number, attempt=attempt)
        tasks = [t for t in admin.GetRound(request, timeout=60).round.tasks if t.kind == "train"]
    return {
        (t.client.removeprefix(f"{run}-"), t.attempt): (enum_name(types_pb2.TaskState.Name(t.state)), t.reason)
        for t in tasks
    }


def test_of_more_sites_than_needed_the_first_count_and_the_others_go_on(federation: Federation, peers: Make) -> None:
    sites = peers("over", "a", "b", "c", "d")
    create(federation, "over", cohort={"select": "count", "count": 4, "min_clients": 2, "target": 2, "quorum": 2})
    tasks = [p.task() for p in sites]
    # The third one is in mid-upload when the second update closes the round.
    data = save(UPDATE)
    upload = sites[2].start(tasks[2].token, data)
    for p, task in zip(sites[:2], tasks, strict=False):
        hand_in(p, task)
    federation.until_version("over", 1)
    for p, task in zip(sites[2:], tasks[2:], strict=True):
        for late in (
            lambda p=p, task=task: p.start(task.token, b"late"),
            lambda p=p, task=task: p.missing(task.token, ref_of(b"late").digest),
            lambda p=p, task=task: p.extend(task.token),
            lambda p=p, task=task: p.complete(task.token, b"late"),
        ):
            with refusal(Reason.ROUND_CLOSED) as said:
                late()
            assert "round 1 is closed" in said[0].message
            assert "drop the task" in said[0].message
    with refusal(Reason.ROUND_CLOSED, Reason.UPLOAD_NOT_FOUND):
        sites[2].write(upload.upload_id, data)
    accepted, closed = ("accepted", ""), ("closed", "ROUND_CLOSED")
    assert fates(federation, "over", 1) == {("a", 1): accepted, ("b", 1): accepted, ("c", 1): closed, ("d", 1): closed}
    # The late ones are told to let go, and are in the next round like the others.
    again = [p.task() for p in sites]
    assert [t.round for t in again] == [2] * 4
    assert list(sites[2].poll([tasks[2].token, again[2].token]).released_tokens) == [tasks[2].token]
    for p, task in zip(sites[2:], again[2:], strict=True):
        hand_in(p, task)
    assert federation.finish("over")[-1]["data"]["state"] == "completed"


def test_a_site_that_comes_in_mid_run_takes_part_from_the_next_round(federation: Federation, peers: Make) -> None:
    a, b = peers("join", "a", "b")
    create(federation, "join")
    first = [p.task() for p in (a, b)]
    [c] = peers("join", "c")
    assert not c.poll().HasField("task")
    for p, task in zip((a, b), first, strict=True):
        hand_in(p, task)
    second = [p.task() for p in (a, b, c)]
    assert [t.round for t in second] == [2] * 3
    for p, task in zip((a, b, c), second, strict=True):
        hand_in(p, task)
    closed = [e["data"]["clients"] for e in federation.finish("join") if e["kind"] == "round_closed"]
    assert closed == [["join-a", "join-b"], ["join-a", "join-b", "join-c"]]


def test_an_operator_closes_a_round_pauses_resumes_and_stops(federation: Federation, peers: Make) -> None:
    a, b, c = peers("steer", "a", "b", "c")
    create(federation, "steer", cohort={"min_clients": 3, "quorum": 2}, rounds=3)
    tasks = [p.task() for p in (a, b, c)]
    hand_in(a, tasks[0])
    assert "quorum" in federation.call("round", "close", "steer", code=4).stderr
    hand_in(b, tasks[1])
    federation.call("run", "pause", "steer")
    paused = federation.json("run", "why", "steer")
    assert (paused["state"], [c["name"] for c in paused["clients"]]) == ("paused", ["steer-c"])
    assert not paused["endless"]
    assert paused["waiting"].startswith("round 1 has 2 of 3 updates and waits for steer-c (has had its task for ")
    assert paused["waiting"].endswith("; the run is paused: no further round begins until `fedserver run resume`")
    [closed] = json.loads(federation.call("round", "close", "steer", "--json").stdout)
    assert closed["number"] == 1
    federation.until_version("steer", 1)
    assert fates(federation, "steer", 1)["c", 1] == ("closed", "ROUND_CLOSED")
    assert not c.poll([tasks[2].token]).HasField("task")
    assert federation.json("run", "why", "steer")["endless"]
    federation.call("run", "resume", "steer")
    assert c.task().round == 2
    federation.call("run", "stop", "steer")
    assert set(fates(federation, "steer", 2).values()) == {("closed", "RUN_ENDED")}
    assert federation.call("run", "why", "steer").stdout.endswith("it has ended (stopped): stopped by an operator\n")


def test_repeats_change_nothing_and_the_record_has_every_attempt(federation: Federation, peers: Make) -> None:
    [a] = peers("repeat", "a")
    create(federation, "repeat", cohort={"min_clients": 1, "task_retries": 1, "round_attempts": 2}, rounds=1)
    instance = os.urandom(16)
    a.register(instance=instance, workload="repeat")
    session, first = dict(a.metadata), a.task()
    # The same process once more, and a repeat of the poll: the same session, the same task.
    a.register(instance=instance, workload="repeat")
    assert a.metadata == session
    assert a.task().token == first.token
    data = save(UPDATE)
    assert a.start(first.token, data).upload_id == a.start(first.token, data).upload_id

    def fail(token: bytes, *, retryable: bool) -> None:
        request = pb.FailTaskRequest(
            token=token, reason=pb.FailTaskRequest.REASON_EXCEPTION, exception_class="ValueError", retryable=retryable
        )
        a.call(a.coordination.FailTask, request)

    for _ in range(3):
        fail(first.token, retryable=True)
    second = a.task()
    assert (second.round, second.attempt) == (1, 2)
    # What was under way for the first attempt comes late: it touches neither of them.
    fail(first.token, retryable=True)
    for late in (lambda: a.complete(first.token, b"late"), lambda: a.start(first.token, data)):
        with refusal(Reason.ROUND_CLOSED):
            late()
    fail(second.token, retryable=True)
    failed = ("failed", "EXCEPTION")
    # No retry is left, so the round is tried again.
    third = a.task()
    assert fates(federation, "repeat", 1, attempt=1) == {("a", 1): failed, ("a", 2): failed}
    [shown] = federation.json("round", "show", "repeat", "1", "--attempt", "1")
    assert [(t["state"], t["attempt"], t["reason"], t["message"]) for t in shown["tasks"]] == [
        ("failed", 1, "EXCEPTION", "ValueError"),
        ("failed", 2, "EXCEPTION", "ValueError"),
    ]
    update = a.send(third.token, UPDATE)
    uploaded = a.start(third.token, data)
    assert uploaded.complete
    assert a.write(uploaded.upload_id, data).complete
    for _ in range(3):
        assert a.complete(third.token, update, examples=7).outcome == ACCEPTED
    for other in (
        lambda: a.complete(third.token, update, examples=8),
        lambda: a.complete(third.token, b"another update", examples=7),
        lambda: a.start(third.token, b"another update"),
        lambda: fail(third.token, retryable=True),
    ):
        with refusal(Reason.TASK_COMPLETED):
            other()
    kinds = [e["kind"] for e in federation.finish("repeat")]
    assert [kinds.count(k) for k in ("task_failed", "task_retried", "task_accepted", "round_committed")] == [2, 1, 1, 1]
    assert fates(federation, "repeat", 1) == {("a", 1): ("accepted", "")}
    assert "attempt 2: committed" in federation.call("round", "show", "repeat", "1").stdout
    assert "no attempt 3 at round 1" in federation.call("round", "show", "repeat", "1", "--attempt", "3", code=4).stderr


def test_versions_are_pinned_and_unpinned_by_command(federation: Federation, peers: Make) -> None:
    [a] = peers("pin", "a")
    create(federation, "pin", cohort={"min_clients": 1}, rounds=4, retention={"keep_versions": 1})

    def train(version: int) -> None:
        hand_in(a, a.task())
        federation.until_version("pin", version)

    def versions() -> dict[str, bool]:
        with federation.admin() as admin:
            models = admin.ListModels(admin_pb.ListModelsRequest(), timeout=60).models
        return {m.name: m.pinned for m in models if m.name.startswith("pin@")}

    train(1)
    assert "pin@1 is kept" in federation.call("model", "pin", "pin@1").stdout
    train(2)
    train(3)
    until(lambda: versions() == {"pin@1": True, "pin@3": False}, "the second version to be retired")
    assert "pinned" in federation.call("model", "list").stdout
    assert "there is pin@1, pin@3" in federation.call("model", "pin", "pin@2", code=4).stderr
    assert "it is deleted" in federation.call("model", "unpin", "pin@1").stdout
    assert versions() == {"pin@3": False}
