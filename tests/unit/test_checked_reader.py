"""A hash that runs along with reads in any order: what is right passes, what is not is found, no byte is read often."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from fedlink.blobs import CHUNK_SIZE, ChunkChecker, chunk_digests_of
from fedlink.errors import FedlinkError, Reason
from fedlink.tensors import Kind, windows
from fedserver.aggregation.checked import CheckedReader
from fedserver.aggregation.files import ShardReader
from fedserver.aggregation.pipeline import ModelFiles
from tests.support.shards import T, put

SIZES = (300_001, 1, 700_000, 250_000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    rng = np.random.default_rng(0)
    tensors = [T.of(f"t{i}", "F32", rng.normal(size=n)) for i, n in enumerate(SIZES)]
    return put(tmp_path_factory.mktemp("model"), Kind.MODEL, [tensors])


def pieces(model: ModelFiles, rng: random.Random, order: str) -> list[tuple[str, int, int]]:
    """Reads of tensors in windows: each byte once, or a few of them anywhere."""
    found = [(t.spec.name, *w) for t in model.manifest.in_file(0) for w in windows(t.spec.nbytes, 400_000)]
    if order == "backwards":
        return found[::-1]
    if order == "shuffled":
        rng.shuffle(found)
    return rng.sample(found, 3) if order == "some" else found


def read(model: ModelFiles, reads: list[tuple[str, int, int]]) -> None:
    with CheckedReader() as reader:
        for name, start, length in reads:
            reader.read(model, model.manifest.by_name[name], start, memoryview(bytearray(length)))


@pytest.mark.parametrize("order", ["forwards", "backwards", "shuffled", "some"])
def test_damage_is_found_where_it_was_read(model: ModelFiles, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(order)
    fetched = [0]
    real = ShardReader.read_bytes

    def counted(self: ShardReader, path: Path, start: int, out: memoryview) -> None:
        fetched[0] += len(out)
        real(self, path, start, out)

    monkeypatch.setattr(ShardReader, "read_bytes", counted)
    path, size = model.files[0], model.files[0].stat().st_size
    data = path.read_bytes()
    for _ in range(12):
        reads = pieces(model, rng, order)
        fetched[0] = 0
        read(model, reads)
        asked = sum(length for *_, length in reads)
        head = size - 4 * sum(SIZES)
        # In order, nothing but the header is read for the hash alone; in any order, no chunk again and again.
        assert fetched[0] == asked + head if order == "forwards" else fetched[0] < asked + 2 * size
        at = rng.randrange(size)
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        spans = [(model.manifest.by_name[name].stored.offset + start, length) for name, start, length in reads]
        seen = {c for a, n in spans for c in range(a // CHUNK_SIZE, (a + n - 1) // CHUNK_SIZE + 1)}
        try:
            if at // CHUNK_SIZE in seen:
                with pytest.raises(FedlinkError, match=f"byte {at // CHUNK_SIZE * CHUNK_SIZE} ") as e:
                    read(model, reads)
                assert e.value.reason is Reason.BLOB_CORRUPT
            else:
                read(model, reads)
        finally:
            path.write_bytes(data)


@pytest.mark.parametrize("size", [0, 1, CHUNK_SIZE, 2 * CHUNK_SIZE + 5])
def test_a_checker_agrees_with_the_list(size: int) -> None:
    rng = random.Random(size)
    data = rng.randbytes(size)
    checker = ChunkChecker(chunk_digests_of(data), size)
    while checker.position < size:
        step = rng.choice((1, 1000, CHUNK_SIZE - 1, CHUNK_SIZE, 2 * CHUNK_SIZE))
        assert checker.update(data[checker.position : checker.position + step]) is None
        assert checker.complete == (
            checker.position // CHUNK_SIZE if checker.position < size else -(-size // CHUNK_SIZE)
        )
        assert (checker.position + checker.missing) % CHUNK_SIZE == 0 or checker.position + checker.missing == size
