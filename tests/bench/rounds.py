"""Rows that are whole rounds: against raw TCP, against TLS, by clients, and of a model that is hardly there."""

from __future__ import annotations

import os
import statistics
from typing import Any

from tests.bench import weights
from tests.bench.bench_round import bench
from tests.bench.floor import Floor, raw_tcp
from tests.bench.setting import Mutual
from tests.bench.table import Found, Ground

ROUNDS = 4
"""Of large models; the first one warms up."""
GROWTH = (2, 4, 8, 16)
TURNAROUNDS = 41
GB = 1e9


def against_raw_tcp(ground: Ground) -> Found:
    """gpt2 x 4: the baseline, rounds, the baseline again; everything as a ratio to the median of both baselines."""
    found = Found()
    for _ in range(ground.repeat):
        before = _floor(ground, "gpt2", 4)
        round_ = bench("gpt2", 4, ROUNDS, ground.directory, say=ground.say)
        after = _floor(ground, "gpt2", 4)
        floor = statistics.median([*before.rounds, *after.rounds])
        seconds, trained = round_["round_s_by_round"], round_["train_s_by_round"]
        moved = (round_["bytes_down"] + round_["bytes_up"]) / GB
        found.add(
            whole=[s / floor for s in seconds],
            untrained=[(s - t) / floor for s, t in zip(seconds, trained, strict=True)],
            cpu_per_gb=[s / moved for s in round_["cpu_s_by_round"]],
        )
        found.note(baseline_before=before.rounds, baseline_after=after.rounds, round=round_)
    return found


def resnet18x8(ground: Ground) -> Found:
    """resnet18 x 8: seconds from commit to commit."""
    found = Found()
    for _ in range(ground.repeat):
        before = _floor(ground, "resnet18", 8)
        round_ = bench("resnet18", 8, 2 * ROUNDS, ground.directory, say=ground.say)
        after = _floor(ground, "resnet18", 8)
        found.add(seconds=round_["round_s_by_round"])
        found.note(baseline_before=before.rounds, baseline_after=after.rounds, round=round_)
    return found


def turnaround(ground: Ground) -> Found:
    """tiny x 4: milliseconds from commit to commit, over many rounds."""
    found = Found()
    for _ in range(ground.repeat):
        round_ = bench("tiny", 4, TURNAROUNDS, ground.directory, say=ground.say)
        found.add(milliseconds=[1000 * s for s in round_["round_s_by_round"]])
        found.note(round=round_)
    return found


def growth(ground: Ground) -> Found:
    """resnet18: the round's seconds for each client, as multiples of those with two clients; the largest counts."""
    found = Found()
    for _ in range(ground.repeat):
        per_client: dict[int, float] = {}
        for clients in GROWTH:
            ground.say(f"{clients} clients")
            result = bench("resnet18", clients, 2 * ROUNDS, ground.directory, say=ground.say)
            per_client[clients] = result["round_s"] / clients
        least = per_client[GROWTH[0]]
        found.add(per_client=max(per_client[n] / least for n in GROWTH[1:]))
        found.note(seconds_per_client={str(n): round(s, 4) for n, s in per_client.items()})
    return found


def tls(ground: Ground) -> Found:
    """gpt2 x 4: rounds with mutual TLS, as multiples of the median round without, measured just before."""
    found = Found()
    for _ in range(ground.repeat):
        results: list[dict[str, Any]] = []
        for setting in (None, Mutual()):
            ground.say("with mutual TLS" if setting else "without TLS")
            results.append(bench("gpt2", 4, ROUNDS, ground.directory, setting=setting, say=ground.say))
        plain, mutual = results
        found.add(ratio=[s / plain["round_s"] for s in mutual["round_s_by_round"]])
        found.note(without=plain, mutual=mutual)
    return found


def _floor(ground: Ground, model: str, clients: int) -> Floor:
    # What was written before is on the disk by then, and its writing in nobody's time.
    os.sync()
    floor = raw_tcp(weights.size(model), clients, 3, ground.directory)
    ground.say(f"raw TCP, {model} x {clients}: {statistics.median(floor.rounds):.2f} s a round")
    os.sync()
    return floor
