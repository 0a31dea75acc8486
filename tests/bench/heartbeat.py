"""The row of heartbeats while everybody uploads."""

from __future__ import annotations

import contextlib

import numpy as np

from tests.bench import weights
from tests.bench.helpers import create_run, federation_below, helper, stop_run
from tests.bench.table import Found, Ground
from tests.bench.workload import initial

SITES = 8
TASKS = 6
"""Of each site, one after the other: so many updates of resnet18 give some hundred heartbeats."""
MODEL = "resnet18"


def heartbeat(ground: Ground) -> Found:
    """Milliseconds of ExtendLease at sites that upload as fast as they can, each in a process of its own.

    The times are the sites' own: they include what a busy site takes to see the answer.
    """
    found = Found()
    for _ in range(ground.repeat):
        with federation_below(ground.directory, initial(MODEL)) as federation, contextlib.ExitStack() as stack:
            nbytes = weights.size(MODEL)
            options = [str(TASKS), str(nbytes), str(federation.root)]
            sites = [
                stack.enter_context(helper("uploads", federation.address, f"site-{n}", *options)) for n in range(SITES)
            ]
            runs = [f"run-{n}" for n in range(TASKS)]
            for run in runs:
                create_run(federation, run, SITES)
            for site in sites:
                site.answer()
            for site in sites:
                site.tell("go")
            answers = [site.answer() for site in sites]
            for run in runs:
                stop_run(federation, run)
        latencies = [1000 * seconds for answer in answers for seconds in answer["latencies"]]
        rate = SITES * TASKS * nbytes / max(answer["seconds"] for answer in answers) / 1e9
        p50, p99, last = (float(q) for q in np.quantile(latencies, [0.5, 0.99, 1.0]))
        ground.say(
            f"{len(latencies)} heartbeats at {rate:.2f} GB/s: p50 {p50:.0f}, p99 {p99:.0f}, longest {last:.0f} ms"
        )
        found.add(p99=p99)
        found.note(beats=len(latencies), p50=p50, longest=last, gigabytes_per_second=rate)
    return found
