"""What `fedclient doctor` looks at: one concept a file, and their order here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from fedclient.checks.bandwidth import check_bandwidth
from fedclient.checks.configuration import check_configuration
from fedclient.checks.disk import check_disk
from fedclient.checks.examination import Examination
from fedclient.checks.finding import Finding, Outcome, failed, skipped
from fedclient.checks.network import check_address, check_tls
from fedclient.checks.rehearsal import check_data, check_training_step
from fedclient.checks.server import check_clock, check_credentials, check_server
from fedclient.checks.workloads import check_device, check_workloads
from fedlink.errors import FedlinkError

__all__ = ["CHECKS", "Check", "Examination", "Finding", "Outcome", "examine"]


@dataclass(frozen=True)
class Check:
    """One thing to look at."""

    name: str
    look: Callable[[Examination], Awaitable[Finding]]
    needs: tuple[str, ...] = ()
    """Checks without which this one makes no sense."""
    limit: float = 30.0
    """Seconds after which it counts as failed."""


CHECKS = (
    Check("config", check_configuration),
    Check("address", check_address),
    Check("tls", check_tls, ("address",)),
    Check("server", check_server, ("tls",)),
    Check("clock", check_clock, ("server",), limit=60),
    Check("credentials", check_credentials, ("server",)),
    Check("workloads", check_workloads, limit=600),
    Check("data", check_data, ("workloads",), limit=900),
    Check("device", check_device, ("workloads",)),
    Check("disk", check_disk),
    Check("bandwidth", check_bandwidth, ("credentials",), limit=90),
    Check("training-step", check_training_step, ("workloads",), limit=900),
)
"""In this order; what a check needs comes before it."""


async def examine(
    visit: Examination, checks: Sequence[Check] = CHECKS, *, begin: Callable[[str], None] = lambda _: None
) -> AsyncIterator[tuple[str, Finding]]:
    """Do the checks one after the other; each is over within its limit, whatever it meets.

    Args:
        visit: the examination.
        checks: what to look at.
        begin: told the name of each check when it begins.
    """
    outcomes: dict[str, Outcome] = {}
    for check in checks:
        missing = [n for n in check.needs if outcomes.get(n) in (Outcome.FAILED, Outcome.SKIPPED)]
        if missing:
            finding = skipped(f"needs {missing[0]}, which {_became(outcomes[missing[0]])}")
        else:
            begin(check.name)
            finding = await _within_limit(check, visit)
        outcomes[check.name] = finding.outcome
        yield check.name, finding


async def _within_limit(check: Check, visit: Examination) -> Finding:
    try:
        async with asyncio.timeout(check.limit) as limit:
            return await check.look(visit)
    except asyncio.CancelledError:
        # grpc.aio raises it, too, when the other side cancels.
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        return failed("the server, or something on the way, cancelled the call", "Try again later.")
    except FedlinkError as e:
        return failed(e.message, "Correct that, and run the doctor again.")
    except Exception as e:  # noqa: BLE001 - the other checks are to run all the same
        if isinstance(e, TimeoutError) and limit.expired():
            advice = "Something it waits for hangs: a network disk, a name service, or the class's own code."
            return failed(f"did not end within {check.limit:g} s", advice)
        return failed(f"internal error: {type(e).__name__}: {e}", "Please report it.")


def _became(outcome: Outcome) -> str:
    return "failed" if outcome is Outcome.FAILED else "was skipped"
