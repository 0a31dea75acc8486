"""A site as an enemy would write it: every call by hand, honest only where a test wants it so."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import grpc
import ml_dtypes  # noqa: F401 - gives numpy the dtypes that safetensors files may hold
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from safetensors.numpy import load, save

from fedlink import rpc
from fedlink.blobs import CHUNK_SIZE, chunk_digests_of, ref_of
from fedlink.errors import FedlinkError, Reason
from fedlink.manifest import ref_to_pb
from fedlink.v1 import blob_service_pb2 as blob_pb
from fedlink.v1 import blob_service_pb2_grpc as blob_grpc
from fedlink.v1 import coordination_service_pb2 as pb
from fedlink.v1 import coordination_service_pb2_grpc as pb_grpc
from fedlink.v1 import types_pb2 as types_pb

PATIENCE = 60.0
SCHEMA = '{"type": "object", "additionalProperties": false, "properties": {}}'
Arrays = Mapping[str, np.ndarray]


@contextlib.contextmanager
def refusal(*reasons: Reason) -> Iterator[list[FedlinkError]]:
    """Expect a call to be refused for one of these reasons; what was said is put into the list."""
    said: list[FedlinkError] = []
    with pytest.raises(grpc.RpcError) as caught:
        yield said
    error = rpc.from_rpc_error(caught.value)
    assert error.reason in reasons, f"{error.reason.name}: {error.message}"
    assert caught.value.code().name == error.reason.status
    assert error.message
    said.append(error)


def manifest_of(data: bytes, kind: types_pb.Manifest.Kind, *, buffers: Sequence[str] = ()) -> types_pb.Manifest:
    """The manifest of one safetensors file."""
    manifest = types_pb.Manifest(kind=kind)
    manifest.files.add(name="update.safetensors").blob.CopyFrom(ref_to_pb(ref_of(data)))
    start = 8 + int.from_bytes(data[:8], "little")
    for name, spec in json.loads(data[8:start]).items():
        if name != "__metadata__":
            manifest.tensors.add(
                name=name,
                dtype=types_pb.Dtype.Value(f"DTYPE_{spec['dtype']}"),
                shape=spec["shape"],
                role=types_pb.ROLE_BUFFER if name in buffers else types_pb.ROLE_PARAMETER,
                offset=start + spec["data_offsets"][0],
            )
    return manifest


class Peer:
    """A connection of its own to the sites' listener; encrypted with `credentials`."""

    def __init__(
        self, address: str, name: str, *, token: str = "", credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        self.name = name
        options = rpc.channel_options()
        self._channel = (
            grpc.secure_channel(address, credentials, options)
            if credentials
            else grpc.insecure_channel(address, options)
        )
        self.coordination = pb_grpc.CoordinationServiceStub(self._channel)
        self.blobs = blob_grpc.BlobServiceStub(self._channel)
        self.metadata: dict[str, str | bytes] = {rpc.META_CLIENT: name}
        if token:
            self.metadata[rpc.META_AUTHORIZATION] = f"Bearer {token}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def call(self, method: Any, request: Any) -> Any:
        return method(request, metadata=tuple(self.metadata.items()), timeout=PATIENCE)

    # --- Coordination

    def register(self, *, instance: bytes = b"", protocol: int = 1, workload: str = "work") -> Self:
        abilities = ["train", "gradient", "evaluate"]
        offer = pb.RegisterClientRequest.WorkloadOffer(name=workload, settings_schema_json=SCHEMA, abilities=abilities)
        request = pb.RegisterClientRequest(
            instance_id=instance or os.urandom(16), protocol_version=protocol, workloads=[offer]
        )
        self.metadata[rpc.META_SESSION] = self.call(self.coordination.RegisterClient, request).session
        return self

    def poll(self, held: Sequence[bytes] = (), *, wait: float = 0.0) -> pb.PollTaskResponse:
        duration = Duration()
        duration.FromMilliseconds(int(wait * 1000))
        response: pb.PollTaskResponse = self.call(
            self.coordination.PollTask, pb.PollTaskRequest(held_tokens=held, wait=duration)
        )
        return response

    def task(self, held: Sequence[bytes] = ()) -> pb.Task:
        """The next task; waits for it."""
        for _ in range(30):
            response = self.poll(held, wait=10)
            if response.HasField("task"):
                return response.task
        raise AssertionError(f"no task came for {self.name}")

    def extend(self, token: bytes) -> pb.ExtendLeaseResponse:
        response: pb.ExtendLeaseResponse = self.call(self.coordination.ExtendLease, pb.ExtendLeaseRequest(token=token))
        return response

    def complete(self, token: bytes, update: bytes | None, *, examples: int = 1, **fields: Any) -> Any:
        """The verdict on an update whose manifest has these bytes."""
        request = pb.CompleteTaskRequest(token=token, num_examples=examples, **fields)
        if update is not None:
            request.update.CopyFrom(ref_to_pb(ref_of(update)))
        return self.complete_as(request)

    def complete_as(self, request: pb.CompleteTaskRequest) -> Any:
        while True:
            verdict = self.call(self.coordination.CompleteTask, request)
            if verdict.outcome != pb.CompleteTaskResponse.OUTCOME_CHECKING:
                return verdict

    # --- Bytes

    def read(self, token: bytes, digest: bytes) -> bytes:
        request = blob_pb.ReadBlobRequest(task_token=token, digest=digest)
        return b"".join(m.payload for m in self.call(self.blobs.ReadBlob, request))

    def model(self, task: pb.Task) -> tuple[types_pb.Manifest, dict[str, np.ndarray]]:
        manifest = types_pb.Manifest.FromString(self.read(task.token, task.model.digest))
        arrays: dict[str, np.ndarray] = {}
        for file in manifest.files:
            arrays |= load(self.read(task.token, file.blob.digest))
        return manifest, arrays

    def missing(self, token: bytes, *digests: bytes) -> list[bytes]:
        request = blob_pb.FindMissingBlobsRequest(task_token=token, digests=digests)
        return list(self.call(self.blobs.FindMissingBlobs, request).missing)

    def start(self, token: bytes, data: bytes, **changes: Any) -> blob_pb.StartUploadResponse:
        fields = {"blob": ref_to_pb(ref_of(data)), "chunk_digests": chunk_digests_of(data), **changes}
        response: blob_pb.StartUploadResponse = self.call(
            self.blobs.StartUpload, blob_pb.StartUploadRequest(task_token=token, **fields)
        )
        return response

    def write(self, upload_id: bytes, data: bytes, *, start: int = 0) -> blob_pb.WriteBlobResponse:
        def messages() -> Iterator[blob_pb.WriteBlobRequest]:
            yield blob_pb.WriteBlobRequest(upload_id=upload_id)
            for at in range(start, len(data), CHUNK_SIZE):
                yield blob_pb.WriteBlobRequest(offset=at, payload=data[at : at + CHUNK_SIZE])

        response: blob_pb.WriteBlobResponse = self.call(self.blobs.WriteBlob, messages())
        return response

    def upload(self, token: bytes, data: bytes) -> None:
        started = self.start(token, data)
        if not started.complete:
            assert self.write(started.upload_id, data, start=started.committed_size).complete

    def send(self, token: bytes, arrays: Arrays, *, buffers: Sequence[str] = (), **manifest: Any) -> bytes:
        """Upload an update as one file; returns its manifest, whose fields a test may set otherwise."""
        data = save(dict(arrays))
        text = manifest_of(data, types_pb.Manifest.KIND_DELTA, buffers=buffers)
        for field, value in manifest.items():
            setattr(text, field, value)
        serialized = text.SerializeToString()
        for part in (data, serialized):
            self.upload(token, part)
        return serialized
