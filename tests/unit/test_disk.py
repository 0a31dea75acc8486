"""What the server knows of its disk: what is a network file system, how much room there is, what was refused."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from fedlink.errors import FedlinkError, Reason
from fedserver.store import disk as module
from fedserver.store.disk import Disk, refuse_network_disk

MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:25 / /home rw,relatime shared:2 - nfs4 server:/home rw,vers=4.2
31 30 0:26 / /home/local rw,relatime - xfs /dev/vdb rw
32 22 0:27 / /mnt/with\\040space rw - cifs //server/share rw
33 22 0:28 / /mnt/ssh rw,nosuid master:3 - fuse.sshfs me@there: rw
34 22 0:29 / /mnt/ntfs rw - fuseblk /dev/vdc rw
35 22 0:30 / /mnt/over rw - overlay overlay rw
36 22 0:31 / /mnt/rclone rw - fuse.rclone cloud: rw
37 22 0:32 / /mnt/twice rw - nfs server:/x rw
38 22 0:33 / /mnt/twice rw - tmpfs tmpfs rw
39 22 0:34 / /mnt/three rw - fuse.fuse-overlayfs fuse-overlayfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib/fedserver", ""),
        ("/home/me/fedserver-data", "nfs4"),
        ("/home", "nfs4"),
        ("/homeless", ""),
        ("/home/local/data", ""),
        ("/mnt/with space/data", "cifs"),
        ("/mnt/ssh/data", "fuse.sshfs"),
        ("/mnt/ntfs/data", ""),
        ("/mnt/over", ""),
        ("/mnt/rclone", "fuse.rclone"),
        ("/mnt/twice/data", ""),
        ("/mnt/three", ""),
    ],
)
def test_a_network_file_system_is_told_from_a_disk(path: str, kind: str) -> None:
    if not kind:
        refuse_network_disk(Path(path), MOUNTS)
        return
    with pytest.raises(FedlinkError) as e:
        refuse_network_disk(Path(path), MOUNTS)
    assert e.value.reason is Reason.BAD_CONFIG
    assert f"network file system ({kind} at " in e.value.message
    assert "PostgreSQL" in e.value.message


def test_what_cannot_be_read_is_believed() -> None:
    refuse_network_disk(Path("/anywhere"), "")
    refuse_network_disk(Path("/anywhere"), "nonsense\n - \n1 2 3 - nfs x\n")


def refuse(disk: Disk, number: int = errno.ENOSPC) -> Reason:
    with pytest.raises(FedlinkError) as e, disk.used_for("uploads"):
        raise OSError(number, "no")
    assert e.value.retry_after
    return e.value.reason


def test_trouble_is_told_until_it_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    disk = Disk(tmp_path)
    assert not disk.trouble
    for at in (1.0, 20.0, 70.0):
        now[0] = at
        assert refuse(disk) is Reason.DISK_FULL
    assert "is full" in disk.trouble
    assert "holds up uploads" in disk.trouble
    assert capsys.readouterr().out.count("holds up uploads") == 1
    with disk.used_for("uploads"):
        pass
    assert not disk.trouble
    # Nobody tried again: after a while it is no news any more.
    assert refuse(disk, errno.EROFS) is Reason.DISK_UNWRITABLE
    assert "cannot be written" in disk.trouble
    now[0] += 100
    assert not disk.trouble
    with pytest.raises(PermissionError), disk.used_for("uploads"):
        raise PermissionError(errno.EACCES, "no")


def test_room_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path, reserve=100)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: module.shutil._ntuple_diskusage(1000, 700, 300))
    disk.check_room(200, "a blob")
    disk.check_room(150, "a blob", leave=50)
    assert not disk.trouble
    with pytest.raises(FedlinkError) as e:
        disk.check_room(151, "a blob", leave=50)
    assert e.value.reason is Reason.DISK_FULL
    # What the disk holds is for the operator, not for a site.
    assert "300" not in e.value.message
    assert "300 bytes are free, 151 are needed and 150 kept free" in disk.trouble
    with disk.used_for(module.FURTHER):
        disk.check_room(1, "a blob")
    assert not disk.trouble
