"""The row of a long line: a site's download and upload over it against raw TCP over it."""

from __future__ import annotations

import statistics

from tests.bench import weights
from tests.bench.bench_round import bench
from tests.bench.helpers import helper
from tests.bench.longline import ADDRESSES, Apart, LongLine, Quality
from tests.bench.table import Found, Ground

LINE = Quality(milliseconds=25, loss=0.001, bits=10**9)
"""50 ms there and back."""
MODEL = "gpt2"
ROUNDS = 3


def netem(ground: Ground) -> Found:
    """gpt2 x 1: raw TCP's seconds as a percentage of those that the daemon's log gives for download and upload."""
    found = Found()
    with LongLine(LINE) as line:
        found.details["by"] = line.by
        for _ in range(ground.repeat):
            before = _raw(ground, line)
            round_ = bench(MODEL, 1, ROUNDS, ground.directory, setting=Apart(line), say=ground.say)
            after = _raw(ground, line)
            for way in ("down", "up"):
                raw = statistics.median([*before[way], *after[way]])
                found.add(**{way: [100 * raw / s for s in round_[f"{way}_s_by_round"]]})
            found.note(raw_before=before, raw_after=after, round=round_)
    return found


def _raw(ground: Ground, line: LongLine) -> dict[str, list[float]]:
    """Seconds of each round but the first, which warms up, as Fedlink's does."""
    nbytes = weights.size(MODEL)
    options = (str(nbytes), str(ROUNDS))
    with helper("raw", "serve", ADDRESSES[0], *options, prefix=line.inside(0)) as server:
        address = f"{ADDRESSES[0]}:{server.answer()['port']}"
        with helper("raw", "fetch", address, *options, prefix=line.inside(1)) as client:
            took = {way: seconds[1:] for way, seconds in client.answer().items()}
    rates = {way: nbytes * 8 / statistics.median(seconds) / 1e9 for way, seconds in took.items()}
    ground.say(f"raw TCP: {rates['down']:.2f} Gbit/s down, {rates['up']:.2f} up (by {line.by})")
    return took
