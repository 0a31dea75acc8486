"""Failpoints: a process ends where it was told to, and nowhere else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedclient.spool import Stage
from fedlink import failpoints
from fedserver.runtime.driver import _NAMES

PROGRAM = """
import os
import re
from fedlink.failpoints import arm, reach
arm(os.environ)
for n in range(5):
    print(n, flush=True)
    reach("task.kept")
    reach("update.sent")
"""


def run(tmp_path: Path, plan: str) -> tuple[int, list[str], list[str]]:
    log = tmp_path / "log"
    env = {**os.environ, failpoints.VARIABLE: plan, failpoints.LOG_VARIABLE: str(log)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.split(), log.read_text().splitlines() if log.exists() else []


def test_the_process_ends_at_the_passage_that_was_named(tmp_path: Path) -> None:
    assert run(tmp_path, "update.sent@3,blob.read@1,task.kept@4") == (
        -signal.SIGKILL,
        ["0", "1", "2"],
        ["update.sent@3"],
    )


def test_what_happened_does_not_happen_again_in_the_next_life(tmp_path: Path) -> None:
    plan = "update.sent@2,update.sent@2,task.kept@1,task.kept@4"
    lives = [run(tmp_path, plan)[1] for _ in range(5)]
    assert [len(life) for life in lives] == [2, 2, 1, 4, 5]


def test_without_a_plan_nothing_happens(tmp_path: Path) -> None:
    assert run(tmp_path, "") == (0, ["0", "1", "2", "3", "4"], [])


@pytest.mark.parametrize("text", ["task.kept", "task.kept@", "@3", "task.kept@x", "task.kept@1,", "elsewhere@1"])
def test_a_plan_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="NAME@COUNT"):
        failpoints.Plan(text, Path("log"))


def test_every_name_is_a_place_in_the_code() -> None:
    root = Path(failpoints.__file__).parents[2]
    source = "".join(p.read_text() for d in ("protos", "fedserver", "fedclient") for p in (root / d).rglob("*.py"))
    names = set(re.findall(r"reach\(\"([a-z.]+)\"\)", source))
    names |= {f"journal.{stage}" for stage in Stage} | {f"round.{name}" for name in _NAMES.values()}
    assert names == {*failpoints.SERVER, *failpoints.CLIENT, *failpoints.TRAINER}


def test_a_plan_without_a_log_is_refused() -> None:
    with pytest.raises(ValueError, match=failpoints.LOG_VARIABLE):
        failpoints.arm({failpoints.VARIABLE: "task.kept@1"})


def test_a_program_says_what_is_wrong_with_its_plan() -> None:
    command = [sys.executable, "-c", "from fedclient.cli import main; main()", "start"]
    env = {**os.environ, failpoints.VARIABLE: "elsewhere@1", failpoints.LOG_VARIABLE: "log"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "elsewhere@1" in done.stderr
