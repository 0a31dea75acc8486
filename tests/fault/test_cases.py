"""The fixed set: whatever is killed, cut or held up, nothing is lost and every bit is as it would have been."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from fedlink import failpoints
from tests.fault.case import Case, Kill, run_case, unmet
from tests.fault.cases import drawn, fixed
from tests.fault.place import roomy_directory
from tests.fault.start import ROUNDS, Arrays, prepare, undisturbed


@pytest.fixture(scope="session")
def ground() -> Iterator[Path]:
    """A directory for all the cases of this process."""
    root = roomy_directory()
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def prepared(ground: Path) -> Path:
    return prepare(ground)


@pytest.fixture(scope="session")
def whole() -> list[Arrays]:
    return undisturbed(ROUNDS)


SEVERAL_AT_ONCE = {
    "nothing-happens",
    "server-thrice",
    "server-in-each-round",
    "all-sites",
    "everybody",
    "in-the-same-instant",
    "cut-and-killed",
}
"""Whose faults come one by one in other cases, too; left to `make test-slow`."""
NEIGHBOURS = {
    "recovered",
    "run-created",
    "round-opened",
    "round-failed",
    "upload-slot",
    "upload-started",
    "upload-marked",
    "fold-shard",
    "blob-listed",
    "blob-unlinked",
    "version-stored",
    "updates-forgotten",
    "checkpoint-renamed",
    "cut-uploads",
    "late-site-and-server",
}
"""Whose faults are an instant from those of a case that `make test` has; left to `make test-slow` as well."""


def cases_in_order() -> list[ParameterSet]:
    """The fixed set."""
    later, slow = SEVERAL_AT_ONCE | NEIGHBOURS, [pytest.mark.slow]
    return [pytest.param(c, id=c.name, marks=slow if c.name in later else []) for c in fixed()]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", cases_in_order())
def test_nothing_is_lost(case: Case, ground: Path, prepared: Path, whole: list[Arrays]) -> None:
    root = ground / case.name
    outcome = run_case(case, root, prepared, whole)
    assert not unmet(case, outcome.fired)
    assert outcome.state == "completed"
    assert outcome.findings.good, outcome.findings.remarks
    assert not outcome.findings.remarks
    assert outcome.resumed or not case.checkpoint_every
    shutil.rmtree(root)


def test_the_fixed_set_is_whole() -> None:
    cases = fixed()
    points = {f.point for case in cases for f in case.faults if isinstance(f, Kill)}
    assert points == {*failpoints.SERVER, *failpoints.CLIENT, *failpoints.TRAINER}
    assert len(cases) >= 40
    assert sum(bool(case.torch) for case in cases) >= 5
    assert {case.name for case in cases} >= SEVERAL_AT_ONCE | NEIGHBOURS
    alone = {f.point for c in cases if c.name not in SEVERAL_AT_ONCE for f in c.faults if isinstance(f, Kill)}
    assert alone == points


def test_a_campaign_is_the_same_for_the_same_seed() -> None:
    assert [drawn(7, n) for n in range(50)] == [drawn(7, n) for n in range(50)]
    assert drawn(7, 1) != drawn(8, 1)
    assert len({str(drawn(7, n).faults) for n in range(50)}) > 40
