"""Sites that read what is not theirs, send what is wrong, or say one thing and then another."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import save

from fedlink.blobs import CHUNK_SIZE, BlobRef, chunk_digests_of, ref_of
from fedlink.errors import Reason
from fedlink.manifest import ref_to_pb
from fedlink.v1 import admin_service_pb2 as admin_pb
from fedlink.v1 import blob_service_pb2 as blob_pb
from fedlink.v1 import coordination_service_pb2 as pb
from fedlink.v1 import types_pb2 as types_pb
from tests.support.federation import Federation
from tests.support.peer import Peer, manifest_of, refusal

# One federation, in one test process.
pytestmark = pytest.mark.xdist_group("hostile")

MODEL = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(2, np.float32)}
GOOD = {"w": np.full((3, 4), 0.5, np.float32), "b": np.full(2, -1, np.float32)}
ACCEPTED = pb.CompleteTaskResponse(outcome=pb.CompleteTaskResponse.OUTCOME_ACCEPTED)
Make = Callable[..., Peer]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A server with a model; every test here has runs and sites of its own."""
    with Federation(tmp_path_factory.mktemp("federation")) as federation:
        federation.start_server()
        federation.import_model("start", MODEL)
        yield federation


@pytest.fixture
def peer(federation: Federation) -> Iterator[Make]:
    """Makes registered sites; names are unknown to other tests."""
    with contextlib.ExitStack() as stack:
        yield lambda name, **options: stack.enter_context(Peer(federation.address, name, **options))


class Run:
    """A run that only its own sites can take part in, for its workload is called like it."""

    def __init__(self, federation: Federation, name: str, **tables: Any) -> None:
        self.federation, self.name = federation, name
        self.tables = {"evaluation": {"enabled": False}, **tables}

    def begin(self, *peers: Peer) -> list[pb.Task]:
        """Register the sites, create the run, and fetch each one's first task."""
        for p in peers:
            p.register(workload=self.name)
        cohort = {"min_clients": len(peers), **self.tables.pop("cohort", {})}
        spec = {"name": self.name, "workload": self.name, "model": "start", "rounds": 1, "cohort": cohort}
        with self.federation.admin() as admin:
            request = admin_pb.CreateRunRequest(spec_json=json.dumps(spec | self.tables), request_id=os.urandom(16))
            admin.CreateRun(request, timeout=60)
        return [p.task() for p in peers]

    def end(self) -> None:
        with self.federation.admin() as admin:
            admin.StopRun(admin_pb.StopRunRequest(run=self.name), timeout=60)


def test_another_sites_update_is_out_of_reach(federation: Federation, peer: Make) -> None:
    ada, bob = peer("read-a"), peer("read-b")
    run = Run(federation, "reading")
    a, b = run.begin(ada, bob)
    data = save(GOOD)
    upload = ada.start(a.token, data)
    assert ada.write(upload.upload_id, data).complete
    digest = ref_of(data).digest

    with refusal(Reason.BLOB_NOT_FOUND) as there:
        bob.read(b.token, digest)
    with refusal(Reason.BLOB_NOT_FOUND) as nowhere:
        bob.read(b.token, os.urandom(32))
    assert there[0].message == nowhere[0].message, "the two are not told apart"
    with refusal(Reason.TASK_NOT_FOUND):
        bob.read(a.token, digest)
    with refusal(Reason.BLOB_NOT_FOUND):
        ada.read(a.token, digest)  # not even one's own: nothing needs it
    assert bob.missing(b.token, digest) == [digest]
    assert ada.missing(a.token, digest) == []
    with refusal(Reason.TASK_NOT_FOUND):
        bob.missing(a.token, digest)
    # Knowing a digest gives nothing: bob has to send the bytes himself.
    started = bob.start(b.token, data)
    assert (started.committed_size, started.complete) == (0, False)
    assert started.upload_id != upload.upload_id
    for method in (
        lambda: bob.write(upload.upload_id, data),
        lambda: bob.call(bob.blobs.QueryUpload, blob_pb.QueryUploadRequest(upload_id=upload.upload_id)),
        lambda: bob.call(bob.blobs.QueryUpload, blob_pb.QueryUploadRequest(upload_id=os.urandom(16))),
        lambda: bob.call(bob.blobs.QueryUpload, blob_pb.QueryUploadRequest(upload_id=b"")),
    ):
        with refusal(Reason.UPLOAD_NOT_FOUND):
            method()
    run.end()


