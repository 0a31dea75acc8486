"""What every case starts from: a data directory with a model of three shards, twenty chunks each, already imported."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from fedlink.blobs import chunk_count, chunk_digests_of, ref_of
from fedlink.bulk import hash_file
from fedlink.manifest import FileEntry, manifest_of_files, ref_to_pb
from fedlink.tensors import Kind, Role, read_header
from fedlink.transfer import ImportPurpose
from fedlink.v1 import admin_service_pb2 as pb
from fedserver.remote import Admin
from tests.support.classes.tide import ROW, STEPS, tide
from tests.support.federation import Federation

SHARDS, TENSORS, ROWS = 3, 3, 406
"""Shards, tensors a shard, rows a tensor: 3 x 406 x 4096 x 4 bytes are nineteen chunks and the begin of a twentieth."""
SITES: Mapping[str, tuple[int, int]] = {"a": (1, 32), "b": (2, 16), "c": (3, 16)}
"""Number and examples of each site; they add up to a power of two, so that their mean is exact in float32."""
ROUNDS, CHUNKS = 3, 20
"""Rounds of a run, chunks of a shard."""
MODEL = "start"

Arrays = dict[str, np.ndarray]


def first_weights() -> list[Arrays]:
    """The starting weights, a dict for each shard; small multiples of 1/256, no two rows alike."""
    rng = np.random.default_rng(5)
    names = [f"t{i:02}" for i in range(SHARDS * TENSORS)]
    shards = [names[i : i + TENSORS] for i in range(0, len(names), TENSORS)]
    arrays = [{n: (rng.integers(-64, 65, (ROWS, ROW)) / 256).astype(np.float32) for n in shard} for shard in shards]
    arrays[-1]["steps"] = np.zeros(1, np.int64)
    return arrays


def undisturbed(rounds: int) -> list[Arrays]:
    """The weights of every version if each site takes part in each round, in float64, by none of our code."""
    current: Arrays = {}
    for shard in first_weights():
        current |= shard
    versions = [current]
    total = sum(examples for _, examples in SITES.values())
    donor = max(SITES, key=lambda s: SITES[s][1])
    for round_ in range(1, rounds + 1):
        following = {}
        for i, name in enumerate(sorted(n for n in current if n != "steps")):
            row_sum, column_sum = np.zeros((1, ROW)), np.zeros((ROWS, 1))
            for number, examples in SITES.values():
                for step in range(STEPS):
                    row, column = tide(number, round_, step, i, ROWS)
                    row_sum += examples * row.astype(np.float64)
                    column_sum += examples * column.astype(np.float64)
            following[name] = (current[name] + (row_sum / total + column_sum / total)).astype(np.float32)
        following["steps"] = current["steps"] + STEPS * SITES[donor][0]
        current = following
        versions.append(current)
    return versions


def prepare(root: Path) -> Path:
    """Make the data directory; where it is made already, it is only found."""
    made = root / "prepared"
    if made.exists():
        return made
    scratch = root / f"preparing-{os.getpid()}"
    with Federation(scratch) as federation:
        federation.start_server()
        asyncio.run(_import(federation.data_dir, scratch))
        assert federation.server is not None
        assert federation.server.stop() == 0
    for shard in (scratch / "shards").iterdir():
        assert chunk_count(shard.stat().st_size) == CHUNKS
    try:
        (scratch / "server").rename(made)
    except OSError:
        assert made.exists()  # another test process was quicker
    shutil.rmtree(scratch)
    return made


async def _import(data_dir: Path, scratch: Path) -> None:
    """As `fedserver model import` does, but in shards of this test's choice."""
    directory = scratch / "shards"
    directory.mkdir()
    for i, arrays in enumerate(first_weights()):
        save_file(arrays, directory / f"model-{i}.safetensors")
    paths = sorted(directory.iterdir())
    named = [(path, *hash_file(path)) for path in paths]
    entries = [(FileEntry(path.name, ref), read_header(path)) for path, ref, _ in named]
    roles = {n: Role.BUFFER if n == "steps" else Role.PARAMETER for path in paths for n in load_file(path)}
    data = manifest_of_files(Kind.MODEL, entries, roles).serialize()
    path = scratch / "manifest"
    path.write_bytes(data)
    purpose = ImportPurpose(ref_of(data).digest[:16])
    async with Admin(data_dir) as admin:
        await admin._send([*named, (path, ref_of(data), chunk_digests_of(data))], purpose, lambda *_: None)
        request = pb.ImportModelRequest(import_id=purpose.id, name=MODEL, manifest=ref_to_pb(ref_of(data)))
        await admin.call(admin.stub.ImportModel, request)
