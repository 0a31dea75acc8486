"""What a run is predicted to move and take, against plain arithmetic on safetensors and manifests made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlink.base import BaseTensor
from fedlink.manifest import Manifest
from fedlink.run_file import RunSpec
from fedlink.tensors import Kind, Role
from fedlink.v1 import types_pb2
from fedserver.runtime.footprint import footprint
from fedserver.runtime.prediction import Prediction, predict, transfers
from tests.support.shards import T, put

BULK_STREAMS = 8
# Two files that change and one that does not; a parameter of 2 bytes, and a buffer that travels as it is.
SHARDS = [
    [T.of("w", "F32", range(1000)), T.of("steps", "I64", [3], Role.BUFFER)],
    [T.of("narrow", "BF16", range(300))],
    [T.of("base", "F32", range(5000), Role.FROZEN)],
]


def spec(**table: Any) -> RunSpec:
    return RunSpec.model_validate({"workload": "w", "rounds": 9, "model": "start", **table})


@pytest.fixture(name="model")
def _model(tmp_path: Path) -> Manifest:
    return put(tmp_path / "model", Kind.MODEL, SHARDS).manifest


def predicted(model: Manifest, run: RunSpec, sites: int = 3) -> Prediction:
    return predict(model, run, sites, footprint(model, run, sites), bulk_streams=BULK_STREAMS)


def file_size(tensors: list[tuple[str, str, int, int]]) -> tuple[int, int]:
    """Bytes of a safetensors file of (name, dtype, elements, bytes each), and where its data begins."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, elements, width in tensors:
        table[name] = {"dtype": dtype, "shape": [elements], "data_offsets": [at, at + elements * width]}
        at += elements * width
    head = 8 + len(json.dumps(table, separators=(",", ":")))
    head += -head % 64
    return head + at, head


def update_size(*, wire: str, width: int) -> int:
    """An update to SHARDS as the protocol describes it: two files and a manifest."""
    shards = [[("w", wire, 1000, width), ("steps", "I64", 1, 8)], [("narrow", wire, 300, width)]]
    message = types_pb2.Manifest(kind=types_pb2.Manifest.KIND_DELTA)
    total = 0
    for index, tensors in enumerate(shards):
        size, at = file_size(tensors)
        total += size
        message.files.add(
            name=f"update-0000{index + 1}-of-00002.safetensors", blob=types_pb2.BlobRef(digest=b"\1" * 32, size=size)
        )
        for name, dtype, elements, each in tensors:
            role = types_pb2.ROLE_BUFFER if name == "steps" else types_pb2.ROLE_PARAMETER
            number = types_pb2.Dtype.Value(f"DTYPE_{dtype}")
            message.tensors.add(name=name, dtype=number, shape=[elements], role=role, file=index, offset=at)
            at += elements * each
    return total + message.ByteSize()


def test_a_frozen_file_goes_down_once_and_never_up(model: Manifest) -> None:
    p = predicted(model, spec())
    manifest = len(model.serialize())
    changing, frozen = sum(f.blob.size for f in model.files[:2]), model.files[2].blob.size
    assert frozen > 20_000
    assert p.bytes_down_first == manifest + changing + frozen
    assert p.bytes_down_later == manifest + changing
    assert p.bytes_up == update_size(wire="F32", width=4)
    assert (p.down(1, 3), p.down(2, 3), p.up(2)) == (3 * p.bytes_down_first, 3 * p.bytes_down_later, 2 * p.bytes_up)


def test_updates_are_as_wide_as_the_run_says(model: Manifest) -> None:
    assert predicted(model, spec(update_dtype="bfloat16")).bytes_up == update_size(wire="BF16", width=2)


def test_a_file_that_is_there_twice_is_fetched_once(tmp_path: Path) -> None:
    one = put(tmp_path / "one", Kind.MODEL, [[T.of("a", "F32", range(100), Role.FROZEN)]]).manifest
    files = (one.files[0], type(one.files[0])("again.safetensors", one.files[0].blob))
    twice = Manifest(one.kind, files, one.tensors, {})
    assert predicted(twice, spec()).bytes_down_first == len(twice.serialize()) + one.files[0].blob.size