def test_a_model_is_read_only_under_a_task_of_its_run(federation: Federation, peer: Make) -> None:
    federation.import_model("secret", {"w": np.full(3, 7, np.float32)})
    ada, bob = peer("model-a"), peer("model-b")
    secret, plain = Run(federation, "secret-run", model="secret"), Run(federation, "plain-run")
    [a] = secret.begin(ada)
    [b] = plain.begin(bob)
    manifest, arrays = ada.model(a)
    assert list(arrays) == ["w"]
    for digest in (a.model.digest, manifest.files[0].blob.digest):
        with refusal(Reason.BLOB_NOT_FOUND):
            bob.read(b.token, digest)
        with refusal(Reason.TASK_NOT_FOUND):
            bob.read(b"", digest)
        with refusal(Reason.TASK_NOT_FOUND):
            bob.read(os.urandom(16), digest)
        assert bob.missing(b.token, digest) == [digest]
    # What the site may read it need not send, as long as it is announced.
    assert bob.model(b)[1]["w"].shape == (3, 4)
    secret.end()
    with refusal(Reason.ROUND_CLOSED, Reason.TASK_NOT_FOUND):
        ada.read(a.token, manifest.files[0].blob.digest)
    plain.end()


def test_a_result_counts_only_with_what_was_sent_under_its_own_task(federation: Federation, peer: Make) -> None:
    ada, bob = peer("own-a"), peer("own-b")
    run = Run(federation, "own", rounds=2)
    a, b = run.begin(ada, bob)
    update = ada.send(a.token, GOOD)
    with refusal(Reason.BLOB_MISSING) as said:
        bob.complete(b.token, update)
    assert said[0].metadata["digest"] == ref_of(update).digest.hex()
    # Bob's own manifest that names ada's file.
    bob.upload(b.token, update)
    with refusal(Reason.BLOB_MISSING) as said:
        bob.complete(b.token, update)
    assert said[0].metadata["digest"] == ref_of(save(GOOD)).digest.hex()
    with refusal(Reason.TASK_NOT_FOUND):
        bob.complete(a.token, update)

    assert ada.complete(a.token, update) == ACCEPTED
    assert bob.complete(b.token, bob.send(b.token, GOOD)) == ACCEPTED
    second = ada.task([a.token])
    assert second.round == 2
    with refusal(Reason.BLOB_MISSING):
        ada.complete(second.token, update)
    assert ada.complete(second.token, ada.send(second.token, GOOD)) == ACCEPTED
    run.end()


def test_a_refused_update_is_named_and_the_round_goes_on(federation: Federation, peer: Make) -> None:
    ada, bob, eve = peer("nan-a"), peer("nan-b"), peer("nan-e")
    run = Run(federation, "nan", cohort={"quorum": 2})
    a, b, e = run.begin(ada, bob, eve)
    broken = {**GOOD, "w": GOOD["w"].copy()}
    broken["w"][2, 1] = np.nan
    sent = eve.send(e.token, broken)
    verdict = eve.complete(e.token, sent, examples=10**9)
    assert verdict.outcome == pb.CompleteTaskResponse.OUTCOME_REFUSED
    assert (verdict.reason, verdict.tensor) == ("NOT_FINITE", "w")
    assert "'w'" in verdict.message
    assert eve.complete(e.token, sent, examples=10**9) == verdict
    assert ada.complete(a.token, ada.send(a.token, GOOD), examples=3) == ACCEPTED
    other = {name: 3 * array for name, array in GOOD.items()}
    assert bob.complete(b.token, bob.send(b.token, other), examples=1) == ACCEPTED
    federation.finish("nan")
    result = federation.export("nan")
    for name, array in MODEL.items():
        np.testing.assert_array_equal(result[name], array + 1.5 * GOOD[name])
    [shown] = federation.json("round", "show", "nan", "1")
    assert {t["client"]: (t["state"], t["reason"]) for t in shown["tasks"]} == {
        "nan-a": ("accepted", ""),
        "nan-b": ("accepted", ""),
        "nan-e": ("refused", "NOT_FINITE"),
    }
    # The verdict stays after the round.
    assert eve.complete(e.token, sent, examples=10**9) == verdict


