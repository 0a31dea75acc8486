"""Checking and folding cost the same memory whatever the size of the model and the number of clients."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

from fedlink.bulk import hash_file
from fedlink.manifest import FileEntry, manifest_of_files
from fedlink.tensors import Kind, read_header
from fedserver.aggregation.check import check_update
from fedserver.aggregation.fold import aggregate
from fedserver.aggregation.optimizers.sgd import Sgd
from fedserver.aggregation.pipeline import Contribution, ModelFiles, Pipeline
from fedserver.aggregation.prefix import PrefixSums
from fedserver.aggregation.reducers.mean import WeightedMean
from tests.support.shards import listed

SHARDS = 3
TENSORS = 4
ELEMENTS = 12_500_000


def sparse(
    directory: Path, kind: Kind, dtype: str, size: int, shards: int = SHARDS, tensors: int = TENSORS
) -> ModelFiles:
    """Shards of tensors of 12.5 million zeros each, which take no disk."""
    directory.mkdir()
    files, paths, lists = [], [], []
    step = ELEMENTS * size
    for i in range(shards):
        table = {
            f"{i}.{k}": {"dtype": dtype, "shape": [ELEMENTS], "data_offsets": [k * step, (k + 1) * step]}
            for k in range(tensors)
        }
        head = json.dumps(table).encode()
        path = directory / f"part-{i}"
        path.write_bytes(struct.pack("<Q", len(head)) + head)
        os.truncate(path, 8 + len(head) + tensors * step)
        ref, chunk_digests = hash_file(path)
        files.append((FileEntry(path.name, ref), read_header(path)))
        paths.append(path)
        lists.append(listed(path, chunk_digests))
    return ModelFiles(manifest_of_files(kind, files, {}), paths, lists)


@contextlib.contextmanager
def measured() -> Iterator[None]:
    """Print by how many bytes resident memory grew at most."""
    process, before, peak, done = psutil.Process(), psutil.Process().memory_info().rss, [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    done.set()
    watcher.join()
    print(peak[0] - before)


def fold_and_measure(tmp: Path) -> None:
    """Runs in a process of its own."""
    model = sparse(tmp / "model", Kind.MODEL, "BF16", 2)
    update = sparse(tmp / "update", Kind.DELTA, "BF16", 2)
    (tmp / "out").mkdir()
    with measured():
        check_update(
            model.manifest, update.manifest, update.files, kind=Kind.DELTA, update_dtype="BF16", max_bytes=1 << 40
        )
        sent = [Contribution(f"c{k}", 1, update.manifest, update.files, update.lists) for k in range(3)]
        aggregate(model, None, sent, Pipeline(Kind.DELTA, WeightedMean(), Sgd()), tmp / "out")


def add_up_and_measure(tmp: Path) -> None:
    """Runs in a process of its own."""
    model = sparse(tmp / "model", Kind.MODEL, "F32", 4, 1, 1)
    update = sparse(tmp / "update", Kind.DELTA, "BF16", 2, 1, 1)
    (tmp / "out").mkdir()
    sums = PrefixSums(tmp / "out" / "sums")
    with measured():
        sent = [Contribution(f"c{k}", 1, update.manifest, update.files, update.lists) for k in range(3)]
        sums.add(model.manifest, sent[:1], WeightedMean())
        sums.add(model.manifest, sent[1:2], WeightedMean())
        aggregate(model, None, sent, Pipeline(Kind.DELTA, WeightedMean(), Sgd()), tmp / "out", sums=sums)


def grown(tmp_path: Path, function: str) -> int:
    """What a function of this module printed, in a process of its own."""
    script = f"import pathlib, {__name__} as t; t.{function}(pathlib.Path({str(tmp_path)!r}))"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=root)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def test_a_round_of_300_mb_is_folded_in_40_mb(tmp_path):
    try:
        assert grown(tmp_path, "fold_and_measure") < 40_000_000
        # The model in BF16 and its master in float32.
        assert sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) > 900_000_000
    finally:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_100_mb_of_sums_are_made_and_read_in_40_mb(tmp_path):
    try:
        assert grown(tmp_path, "add_up_and_measure") < 40_000_000
        assert (tmp_path / "out" / "sums" / "0-2").stat().st_size > 100_000_000
    finally:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
