"""`make fault`: randomized schedules of faults, and one JSON line of what they did.

python -m tests.fault.campaign --seed 7 --cases 50
python -m tests.fault.campaign --seed 7 --case 12          one of them again
python -m tests.fault.campaign --case version-stored       one of the fixed set
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from tests.fault.case import Case, run_case, unmet
from tests.fault.cases import drawn, fixed
from tests.fault.place import roomy_directory
from tests.fault.start import ROUNDS, Arrays, prepare, undisturbed

_whole: list[Arrays] = []


@dataclass
class Score:
    """What a campaign, or one case, came to."""

    cases: int = 0
    faults_injected: int = 0
    faults_survived: int = 0
    updates_lost: int = 0
    updates_double_counted: int = 0
    versions_lost: int = 0
    bit_identical: bool = True
    failed: int = 0

    def add(self, other: Score) -> None:
        """Add another's counts."""
        identical = self.bit_identical and other.bit_identical
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)
        self.bit_identical = identical


def attempt(case: Case, root: Path, prepared: Path) -> tuple[Score, list[str], float]:
    """One case: its score, what is to be said of it, and its seconds. The directory of a case that fails stays."""
    if not _whole:
        _whole.extend(undisturbed(ROUNDS))
    directory = root / case.name
    try:
        outcome = run_case(case, directory, prepared, _whole)
    except Exception:  # noqa: BLE001 - whatever it is, the other cases go on and this one counts as failed
        return Score(1, failed=1, bit_identical=False), [traceback.format_exc()], 0.0
    found, injected = outcome.findings, outcome.fired.total()
    remarks = [*found.remarks, *unmet(case, outcome.fired)]
    if outcome.state != "completed":
        remarks.append(f"the run is {outcome.state}")
    score = Score(
        1,
        injected,
        0 if remarks else injected,
        found.updates_lost,
        found.updates_double_counted,
        found.versions_lost,
        found.bit_identical,
        int(bool(remarks)),
    )
    if not remarks:
        shutil.rmtree(directory)
    return score, remarks, outcome.seconds


def campaign(cases: list[Case], root: Path, jobs: int, again: str) -> Score:
    """Carry out cases, some at the same time, telling of each."""
    total = Score()
    prepared = prepare(root)
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        futures = {pool.submit(attempt, case, root, prepared): case for case in cases}
        for future in as_completed(futures):
            case = futures[future]
            score, remarks, seconds = future.result()
            total.add(score)
            what = ", ".join(map(str, case.faults)) or "no fault"
            print(
                f"{total.cases:4} {'FAILED' if score.failed else 'good':7} {seconds:5.1f} s  {case.name}: {what}",
                flush=True,
            )
            for remark in remarks:
                print(f"     {remark}", flush=True)
            if score.failed:
                print(
                    f"     again: {again.format(case.name.rpartition('-')[2] if 'drawn' in case.name else case.name)}"
                )
                print(f"     its files: {root / case.name}", flush=True)
    return total


def main() -> int:
    """The exit code is 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault.campaign")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--case", default="")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    cases = [drawn(options.seed, n) for n in range(options.cases)]
    if options.case.isdigit():
        cases = [drawn(options.seed, int(options.case))]
    elif options.case:
        cases = [case for case in fixed() if case.name == options.case or options.case == "fixed"]
    again = f"python -m tests.fault.campaign --seed {options.seed} --case {{}}"
    root = roomy_directory()
    total = campaign(cases, root, options.jobs, again)
    if not total.failed:
        shutil.rmtree(root)
    print(json.dumps(asdict(total)))
    return 1 if total.failed or not total.cases else 0


if __name__ == "__main__":
    sys.exit(main())