WRONG: dict[str, tuple[dict[str, np.ndarray], str, str]] = {
    "shape": ({**GOOD, "w": np.zeros((4, 3), np.float32)}, "SHAPE_MISMATCH", "w"),
    "rank": ({**GOOD, "b": np.zeros((2, 1), np.float32)}, "SHAPE_MISMATCH", "b"),
    "dtype": ({**GOOD, "w": GOOD["w"].astype(np.float16)}, "DTYPE_MISMATCH", "w"),
    "wide": ({**GOOD, "b": GOOD["b"].astype(np.float64)}, "DTYPE_MISMATCH", "b"),
    "missing": ({"w": GOOD["w"]}, "TENSOR_MISSING", "b"),
    "unexpected": ({**GOOD, "c": np.zeros(1, np.float32)}, "TENSOR_UNEXPECTED", "c"),
    "infinite": ({**GOOD, "b": np.array([1, -np.inf], np.float32)}, "NOT_FINITE", "b"),
}


@pytest.mark.parametrize("case", WRONG)
def test_updates_that_do_not_fit_the_model(federation: Federation, peer: Make, case: str) -> None:
    arrays, reason, tensor = WRONG[case]
    eve = peer(f"wrong-{case}")
    run = Run(federation, f"wrong-{case}")
    [task] = run.begin(eve)
    verdict = eve.complete(task.token, eve.send(task.token, arrays))
    assert verdict.outcome == pb.CompleteTaskResponse.OUTCOME_REFUSED
    assert (verdict.reason, verdict.tensor) == (reason, tensor)
    assert tensor in verdict.message
    run.end()


def lying(change: Callable[[types_pb.Manifest], None]) -> Callable[[Peer, pb.Task], bytes]:
    """Sends a good file under a manifest that was changed."""

    def send(eve: Peer, task: pb.Task) -> bytes:
        data = save(GOOD)
        manifest = manifest_of(data, types_pb.Manifest.KIND_DELTA)
        change(manifest)
        eve.upload(task.token, data)
        text = manifest.SerializeToString()
        eve.upload(task.token, text)
        return text

    return send


def send_garbage(eve: Peer, task: pb.Task) -> bytes:
    text = os.urandom(5000)
    eve.upload(task.token, text)
    return text


def send_garbage_file(eve: Peer, task: pb.Task) -> bytes:
    data = b"\xff" * 4096
    manifest = manifest_of(save(GOOD), types_pb.Manifest.KIND_DELTA)
    manifest.files[0].blob.CopyFrom(ref_to_pb(ref_of(data)))
    eve.upload(task.token, data)
    text = manifest.SerializeToString()
    eve.upload(task.token, text)
    return text


LIES = {
    "kind": lying(lambda m: setattr(m, "kind", types_pb.Manifest.KIND_GRADIENT)),
    "model": lying(lambda m: setattr(m, "kind", types_pb.Manifest.KIND_MODEL)),
    "path": lying(lambda m: setattr(m.files[0], "name", "../../etc/passwd")),
    "offset": lying(lambda m: setattr(m.tensors[0], "offset", 1 << 40)),
    "overlap": lying(lambda m: setattr(m.tensors[0], "offset", m.tensors[1].offset)),
    "file": lying(lambda m: setattr(m.tensors[0], "file", 7)),
    "swapped": lying(lambda m: m.tensors[0].shape.__setitem__(slice(None), [6])),
    "twice": lying(lambda m: m.tensors.append(m.tensors[0])),
    "alias": lying(lambda m: m.aliases.add(name="x", target="w") and None),
    "huge": lying(lambda m: m.tensors[0].shape.append(1 << 62)),
    "garbage": send_garbage,
    "garbage-file": send_garbage_file,
}


def test_manifests_that_lie(federation: Federation, peer: Make) -> None:
    eve = peer("liar")
    run = Run(federation, "lies", cohort={"round_attempts": 100})
    [task] = run.begin(eve)
    held = []
    for name, send in LIES.items():
        verdict = eve.complete(task.token, send(eve, task))
        assert verdict.outcome == pb.CompleteTaskResponse.OUTCOME_REFUSED, name
        assert verdict.reason in ("BAD_MANIFEST", "SHAPE_MISMATCH", "TENSOR_UNEXPECTED", "TOO_LARGE"), name
        assert verdict.message, name
        held.append(task.token)
        task = eve.task(held)
    # It may still be good: nothing of this has harmed the run.
    assert eve.complete(task.token, eve.send(task.token, GOOD)) == ACCEPTED
    federation.finish("lies")


