"""What is asked of an accelerator's memory, and of the machine's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedclient.trainer.memory import free_device_memory, free_memory, peak_device_memory


def test_an_accelerator_whose_memory_torch_does_not_count_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError):
            torch.accelerator.max_memory_allocated()
    assert peak_device_memory() == 0
    free_device_memory()


def machine(root: Path, groups: str, files: dict[str, str]) -> int | None:
    """What is free on a made-up machine with 1 GiB."""
    for name, text in {"proc/meminfo": "MemTotal: 9\nMemAvailable: 1048576 kB\n", "proc/self/cgroup": groups}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name, text in files.items():
        (root / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "groups" / name).write_text(text)
    return free_memory(root / "proc", root / "groups")


def group(place: str, limit: int | str, used: int, cached: int = 0) -> dict[str, str]:
    stat = f"anon 7\ninactive_anon 1\ninactive_file {cached}\n"
    return {f"{place}memory.max": f"{limit}\n", f"{place}memory.current": f"{used}\n", f"{place}memory.stat": stat}


def old_group(place: str, limit: int, used: int) -> dict[str, str]:
    names = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": "total_inactive_file 5"}
    return {f"memory/{place}{name}": f"{value}\n" for name, value in names.items()}


JOB = "0::/system.slice/slurm/job_7/step_0\n"


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        (JOB, {}, 1 << 30),
        (
            JOB,
            group("system.slice/slurm/job_7/", 5000, 1000) | group("system.slice/slurm/job_7/step_0/", "max", 9),
            4000,
        ),
        (JOB, group("system.slice/", 5000, 1000) | group("system.slice/slurm/", 3000, 900, cached=300), 2400),
        (JOB, group("system.slice/slurm/job_7/step_0/", 5000, 9000), 0),
        (JOB, group("another.slice/", 10, 5), 1 << 30),
        ("0::/\n", group("", 5000, 1000), 4000),
        ("0::/../../elsewhere\n", group("", 5000, 1000), 4000),
        ("3:cpu,cpuacct:/a\n2:memory:/job/7\n0::/\n", old_group("job/", 700, 100) | old_group("", 1 << 62, 5), 605),
    ],
    ids=["none", "above", "tightest", "full", "others", "own", "outside", "old"],
)
def test_the_tightest_limit_on_the_way_up_counts(tmp_path: Path, groups: str, files: dict[str, str], free: int) -> None:
    assert machine(tmp_path, groups, files) == free


def test_without_control_groups_the_machine_counts(tmp_path: Path) -> None:
    assert machine(tmp_path, "", {}) == 1 << 30
    (tmp_path / "proc/self/cgroup").unlink()
    assert free_memory(tmp_path / "proc", tmp_path / "groups") == 1 << 30


def test_what_is_free_is_unknown_where_linux_tells_nothing(tmp_path: Path) -> None:
    assert free_memory(tmp_path, tmp_path) is None
