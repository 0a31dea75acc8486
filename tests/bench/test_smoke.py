"""A round costs no more than it did, by ratios that a busy machine hardly moves: `make bench-smoke`.

CPU seconds are compared and not the clock's: both sides of a ratio are what processes used, whoever else was running.
What takes twice as much as it should fails. `make bench` measures the rest, on an idle machine.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from tests.bench import weights
from tests.bench.bench_round import bench
from tests.bench.floor import raw_tcp
from tests.bench.place import IN_MEMORY, REPOSITORY, file_system

pytestmark = [pytest.mark.xdist_group("heavy"), pytest.mark.timeout(300)]

LIMITS = {
    # CPU seconds of a round of resnet18 x 2 / of raw TCP that moves and adds the same bytes: 7.7.
    "round": 14.0,
    # CPU seconds of a round of a 1 MB model and 2 clients / of the same raw TCP: 1.8.
    "overhead": 3.3,
    # Most resident MB of the server with resnet18 x 2: 162. The tests' server holds some 20 MB of the client's.
    "server_mb": 290.0,
}
"""The most that passes: below twice of what was measured. Under loads of 4 to 8 that was up to a third more."""

CLIENTS, ROUNDS, TINY_ROUNDS, FLOOR_ROUNDS = 2, 4, 8, 8


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Rounds of two models, with raw TCP before and after."""
    above = Path(tempfile.gettempdir())
    above = REPOSITORY if file_system(above) in IN_MEMORY else above
    with tempfile.TemporaryDirectory(prefix="smoke-", dir=above) as directory:
        place, size = Path(directory), weights.size("resnet18")
        before = raw_tcp(size, CLIENTS, 1 + FLOOR_ROUNDS, place)
        resnet18 = bench("resnet18", CLIENTS, ROUNDS, place)
        tiny = bench("tiny", CLIENTS, TINY_ROUNDS, place)
        after, start = (raw_tcp(size, CLIENTS, rounds, place) for rounds in (1 + FLOOR_ROUNDS, 1))
    floor = ((before.cpu + after.cpu) / 2 - start.cpu) / FLOOR_ROUNDS
    return {
        "round": mean(resnet18["cpu_s_by_round"]) / floor,
        "overhead": mean(tiny["cpu_s_by_round"]) / floor,
        "server_mb": resnet18["server_peak_rss_bytes"] / 1e6,
        "resnet18": resnet18,
    }


@pytest.mark.parametrize("what", LIMITS)
def test_it_costs_no_more(measured: dict[str, Any], what: str) -> None:
    print(f"{what}: {measured[what]:.2f}, at most {LIMITS[what]}; load average {os.getloadavg()[0]:.1f}")
    assert measured[what] < LIMITS[what]


def test_no_byte_moves_twice(measured: dict[str, Any]) -> None:
    result = measured["resnet18"]
    for way in ("bytes_down", "bytes_up"):
        assert result[way] < 1.01 * CLIENTS * result["model_bytes"]