def test_too_much(federation: Federation, peer: Make) -> None:
    eve = peer("much")
    run = Run(federation, "much")
    [task] = run.begin(eve)
    assert 0 < task.train.max_update_bytes < 1 << 20
    big = bytes(16 << 20)
    with refusal(Reason.TOO_LARGE):
        eve.start(task.token, big)
    with refusal(Reason.TOO_LARGE, Reason.DIGEST_MISMATCH, Reason.BAD_MANIFEST):
        eve.start(task.token, b"", blob=ref_to_pb(BlobRef(os.urandom(32), 1 << 60)), chunk_digests=b"")
    # Not in one piece, nor in many.
    with refusal(Reason.TOO_LARGE):
        for i in range(80):
            eve.start(task.token, bytes([i]) * (1 << 20))
    with refusal(Reason.TOO_LARGE):
        request = pb.CompleteTaskRequest(token=task.token, num_examples=1)
        request.update.CopyFrom(ref_to_pb(BlobRef(os.urandom(32), 9 << 20)))
        eve.complete_as(request)
    with pytest.raises(grpc.RpcError) as caught:
        eve.call(eve.coordination.PollTask, pb.PollTaskRequest(held_tokens=[bytes(64)] * 100_000))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with refusal(Reason.TOO_LARGE):
        eve.poll([os.urandom(16) for _ in range(5000)])
    assert eve.extend(task.token).lease_term.seconds
    run.end()


def test_chunks_that_are_not_what_was_announced(federation: Federation, peer: Make) -> None:
    eve = peer("chunks")
    run = Run(federation, "chunks")
    [task] = run.begin(eve)
    data = os.urandom(2 * CHUNK_SIZE + 10)
    with refusal(Reason.DIGEST_MISMATCH):
        eve.start(task.token, data, chunk_digests=chunk_digests_of(data[::-1]))
    upload = eve.start(task.token, data)
    wrong = data[:CHUNK_SIZE] + bytes(CHUNK_SIZE) + data[2 * CHUNK_SIZE :]
    with refusal(Reason.CHUNK_CORRUPT) as said:
        eve.write(upload.upload_id, wrong)
    assert said[0].metadata["committed_size"] == str(CHUNK_SIZE)
    with refusal(Reason.OFFSET_MISMATCH) as said:
        eve.write(upload.upload_id, data, start=2 * CHUNK_SIZE)
    assert said[0].metadata["committed_size"] == str(CHUNK_SIZE)
    assert eve.write(upload.upload_id, data, start=CHUNK_SIZE).complete
    run.end()


def test_a_verdict_is_given_once(federation: Federation, peer: Make) -> None:
    ada, bob = peer("once-a"), peer("once-b")
    run = Run(federation, "once")
    a, b = run.begin(ada, bob)
    first = ada.send(a.token, GOOD)
    assert ada.complete(a.token, first, examples=5, steps=2) == ACCEPTED
    assert ada.complete(a.token, first, examples=5, steps=2) == ACCEPTED
    for other in ({"examples": 6, "steps": 2}, {"examples": 5, "steps": 3}):
        with refusal(Reason.TASK_COMPLETED):
            ada.complete(a.token, first, **other)
    with refusal(Reason.TASK_COMPLETED):
        ada.complete(a.token, b"another manifest", examples=5, steps=2)
    with refusal(Reason.TASK_COMPLETED, Reason.ROUND_CLOSED, Reason.TASK_NOT_FOUND):
        ada.send(a.token, {name: 2 * x for name, x in GOOD.items()})
    assert bob.complete(b.token, bob.send(b.token, GOOD), examples=5) == ACCEPTED
    federation.finish("once")
    # The round is over, and the answer is what it was.
    assert ada.complete(a.token, first, examples=5, steps=2) == ACCEPTED
    with refusal(Reason.TASK_COMPLETED):
        ada.complete(a.token, first, examples=7)
    for late in (lambda: bob.start(b.token, b"late"), lambda: bob.extend(b.token)):
        with refusal(Reason.ROUND_CLOSED, Reason.TASK_NOT_FOUND, Reason.TASK_COMPLETED):
            late()
    assert set(ada.poll([a.token]).released_tokens) == {a.token}
    result = federation.export("once")
    for name, array in MODEL.items():
        np.testing.assert_array_equal(result[name], array + GOOD[name])


