"""Failpoints: a process ends where it was told to, and nowhere else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedlink import failpoints

PROGRAM = """
from fedlink.failpoints import reach
for n in range(5):
    print(n, flush=True)
    reach("here")
    reach("there")
"""


def run(tmp_path: Path, plan: str) -> tuple[int, list[str], list[str]]:
    log = tmp_path / "log"
    env = {**os.environ, failpoints.VARIABLE: plan, failpoints.LOG_VARIABLE: str(log)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.split(), log.read_text().splitlines() if log.exists() else []


def test_the_process_ends_at_the_passage_that_was_named(tmp_path: Path) -> None:
    assert run(tmp_path, "there@3,elsewhere@1") == (-signal.SIGKILL, ["0", "1", "2"], ["there 3"])


def test_without_a_plan_nothing_happens(tmp_path: Path) -> None:
    assert run(tmp_path, "") == (0, ["0", "1", "2", "3", "4"], [])
    assert failpoints.reach is failpoints._ignore


@pytest.mark.parametrize("text", ["here", "here@", "@3", "here@x", "here@1,"])
def test_a_plan_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="NAME@COUNT"):
        failpoints.Plan(text)
