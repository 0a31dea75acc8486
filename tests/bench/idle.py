"""The row of a fleet that waits: what it costs the server, and how soon all of it hears of a task."""

from __future__ import annotations

import contextlib
import resource
import time

import numpy as np

from tests.bench.helpers import Helper, create_run, federation_below, helper, stop_run
from tests.bench.processes import cpu_seconds, resident
from tests.bench.table import Found, Ground, SkippedRow
from tests.support.federation import Federation

PROCESSES = 4
WINDOW = 50.0
"""Seconds of idleness that are looked at: two polls of every site."""
_SETTLE = 5.0
_SPARE_FILES = 500


def idle(ground: Ground) -> Found:
    """Idle sites in long polls: added memory, CPU share of one core, seconds until the last has a new task."""
    clients = ground.idle_clients
    _allow_files(clients + _SPARE_FILES)
    found = Found()
    with federation_below(ground.directory, {"w": np.zeros(4, np.float32)}) as federation:
        assert federation.server is not None
        server = federation.server.pid
        # What the server loads when it is used for the first time is not the fleet's.
        with helper("fleet", federation.address, str(clients), "4") as few:
            few.answer()
            _tell(federation, "first", [few], 4)
        time.sleep(_SETTLE)
        alone = resident(server)
        with contextlib.ExitStack() as stack:
            fleets = [_fleet(stack, federation.address, clients, part) for part in range(PROCESSES)]
            for fleet in fleets:
                fleet.answer()
            ground.say(f"{clients} sites are polling")
            time.sleep(_SETTLE)
            found.add(memory=(resident(server) - alone) / 1e6)
            for number in range(ground.repeat):
                used = cpu_seconds(server)
                time.sleep(WINDOW)
                found.add(cpu=100 * (cpu_seconds(server) - used) / WINDOW)
                found.add(told=_tell(federation, f"run-{number}", fleets, clients))
                ground.say(
                    f"idle: {found.values['cpu'][-1]:.1f} % of a core; all told: {found.values['told'][-1]:.2f} s"
                )
    found.details["clients"] = clients
    return found


def _fleet(stack: contextlib.ExitStack, address: str, clients: int, part: int) -> Helper:
    first, end = clients * part // PROCESSES, clients * (part + 1) // PROCESSES
    return stack.enter_context(helper("fleet", address, str(first), str(end - first)))


def _tell(federation: Federation, run: str, fleets: list[Helper], clients: int) -> float:
    """Seconds from the creation of a run to the last site's answer; the run is stopped then."""
    began = time.time()
    create_run(federation, run, clients)
    for fleet in fleets:
        fleet.tell(run)
    last = max(fleet.answer()["last"] for fleet in fleets)
    stop_run(federation, run)
    return float(last - began)


def _allow_files(needed: int) -> None:
    """Let this process and those that it starts open so many files.

    Raises:
        SkippedRow: this machine does not allow it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SkippedRow(f"{needed} open files are needed, and this machine allows a process {hard}")
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