def test_results_that_make_no_sense(federation: Federation, peer: Make) -> None:
    eve = peer("sense")
    run = Run(federation, "sense")
    [task] = run.begin(eve)
    update = eve.send(task.token, GOOD)
    for fields in (
        {"examples": (1 << 53) + 1},
        {"steps": 1 << 60},
        {"metrics": {"loss": float("nan")}},
        {"metrics": {"x" * 65: 1.0}},
        {"metrics": {f"m{i}": 1.0 for i in range(65)}},
        {"compute_seconds": float("inf")},
    ):
        with refusal(Reason.WRONG_RESULT):
            eve.complete(task.token, update, **fields)
    with refusal(Reason.NO_EXAMPLES):
        eve.complete(task.token, update, examples=0)
    with refusal(Reason.WRONG_RESULT):
        eve.complete(task.token, None)
    assert eve.complete(task.token, update) == ACCEPTED
    federation.finish("sense")


def test_an_evaluation_takes_no_update(federation: Federation, peer: Make) -> None:
    eve = peer("eval")
    run = Run(federation, "eval", evaluation={"enabled": True})
    [task] = run.begin(eve)
    held = []
    while task.HasField("train"):
        held.append(task.token)
        task = eve.task(held)
    with refusal(Reason.WRONG_RESULT):
        eve.upload(task.token, b"something")
    with refusal(Reason.WRONG_RESULT):
        eve.complete(task.token, b"something")
    run.end()


def test_the_newest_process_of_a_site_wins(federation: Federation, peer: Make) -> None:
    old, new, twin = peer("double"), peer("double"), peer("other")
    run = Run(federation, "double")
    instance = os.urandom(16)
    [task, _] = run.begin(old, twin)
    new.register(workload="double", instance=instance)
    for call in (
        old.poll,
        lambda: old.extend(task.token),
        lambda: old.read(task.token, task.model.digest),
        lambda: old.call(old.coordination.DeregisterClient, pb.DeregisterClientRequest()),
    ):
        with refusal(Reason.SESSION_REPLACED):
            call()
    # The tasks keep their tokens, and the new process finds them.
    assert new.task().token == task.token
    assert new.read(task.token, task.model.digest)
    session = new.metadata["fedlink-session-bin"]
    assert new.register(workload="double", instance=instance).metadata["fedlink-session-bin"] == session
    # Another site's session is nobody's.
    twin.metadata["fedlink-session-bin"] = session
    with refusal(Reason.SESSION_UNKNOWN, Reason.SESSION_REPLACED):
        twin.poll()
    for nonsense in (b"", os.urandom(16), os.urandom(1000)):
        new.metadata["fedlink-session-bin"] = nonsense
        with refusal(Reason.SESSION_UNKNOWN, Reason.SESSION_REPLACED):
            new.poll()
    run.end()


def test_who_may_come(federation: Federation, peer: Make) -> None:
    with refusal(Reason.CLIENT_TOO_OLD) as said:
        peer("ancient").register(protocol=0)
    assert "upgrade fedlink at the site" in said[0].message
    with refusal(Reason.CLIENT_TOO_NEW) as said:
        peer("modern").register(protocol=99)
    assert "upgrade the server" in said[0].message
    with refusal(Reason.BAD_REGISTRATION):
        peer("nameless").register(workload="../x")
    for name in ("../up", "a" * 65, "sp ace", ".dot"):
        with refusal(Reason.BAD_CREDENTIALS, Reason.BAD_NAME):
            peer(name).register()
    token = federation.call("client", "add", "known").stdout.strip()
    for wrong in ("", "fedlink_guess", token + "x"):
        with refusal(Reason.BAD_CREDENTIALS):
            peer("known", token=wrong).register()
    with refusal(Reason.BAD_CREDENTIALS):
        peer("somebody", token=token).register()
    known = peer("known", token=token).register()
    known.poll()
    # A session without its credential is worth nothing.
    del known.metadata["authorization"]
    with refusal(Reason.BAD_CREDENTIALS):
        known.poll()
    known.metadata["authorization"] = f"Bearer {token}"
    federation.call("client", "revoke", "known")
    with refusal(Reason.BAD_CREDENTIALS):
        known.poll()