@pytest.mark.parametrize(
    ("table", "sites", "cohort", "fetching"),
    [
        ({}, 5, 5, 5),
        ({}, 1, 2, 2),  # min_clients
        ({"cohort": {"select": "count", "count": 3}}, 10, 3, 10),
        ({"cohort": {"select": "count", "count": 3}, "evaluation": {"enabled": False}}, 10, 3, 3),
        ({"cohort": {"select": "fraction", "fraction": 0.25}, "evaluation": {"enabled": False}}, 10, 3, 3),
    ],
)
def test_who_trains_and_who_fetches(
    model: Manifest, table: dict[str, Any], sites: int, cohort: int, fetching: int
) -> None:
    p = predicted(model, spec(**table), sites)
    assert (p.clients, p.cohort, p.fetching) == (sites, cohort, fetching)


def test_what_a_site_takes(model: Manifest) -> None:
    p = predicted(model, spec())
    data = 1000 * 4 + 8 + 300 * 2
    assert p.checkpoint == data + 1000 * 4 + 300 * 2
    assert p.site_disk == p.bytes_down_first + 2 * p.checkpoint
    assert p.trainer_memory == data + 5000 * 4 + 5000 * 4
    base = BaseTensor("base", "BF16", (1000, 50), bytes(32))
    assert predicted(replace(model, base=(base,)), spec()).trainer_memory == p.trainer_memory + 2 * 50_000
    gradient = predicted(model, spec(strategy="fedsgd", server_optimizer={"learning_rate": 1.0}))
    assert gradient.checkpoint == 0
    assert gradient.site_disk == gradient.bytes_down_first + gradient.bytes_up


def test_what_the_server_takes_on_disk_grows_with_rounds_kept(model: Manifest) -> None:
    run = spec(retention={"keep_versions": 3})
    p = predicted(model, run)
    # What trains, and a float32 master of the narrow one.
    version = 1000 * 4 + 8 + 300 * 2 + 300 * 4
    assert p.version == version
    assert p.server_disk == footprint(model, run, 3).total
    by_round = [p.disk(n, 2, run.retention) for n in (1, 2, 5, 9)]
    assert by_round == [2 * p.bytes_up + n * version for n in (1, 2, 5, 5)]
    assert p.disk(9, 3, run.retention) <= p.server_disk
    hoarder = spec(retention={"keep_updates": True})
    assert p.disk(7, 2, hoarder.retention) == 7 * 2 * p.bytes_up + 4 * version


def test_the_servers_memory_grows_with_streams_and_not_with_the_model(model: Manifest, tmp_path: Path) -> None:
    larger = put(tmp_path / "larger", Kind.MODEL, [[T.of("w", "F32", range(100_000))]]).manifest
    few, enough, many = (predicted(model, spec(), n).server_memory for n in (2, 8, 1008))
    assert predicted(larger, spec(), 8).server_memory == enough
    assert few < enough < many
    assert many - enough == 1000 * 50_000
    assert predicted(model, spec()).memory(8) == enough


def test_times_follow_from_the_narrowest_line(model: Manifest) -> None:
    p = predicted(model, spec(cohort={"select": "count", "count": 2}), sites=10)
    assert transfers(p, link=0, server_link=0) is None
    alone = transfers(p, link=1_000_000, server_link=0)
    assert alone is not None
    assert alone.down_first == pytest.approx(p.bytes_down_first * 8 / 930_000)
    assert alone.up == pytest.approx(p.bytes_up * 8 / 930_000)
    # Ten sites fetch at once over the server's 5 Mbit/s, and two send.
    shared = transfers(p, link=1_000_000, server_link=5_000_000)
    assert shared is not None
    assert shared.down_later == pytest.approx(p.bytes_down_later * 8 / 465_000)
    assert shared.up == alone.up
    only_server = transfers(p, link=0, server_link=5_000_000)
    assert only_server is not None
    assert (only_server.down_later, only_server.up) == (shared.down_later, pytest.approx(p.bytes_up * 8 / 2_325_000))


def test_a_prediction_is_kept_as_it_was(model: Manifest) -> None:
    p = predicted(model, spec())
    assert Prediction.parse(p.serialize()) == p
