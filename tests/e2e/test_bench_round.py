"""The benchmark measures what it says, on a small model."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedlink.v1 import admin_service_pb2 as pb
from fedlink.v1 import admin_service_pb2_grpc as admin_grpc
from fedserver.settings import admin_socket
from tests.bench.bench_round import Bench, bench
from tests.bench.place import IN_MEMORY, REPOSITORY, BenchError, file_system
from tests.bench.processes import Sampler
from tests.bench.weights import size
from tests.support.federation import Federation

pytestmark = pytest.mark.slow

MODEL, CLIENTS, ROUNDS = "resnet18", 2, 2
ALLOWED = 2e-6
"""Deviation from the exact average that rounding to float32 explains."""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory on a disk; pytest's own has a path too long for a socket."""
    above = Path(tempfile.gettempdir())
    with tempfile.TemporaryDirectory(
        prefix="bench-", dir=REPOSITORY if file_system(above) in IN_MEMORY else above
    ) as d:
        yield Path(d)


@pytest.mark.xdist_group("heavy")
def test_every_number_of_a_round(place: Path) -> None:
    lines: list[str] = []
    result = bench(MODEL, CLIENTS, ROUNDS, place, say=lines.append)
    nbytes = size(MODEL)

    assert (result["model"], result["clients"], result["rounds"]) == (MODEL, CLIENTS, ROUNDS)
    phases = ("down_s", "train_s", "up_s", "aggregate_s")
    assert all(0 < result[p] < result["round_s"] for p in phases), result
    assert result["round_s"] == result["round_s_by_round"][0]
    # Processors give no more time than there is; a tick of each process may fall on the wrong side.
    assert 0.1 < result["cpu_s"] < result["round_s"] * (os.cpu_count() or 1) + 0.1
    assert all(seconds > 0 for seconds in result["cpu_s_by_part"].values()), result["cpu_s_by_part"]

    # Weights go once to each site and updates come once from it; what is over is manifests and headers.
    for key in ("bytes_down", "bytes_up"):
        assert CLIENTS * nbytes < result[key] < CLIENTS * nbytes * 1.01

    # Kept are the imported model and the two newest versions, and files of updates that are there to be written over.
    assert 3 * nbytes < result["disk_bytes"] < (3.1 + CLIENTS) * nbytes
    assert result["disk_by_round"][-1] == result["disk_bytes"]
    # The database writes a little after the last round.
    assert max(result["disk_peak_by_round"]) > 0.99 * result["disk_bytes"]

    # Python and the libraries alone are some 100 MB.
    assert 50e6 < result["server_peak_rss_bytes"] < 300e6
    assert 40e6 < result["client_peak_rss_bytes"] < 200e6
    assert nbytes < result["trainer_peak_rss_bytes"] < 4 * nbytes

    assert list(result["deviation_by_round"]) == ["1", "2"]
    assert 0 <= result["max_deviation"] <= ALLOWED
    assert result["load_average"] >= 0

    assert sum(line.startswith("round") for line in lines) >= ROUNDS
    assert list(place.iterdir()) == [], "it cleans up"


def test_a_process_that_dies_is_shown(place: Path) -> None:
    def kill(_: str) -> None:
        """SIGKILL the server at the first line that the benchmark says."""
        for lock in place.glob("round-*/server/lock"):
            os.kill(int(lock.read_text()), signal.SIGKILL)

    with pytest.raises(BenchError, match="the server ended with exit code -9") as error:
        bench(MODEL, 1, 2, place, say=kill)
    assert '"serving"' in str(error.value), "the end of its log is shown"
    assert list(place.iterdir()) == []


class Silent(admin_grpc.AdminServiceServicer):
    """A server whose stream of events ends at once, and which keeps no version."""

    def WatchRun(self, request: Any, context: Any) -> Iterator[pb.WatchRunResponse]:  # noqa: N802
        return iter(())

    def GetModel(self, request: Any, context: Any) -> pb.GetModelResponse:  # noqa: N802
        context.abort(grpc.StatusCode.NOT_FOUND, "'bench@1' is not kept")
        raise AssertionError


def test_events_and_versions_that_are_gone_end_it(place: Path) -> None:
    federation = Federation(place)
    federation.data_dir.mkdir()
    server = grpc.server(ThreadPoolExecutor(2))
    admin_grpc.add_AdminServiceServicer_to_server(Silent(), server)
    server.add_insecure_port(f"unix:{admin_socket(federation.data_dir)}")
    server.start()
    measured = Bench(MODEL, CLIENTS, ROUNDS, place, say=print)
    try:
        with pytest.raises(BenchError, match="the run did not end"):
            measured._follow(federation, Sampler(federation.data_dir))
        with pytest.raises(BenchError, match="version 1 cannot be compared: 'bench@1' is not kept"):
            measured._hold(federation, 1)
    finally:
        server.stop(None).wait()


def test_places_that_would_mislead_are_refused(place: Path) -> None:
    with pytest.raises(BenchError, match="ROUNDS must be at least 2"):
        bench(MODEL, 1, 1, place)
    with pytest.raises(BenchError, match="too long a path"):
        bench(MODEL, 1, 2, place / ("x" * 80))
    if file_system(Path("/dev/shm")) == "tmpfs":
        with pytest.raises(BenchError, match=r"/dev/shm is in memory \(tmpfs\).*DIR="):
            bench(MODEL, 1, 2, Path("/dev/shm"))
