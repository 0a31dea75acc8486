"""Files kept to be written over."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from fedlink import recycle
from fedlink.errors import FedlinkError
from fedlink.files import open_to_fill
from fedlink.recycle import KEPT_SECONDS, Recycler
from fedserver.store.disk import Disk

MIB = 1 << 20


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def old(directory: Path, name: str, size: int) -> Path:
    path = directory / name
    path.write_bytes(b"o" * size)
    return path


def test_the_nearest_file_is_written_over(tmp_path: Path) -> None:
    recycler = Recycler(tmp_path / "recycled")
    inodes = {}
    for size in (3 * MIB, 5 * MIB, 20 * MIB):
        path = old(tmp_path, str(size), size)
        inodes[size] = path.stat().st_ino
        recycler.give(path)
        assert not path.exists()
    assert recycler.held == 28 * MIB
    target = tmp_path / "target"
    recycler.take(target, 5 * MIB + 7)
    assert target.stat().st_ino == inodes[5 * MIB]
    assert recycler.held == 23 * MIB
    fd = open_to_fill(target, 5 * MIB + 7)
    os.close(fd)
    assert target.stat().st_size == 5 * MIB + 7


@pytest.mark.parametrize("size", [MIB - 1, MIB, 9 * MIB])
def test_what_is_not_near_stays(tmp_path: Path, size: int) -> None:
    recycler = Recycler(tmp_path / "recycled")
    recycler.give(old(tmp_path, "a", 4 * MIB))
    recycler.take(tmp_path / "target", size)
    assert not (tmp_path / "target").exists()
    assert recycler.held == 4 * MIB


def test_a_file_with_a_second_name_is_never_written_over(tmp_path: Path) -> None:
    recycler = Recycler(tmp_path / "recycled")
    path = old(tmp_path, "a", 2 * MIB)
    os.link(path, tmp_path / "second")
    recycler.give(path)
    assert not path.exists()
    assert recycler.held == 0
    # One that got it while it was on its way.
    recycler.give(old(tmp_path, "b", 2 * MIB))
    (kept,) = (tmp_path / "recycled").iterdir()
    os.link(kept, tmp_path / "third")
    recycler.take(tmp_path / "target", 2 * MIB)
    assert not (tmp_path / "target").exists()
    assert (tmp_path / "second").read_bytes() == (tmp_path / "third").read_bytes() == b"o" * 2 * MIB


def test_it_is_bounded_by_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recycler = Recycler(tmp_path / "recycled")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(1 << 40, 0, 20 * MIB))
    for n in range(4):
        recycler.give(old(tmp_path, str(n), 2 * MIB))
    assert recycler.held == 4 * MIB
    assert len(list((tmp_path / "recycled").iterdir())) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["recycled"]


def test_small_files_go(tmp_path: Path) -> None:
    recycler = Recycler(tmp_path / "recycled")
    recycler.give(old(tmp_path, "a", MIB - 1))
    assert recycler.held == 0
    assert [p.name for p in tmp_path.iterdir()] == ["recycled"]


def test_nothing_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(recycle.time, "monotonic", lambda: now)
    recycler = Recycler(tmp_path / "recycled")
    recycler.give(old(tmp_path, "a", 2 * MIB))
    now += KEPT_SECONDS / 2
    recycler.give(old(tmp_path, "b", 3 * MIB))
    now += KEPT_SECONDS / 2 + 1
    recycler.expire()
    assert recycler.held == 3 * MIB
    recycler.clear()
    assert recycler.held == 0
    assert not list((tmp_path / "recycled").iterdir())


def test_what_an_earlier_process_kept_goes(tmp_path: Path) -> None:
    Recycler(tmp_path / "recycled").give(old(tmp_path, "a", 2 * MIB))
    assert Recycler(tmp_path / "recycled").held == 0
    assert not list((tmp_path / "recycled").iterdir())


def test_what_is_kept_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recycler = Recycler(tmp_path / "recycled")
    recycler.give(old(tmp_path, "a", 2 * MIB))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(1 << 40, 0, 20 * MIB - recycler.held))
    disk = Disk(tmp_path, reserve=MIB, spare=recycler)
    assert disk.room == 19 * MIB
    disk.check_room(17 * MIB, "a blob")
    assert recycler.held == 2 * MIB
    disk.check_room(19 * MIB, "a blob")
    assert recycler.held == 0
    with pytest.raises(FedlinkError):
        disk.check_room(19 * MIB + 1, "a blob")


def test_another_file_system_only_means_that_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recycler = Recycler(tmp_path / "recycled")
    recycler.give(old(tmp_path, "a", 2 * MIB))

    def elsewhere(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "rename", elsewhere)
    recycler.give(old(tmp_path, "b", 2 * MIB))
    recycler.take(tmp_path / "target", 2 * MIB)
    assert recycler.held == 0
    assert [p.name for p in tmp_path.rglob("*")] == ["recycled"]


def test_a_disk_without_room_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old(tmp_path, "a", MIB)

    def half(fd: int, _: int, size: int) -> None:
        os.pwrite(fd, b"x", size // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", half)
    with pytest.raises(OSError, match="No space"):
        open_to_fill(path, 8 * MIB)
    assert path.read_bytes() == b"o" * MIB
