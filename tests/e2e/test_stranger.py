"""A client written by a stranger: the generated stubs, grpcio, blake3, safetensors and numpy, and nothing else of ours.

What is here follows the comments of protos/fedlink/v1 alone; the server and the operator's commands are processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import load, load_file, save, save_file

from fedlink.v1 import blob_service_pb2 as blob
from fedlink.v1 import blob_service_pb2_grpc as blob_grpc
from fedlink.v1 import coordination_service_pb2 as coord
from fedlink.v1 import coordination_service_pb2_grpc as coord_grpc
from fedlink.v1 import types_pb2 as types

CHUNK = 1 << 20
STREAM = 64 << 20
PROTOCOL = 1
BIN = Path(sys.executable).parent
SCHEMA = json.dumps(
    {"type": "object", "additionalProperties": False, "properties": {"rate": {"type": "number", "minimum": 0}}}
)
DTYPES = {"F32": types.DTYPE_F32, "I64": types.DTYPE_I64}


def chunks_of(data: bytes) -> list[bytes]:
    return [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]


def chunk_digests_of(data: bytes) -> bytes:
    return b"".join(blake3(c).digest() for c in chunks_of(data))


def ref_of(data: bytes) -> types.BlobRef:
    return types.BlobRef(digest=blake3(chunk_digests_of(data)).digest(), size=len(data))


class Stranger:
    """A site of its own making; `shift` and `examples` are its whole training."""

    def __init__(self, address: str, name: str, shift: float, examples: int) -> None:
        self.channel = grpc.insecure_channel(address)
        self.coordination = coord_grpc.CoordinationServiceStub(self.channel)
        self.blobs = blob_grpc.BlobServiceStub(self.channel)
        self.name, self.shift, self.examples = name, shift, examples
        self.metadata: tuple[tuple[str, str | bytes], ...] = (("fedlink-client", name),)
        self.held: list[bytes] = []
        self.outcomes: dict[str, Any] = {}

    def call(self, method: Any, request: Any) -> Any:
        return method(request, metadata=self.metadata, timeout=60)

    def register(self) -> None:
        info = self.coordination.GetServerInfo(coord.GetServerInfoRequest(), timeout=60)
        assert info.min_protocol_version <= PROTOCOL <= info.protocol_version
        offer = coord.RegisterClientRequest.WorkloadOffer(
            name="shift", settings_schema_json=SCHEMA, abilities=["train", "evaluate"]
        )
        request = coord.RegisterClientRequest(
            instance_id=os.urandom(16),
            protocol_version=PROTOCOL,
            software_version="stranger 3",
            workloads=[offer],
            devices=[types.Device(name="cpu")],
        )
        response = self.call(self.coordination.RegisterClient, request)
        assert response.client_name == self.name
        self.metadata += (("fedlink-session-bin", response.session),)
        self.poll_wait = response.max_poll_wait

    def work(self) -> None:
        """Take tasks and do them, until the last one there will be."""
        deadline = time.monotonic() + 90
        while "evaluate 1" not in self.outcomes:
            assert time.monotonic() < deadline
            request = coord.PollTaskRequest(held_tokens=self.held, wait=self.poll_wait)
            response = self.call(self.coordination.PollTask, request)
            self.held = [t for t in self.held if t not in response.released_tokens]
            if response.HasField("task"):
                self.held.append(response.task.token)
                try:
                    (self.train if response.task.HasField("train") else self.evaluate)(response.task)
                except grpc.RpcError as e:
                    over = e.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION)
                    # A newer version's evaluation takes the place of an older one's: drop it.
                    if not over or response.task.HasField("train"):
                        raise
            elif response.HasField("retry_after"):
                time.sleep(response.retry_after.ToMilliseconds() / 1000)

    def train(self, task: coord.Task) -> None:
        assert task.train.update == types.Manifest.KIND_DELTA
        assert task.train.update_dtype == types.DTYPE_F32
        manifest, tensors = self.model(task)
        self.lease(task, coord.ExtendLeaseRequest.ACTIVITY_COMPUTING)
        rate = json.loads(task.settings_json)["rate"]
        update = {}
        for tensor in manifest.tensors:
            x = tensors[tensor.name]
            if tensor.role == types.ROLE_PARAMETER:
                y = (
                    x + np.float32(rate * self.shift) * np.sin(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
                ).astype(np.float32)
                update[tensor.name] = y - x
            elif tensor.role == types.ROLE_BUFFER:
                update[tensor.name] = np.array(x + self.examples)
        points = [coord.ReportMetricsRequest.Point(name="loss", value=0.5, step=1)]
        self.call(self.coordination.ReportMetrics, coord.ReportMetricsRequest(token=task.token, points=points))
        self.update = update
        ref = self.send_update(task, update)
        done = coord.CompleteTaskRequest(
            token=task.token,
            update=ref,
            num_examples=self.examples,
            steps=1,
            metrics={"loss": 0.5},
            compute_seconds=0.1,
        )
        self.outcomes["train"] = self.complete(done)
        assert self.complete(done) == self.outcomes["train"]

    def evaluate(self, task: coord.Task) -> None:
        _, tensors = self.model(task)
        done = coord.CompleteTaskRequest(
            token=task.token, num_examples=self.examples, metrics={"accuracy": float(abs(tensors["w"]).mean() < 1e9)}
        )
        self.outcomes[f"evaluate {task.version}"] = self.complete(done)

    def complete(self, request: coord.CompleteTaskRequest) -> coord.CompleteTaskResponse:
        while True:
            verdict = self.call(self.coordination.CompleteTask, request)
            if verdict.outcome != coord.CompleteTaskResponse.OUTCOME_CHECKING:
                return verdict

    def lease(self, task: coord.Task, activity: Any) -> None:
        request = coord.ExtendLeaseRequest(token=task.token, activity=activity, done=0, total=1)
        assert not self.call(self.coordination.ExtendLease, request).cancel

    # --- Bytes

    def model(self, task: coord.Task) -> tuple[types.Manifest, dict[str, np.ndarray]]:
        manifest = types.Manifest.FromString(self.download(task, task.model))
        assert manifest.kind == types.Manifest.KIND_MODEL
        files = [self.download(task, f.blob) for f in manifest.files]
        tensors: dict[str, np.ndarray] = {}
        for data in files:
            tensors |= load(data)
        for t in manifest.tensors:
            array = tensors[t.name]
            assert list(array.shape) == list(t.shape)
            assert files[t.file][t.offset : t.offset + array.nbytes] == array.tobytes()
        return manifest, tensors

    def download(self, task: coord.Task, ref: types.BlobRef) -> bytes:
        data = b""
        digests = b""
        while not digests or len(data) < ref.size:
            request = blob.ReadBlobRequest(
                task_token=task.token, digest=ref.digest, offset=len(data), include_chunk_digests=not digests
            )
            stream = self.blobs.ReadBlob(request, metadata=self.metadata, timeout=60)
            head = next(stream)
            assert head.size == ref.size
            assert not head.payload
            if not digests:
                digests = head.chunk_digests
                assert blake3(digests).digest() == ref.digest
            for message in stream:
                assert message.offset == len(data)
                n = len(data) // CHUNK
                assert blake3(message.payload).digest() == digests[32 * n : 32 * n + 32]
                data += message.payload
        return data

    def send_update(self, task: coord.Task, tensors: dict[str, np.ndarray]) -> types.BlobRef:
        """One file with everything in it, and its manifest."""
        data = save(tensors)
        manifest = types.Manifest(kind=types.Manifest.KIND_DELTA)
        manifest.files.add(name="update.safetensors").blob.CopyFrom(ref_of(data))
        size = int.from_bytes(data[:8], "little")
        for name, spec in json.loads(data[8 : 8 + size]).items():
            if name == "__metadata__":
                continue
            role = types.ROLE_BUFFER if spec["dtype"] == "I64" else types.ROLE_PARAMETER
            offset = 8 + size + spec["data_offsets"][0]
            manifest.tensors.add(name=name, dtype=DTYPES[spec["dtype"]], shape=spec["shape"], role=role, offset=offset)
        text = manifest.SerializeToString()
        asked = [ref_of(text).digest, ref_of(data).digest]
        request = blob.FindMissingBlobsRequest(task_token=task.token, digests=asked)
        assert list(self.call(self.blobs.FindMissingBlobs, request).missing) == asked
        for part in (text, data):
            self.upload(task, part)
        return ref_of(text)

    def upload(self, task: coord.Task, data: bytes) -> None:
        request = blob.StartUploadRequest(
            task_token=task.token, blob=ref_of(data), chunk_digests=chunk_digests_of(data)
        )
        upload = self.call(self.blobs.StartUpload, request)
        assert upload.committed_size == 0
        # One chunk in a stream of its own, as if the line had broken then, and the rest in another.
        for part in (1, STREAM // CHUNK):
            at = self.call(self.blobs.QueryUpload, blob.QueryUploadRequest(upload_id=upload.upload_id))
            if at.complete:
                return
            written = self.call(self.blobs.WriteBlob, self.messages(upload.upload_id, data, at.committed_size, part))
            assert written.committed_size == min(len(data), at.committed_size + part * CHUNK)
        assert written.complete

    def messages(self, upload_id: bytes, data: bytes, start: int, count: int) -> Iterator[blob.WriteBlobRequest]:
        yield blob.WriteBlobRequest(upload_id=upload_id)
        for i in range(start, min(len(data), start + count * CHUNK), CHUNK):
            yield blob.WriteBlobRequest(offset=i, payload=data[i : i + CHUNK])


# --- The server and its operator, as processes


def fedserver(directory: Path, *arguments: str) -> str:
    command = [str(BIN / "fedserver"), *arguments, "--data-dir", str(directory / "data")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    command = [str(BIN / "fedserver"), "serve", "--data-dir", str(tmp_path / "data"), "--listen", "127.0.0.1:0"]
    written = tmp_path / "data" / "address"
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + 60
            while not written.exists() and time.monotonic() < deadline:
                assert process.poll() is None
                time.sleep(0.02)
            yield written.read_text().strip()
        finally:
            process.kill()


@pytest.mark.slow
def test_a_full_round_with_the_stubs_alone(address: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    model = {
        "w": rng.normal(size=(700, 500)).astype(np.float32),
        "b": rng.normal(size=500).astype(np.float32),
        "seen": np.array(3, np.int64),
        "fixed": rng.normal(size=(300, 300)).astype(np.float32),
    }
    save_file(model, tmp_path / "start.safetensors")
    fedserver(tmp_path, "model", "import", str(tmp_path / "start.safetensors"), "--buffer", "seen", "--frozen", "fixed")
    run = 'name = "r"\nworkload = "shift"\nmodel = "start"\nrounds = 1\n[settings]\nrate = 0.25\n'
    (tmp_path / "run.toml").write_text(run)

    strangers = [Stranger(address, "ada", 0.7, 30), Stranger(address, "bob", -0.2, 11)]
    with contextlib.ExitStack() as stack:
        for stranger in strangers:
            stack.callback(stranger.channel.close)
            stranger.register()
        fedserver(tmp_path, "run", "create", str(tmp_path / "run.toml"))
        threads = [threading.Thread(target=s.work) for s in strangers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        for stranger in strangers:
            stranger.call(stranger.coordination.DeregisterClient, coord.DeregisterClientRequest())

    accepted = coord.CompleteTaskResponse(outcome=coord.CompleteTaskResponse.OUTCOME_ACCEPTED)
    for stranger in strangers:
        assert {"train", "evaluate 1"} <= set(stranger.outcomes)
        assert all(outcome == accepted for outcome in stranger.outcomes.values())
    events = [json.loads(line) for line in fedserver(tmp_path, "run", "watch", "r", "--json").splitlines()]
    assert events[-1]["data"]["state"] == "completed"
    [shown] = json.loads(fedserver(tmp_path, "round", "list", "r", "--json"))
    assert shown["phase"] == "committed"
    assert shown["metrics"]["accuracy"] == 1.0

    fedserver(tmp_path, "model", "export", "r@1", str(tmp_path / "out"))
    result: dict[str, np.ndarray] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        result |= load_file(file)
    assert set(result) == set(model)
    for name in ("w", "b"):
        mean = sum(s.examples * s.update[name].astype(np.float64) for s in strangers) / 41
        np.testing.assert_array_equal(result[name], (model[name].astype(np.float64) + mean).astype(np.float32))
    np.testing.assert_array_equal(result["fixed"], model["fixed"])
    # An integer is never averaged: the site with most examples gives it.
    assert result["seen"] == 33
