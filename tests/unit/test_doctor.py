"""The doctor's checks one by one: order, limits, thresholds, and what they say."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedclient.aside import off_loop
from fedclient.checks import CHECKS, Check, Examination, Finding, Outcome, disk, examine, finding, network, workloads
from fedclient.checks.configuration import _workload
from fedclient.checks.disk import check_disk
from fedclient.checks.network import check_tls
from fedclient.checks.rehearsal import _files, _timed
from fedclient.checks.workloads import check_device
from fedclient.launch import Description, Device, Result
from fedclient.local_files import LocalModel
from fedclient.settings import SiteSettings, WorkloadSettings
from fedclient.spool import Spool, in_use
from fedclient.trainer import Context
from fedlink.certificates import CertificateFacts
from fedlink.errors import FedlinkError, Reason
from fedlink.tensors import TensorSpec


def visit_to(directory: Path, **settings: Any) -> Examination:
    workload = {"w": WorkloadSettings(trainer="m:C")}
    given = {"name": "ada", "workload": workload, "directory": directory, "state_dir": directory / "state", **settings}
    return Examination(SiteSettings(**given), directory / "site.toml")


async def found(visit: Examination, *checks: Check) -> dict[str, Finding]:
    return {name: f async for name, f in examine(visit, checks)}


def says(outcome: str) -> Any:
    async def look(_: Examination) -> Finding:
        return Finding(Outcome(outcome), outcome)

    return look


def test_what_a_check_needs_comes_before_it() -> None:
    seen: set[str] = set()
    for check in CHECKS:
        assert set(check.needs) <= seen
        seen.add(check.name)
    assert len(seen) == len(CHECKS)


async def test_a_check_without_its_ground_is_skipped(tmp_path: Path) -> None:
    got = await found(
        visit_to(tmp_path),
        Check("a", says("failed")),
        Check("b", says("ok"), ("a",)),
        Check("c", says("ok"), ("b",)),
        Check("d", says("warning")),
        Check("e", says("ok"), ("d",)),
    )
    assert {name: f.outcome.value for name, f in got.items()} == {
        "a": "failed",
        "b": "skipped",
        "c": "skipped",
        "d": "warning",
        "e": "ok",
    }
    assert (got["b"].found, got["c"].found) == ("needs a, which failed", "needs b, which was skipped")


async def test_a_check_that_hangs_or_raises_does_not_stop_the_others(tmp_path: Path) -> None:
    async def hangs(_: Examination) -> Finding:
        await off_loop(time.sleep, 3600)
        raise AssertionError

    async def raises(_: Examination) -> Finding:
        raise KeyError("x")

    async def refuses(_: Examination) -> Finding:
        raise FedlinkError(Reason.BAD_CONFIG, "that is wrong")

    async def cancelled(_: Examination) -> Finding:
        raise asyncio.CancelledError

    looks = {"hangs": hangs, "raises": raises, "refuses": refuses, "cancelled": cancelled, "last": says("ok")}
    began = time.monotonic()
    got = await found(visit_to(tmp_path), *(Check(name, look, limit=0.1) for name, look in looks.items()))
    assert time.monotonic() - began < 5
    assert [f.outcome.value for f in got.values()] == ["failed"] * 4 + ["ok"]
    assert got["hangs"].found == "did not end within 0.1 s"
    assert "KeyError" in got["raises"].found
    assert got["refuses"].found == "that is wrong"
    assert "cancelled" in got["cancelled"].found
    assert all(f.advice for f in got.values() if f.outcome is Outcome.FAILED)


async def test_an_examination_that_is_cancelled_ends(tmp_path: Path) -> None:
    async def waits(_: Examination) -> Finding:
        await asyncio.sleep(3600)
        raise AssertionError

    task = asyncio.create_task(found(visit_to(tmp_path), Check("waits", waits)))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_off_loop_hands_on_what_it_gets() -> None:
    assert await off_loop(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await off_loop(divmod, 7, 0)


def test_the_worst_finding_counts_and_every_sentence_is_said_once() -> None:
    parts = [finding.ok("a"), finding.warning("b", "do x"), finding.skipped("c"), finding.warning("d", "do x")]
    assert finding.together(parts) == Finding(Outcome.WARNING, "a; b; c; d", "do x")
    assert finding.together([*parts, finding.failed("e", "do y")]).outcome is Outcome.FAILED
    assert finding.together([finding.ok("a"), finding.skipped("c")]).outcome is Outcome.SKIPPED


def test_a_daemon_is_noticed_and_not_hindered(tmp_path: Path) -> None:
    assert not in_use(tmp_path / "state")
    spool = Spool(tmp_path / "state")
    assert in_use(tmp_path / "state")
    spool.close()
    assert not in_use(tmp_path / "state")
    Spool(tmp_path / "state").close()


async def test_a_state_directory_that_cannot_be_made_does_not_stop_the_doctor(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    async with visit_to(tmp_path) as visit:
        assert visit.scratch.is_dir()
        report = await check_disk(visit)
    assert report.outcome is Outcome.FAILED
    assert str(tmp_path / "state") in report.found
    assert not visit.logs.exists()
    async with visit_to(tmp_path) as visit:
        log = visit.logs / "trainer-w-cpu.log"
        log.write_text("what the class printed")
    assert list(visit.logs.iterdir()) == [log], "a finding may name it"
    shutil.rmtree(visit.logs)


async def test_a_doctor_before_the_first_start_leaves_a_private_state_directory(tmp_path: Path) -> None:
    async with visit_to(tmp_path):
        pass
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "state", tmp_path / "state" / "doctor")] == [0o700] * 2


async def test_models_of_a_doctor_that_was_killed_go_after_a_day(tmp_path: Path) -> None:
    old, new = tmp_path / "state" / "doctor" / "run-old", tmp_path / "state" / "doctor" / "run-new"
    for directory in (old, new):
        directory.mkdir(parents=True)
    os.utime(old, (0, 0))
    async with visit_to(tmp_path):
        assert not old.exists()
        assert new.exists()


@pytest.mark.parametrize(
    ("free", "limit", "model", "outcome"),
    [
        (10**12, 10**11, 0, Outcome.OK),
        (10**10, 10**11, 0, Outcome.WARNING),
        (10**7, 0, 0, Outcome.FAILED),
        (10**9, 0, 10**9, Outcome.FAILED),
    ],
)
async def test_room_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, limit: int, model: int, outcome: Outcome
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    visit = visit_to(tmp_path, cache_limit=limit)
    if model:
        visit.models["w"] = LocalModel(tmp_path, (("f", (TensorSpec("w", "F32", (model // 4,)),)),), {})
    report = await check_disk(visit)
    assert report.outcome is outcome
    assert bool(report.advice) is (outcome is not Outcome.OK)


async def test_insecure_is_worth_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.tls, "refusal", lambda *_: None)
    report = await check_tls(visit_to(tmp_path, server="192.0.2.1:8470", insecure=True))
    assert report.outcome is Outcome.WARNING
    assert "insecure = true" in report.found


@pytest.mark.parametrize(
    ("days", "name", "outcome"),
    [(300, "ada", Outcome.OK), (29, "ada", Outcome.WARNING), (-1, "ada", Outcome.FAILED), (300, "bob", Outcome.FAILED)],
)
def test_this_sites_certificate(days: int, name: str, outcome: Outcome) -> None:
    now = dt.datetime.now(dt.UTC)
    end = now + dt.timedelta(days=days)
    facts = CertificateFacts(name, "CA", 1, now - dt.timedelta(days=40), end, (), b"")
    assert network._own(facts, "ada").outcome is outcome


@pytest.mark.parametrize(
    ("devices", "offered", "outcome", "words"),
    [
        (["auto"], [Device("cuda:0", "H200", 10**11), Device("cpu")], Outcome.OK, "auto is cuda:0 (H200), 100.0 GB"),
        (["cuda:7"], [Device("cuda:7"), Device("cpu")], Outcome.WARNING, "cuda:7 is not seen"),
        (["cuda:0", "cuda:1"], [Device("cuda:0", "A", 1), Device("cpu")], Outcome.WARNING, "cuda:1 is not seen"),
        (["cpu"], [Device("cpu")], Outcome.OK, "cpu, "),
    ],
)
async def test_devices(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    devices: list[str],
    offered: list[Device],
    outcome: Outcome,
    words: str,
) -> None:
    monkeypatch.setattr(workloads, "_NVIDIA", tmp_path / "none")
    visit = visit_to(tmp_path, devices=tuple(devices))
    visit.descriptions["w"] = Description({}, ("train",), tuple(offered))
    report = await check_device(visit)
    assert report.outcome is outcome
    assert words in report.found


async def test_a_gpu_that_no_workload_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "_NVIDIA", tmp_path)
    visit = visit_to(tmp_path)
    visit.descriptions["w"] = Description({}, ("train",), (Device("cpu"),))
    assert (await check_device(visit)).outcome is Outcome.WARNING


@pytest.mark.parametrize(
    ("table", "outcome"),
    [
        ({}, Outcome.OK),
        ({"train": "here.csv", "size": 3, "mode": "fast", "bucket": "s3://bucket/data.csv"}, Outcome.OK),
        ({"train": "here.csv", "test": "gone.csv"}, Outcome.WARNING),
        ({"scans": "gone/scans"}, Outcome.WARNING),
    ],
)
def test_what_looks_like_a_path_in_a_data_table(tmp_path: Path, table: dict[str, Any], outcome: Outcome) -> None:
    (tmp_path / "here.csv").touch()
    assert _files("w", tmp_path, list(table.items())).outcome is outcome


def test_a_script_that_is_missing(tmp_path: Path) -> None:
    visit = visit_to(tmp_path, workload={"w": WorkloadSettings(trainer="train.py")})
    (missing,) = _workload(visit, "w")
    assert missing.outcome is Outcome.FAILED
    assert missing.found == f"workload w: there is no script {tmp_path / 'train.py'}"
    (tmp_path / "train.py").touch()
    assert _workload(visit, "w") == []


def test_what_a_step_took() -> None:
    one = Result(9, 1, {}, 0.5, memory_bytes=3_000_000)
    assert (
        _timed("w", one).found == "w: one step in 0.5 s, first-time work included; 9 examples; 3 MB of memory at most"
    )
    assert "0.25 s a step" in _timed("w", replace(one, steps=2)).found
    assert "7 MB of the device's" in _timed("w", replace(one, device_memory_bytes=7_000_000)).found
    assert _timed("w", replace(one, num_examples=0)).outcome is Outcome.WARNING


def test_a_rehearsal_goes_through_each_loop_so_often() -> None:
    ctx = Context(settings=None, max_steps=1)
    assert list(ctx.steps(100)) == [0]
    assert list(ctx.steps(0)) == []
    assert list(ctx.steps(7)) == [0]
    assert ctx.step == 2
