"""Upload slots: what is acknowledged stays, what is wrong never gets in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from fedlink.blobs import CHUNK_SIZE, BlobRef, chunk_digests_of, chunk_spans, ref_of
from fedlink.errors import FedlinkError, Reason
from fedlink.recycle import Recycler
from fedserver.store.blobs import DirectoryBlobStore
from fedserver.store.disk import Disk
from fedserver.store.spool import Spool
from tests.support.transfer import some_bytes

MIB = CHUNK_SIZE
ID = bytes(range(16))
OTHER = bytes(range(16, 32))


def chunks_of(data: bytes, start: int = 0, count: int | None = None) -> list[bytes]:
    spans = list(chunk_spans(start, len(data)))[:count]
    return [data[at : at + n] for at, n in spans]


def create(spool: Spool, data: bytes, upload_id: bytes = ID) -> BlobRef:
    spool.create(upload_id, ref_of(data), chunk_digests_of(data))
    return ref_of(data)


def refusal(call: Any, *args: Any) -> FedlinkError:
    with pytest.raises(FedlinkError) as e:
        call(*args)
    return e.value


@pytest.mark.parametrize("size", [0, 1, MIB, 5 * MIB + 3])
def test_a_slot_from_start_to_end(tmp_path: Path, size: int) -> None:
    spool = Spool(tmp_path)
    data = some_bytes(size)
    ref = create(spool, data)
    assert spool.committed(ID) == 0
    assert spool.complete(ID) is (size == 0)
    if size:
        assert spool.append(ID, 0, chunks_of(data, 0, 1)) == min(size, MIB)
    if size > MIB:
        assert spool.append(ID, MIB, [memoryview(c) for c in chunks_of(data, MIB)]) == size
    assert spool.complete(ID)
    assert (spool.ref(ID), spool.chunk_digests(ID)) == (ref, chunk_digests_of(data))
    assert spool.path(ID).read_bytes() == data
    assert list(spool.ids()) == [ID]
    create(spool, data)
    assert spool.complete(ID)
    spool.delete(ID)
    spool.delete(ID)
    assert not list(spool.ids())


def test_refusals(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    data = some_bytes(3 * MIB + 9)
    create(spool, data)
    one, two, three, last = chunks_of(data)
    for offset in (MIB, 1, 5 * MIB):
        e = refusal(spool.append, ID, offset, [two])
        assert (e.reason, e.metadata["committed_size"]) == (Reason.OFFSET_MISMATCH, "0")
    e = refusal(spool.append, ID, 0, [one, two, bytes(MIB), last])
    assert (e.reason, e.metadata["committed_size"]) == (Reason.CHUNK_CORRUPT, str(2 * MIB))
    assert spool.committed(ID) == 2 * MIB
    for wrong in (b"", three[:-1], three + b"x", three + last):
        e = refusal(spool.append, ID, 2 * MIB, [wrong])
        assert (e.reason, e.metadata["committed_size"]) == (Reason.CHUNK_SIZE, str(2 * MIB))
    e = refusal(spool.append, ID, 2 * MIB, [three, last, b"more"])
    assert e.reason is Reason.CHUNK_SIZE
    assert spool.complete(ID)
    assert refusal(spool.append, ID, len(data), [b"more"]).reason is Reason.CHUNK_SIZE
    assert spool.path(ID).read_bytes() == data

    for call in (spool.committed, spool.ref, spool.chunk_digests, spool.reverify):
        assert refusal(call, OTHER).reason is Reason.UPLOAD_NOT_FOUND
        assert refusal(call, b"../../etc/passwd"[:15]).reason is Reason.UPLOAD_NOT_FOUND
    assert refusal(spool.append, OTHER, 0, [one]).reason is Reason.UPLOAD_NOT_FOUND
    assert refusal(create, spool, b"another blob").reason is Reason.DIGEST_MISMATCH
    assert refusal(spool.create, OTHER, ref_of(data), bytes(128)).reason is Reason.DIGEST_MISMATCH
    assert not spool.complete(OTHER)


def test_no_room(tmp_path: Path) -> None:
    spool = Spool(tmp_path, disk=Disk(tmp_path, reserve=1 << 60))
    e = refusal(create, spool, b"small")
    assert e.reason is Reason.DISK_FULL
    assert e.retry_after
    assert not list(spool.ids())
    assert not list(tmp_path.iterdir())


def test_linked_bytes_are_never_written_over(tmp_path: Path) -> None:
    data = some_bytes(2 * MIB)
    incoming = tmp_path / "incoming"
    incoming.write_bytes(data)
    store = DirectoryBlobStore(tmp_path / "blobs")
    store.adopt(incoming, ref_of(data), chunk_digests_of(data))
    spool = Spool(tmp_path / "spool", recycler=Recycler(tmp_path / "recycled"))
    spool.link(ID, store.local_path(ref_of(data).digest), ref_of(data), chunk_digests_of(data))
    assert spool.complete(ID)
    assert spool.reverify(ID) == len(data)
    spool.delete(ID)
    create(spool, bytes(2 * MIB), OTHER)
    spool.append(OTHER, 0, [bytes(MIB), bytes(MIB)])
    store.verify(ref_of(data).digest)


def test_recycled_slots(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", recycler=Recycler(tmp_path / "recycled"))
    big, small = some_bytes(3 * MIB), some_bytes(2 * MIB + 5, 1)
    create(spool, big)
    spool.append(ID, 0, chunks_of(big))
    inode = spool.path(ID).stat().st_ino
    spool.delete(ID)
    create(spool, small, OTHER)
    assert spool.path(OTHER).stat().st_ino == inode
    assert spool.committed(OTHER) == 0
    spool.append(OTHER, 0, chunks_of(small))
    assert spool.path(OTHER).read_bytes() == small


def test_adopted_slot_is_gone(tmp_path: Path) -> None:
    data = some_bytes(MIB + 1)
    spool, store = Spool(tmp_path / "spool"), DirectoryBlobStore(tmp_path / "blobs")
    ref = create(spool, data)
    spool.append(ID, 0, chunks_of(data))
    store.adopt(spool.path(ID), ref, spool.chunk_digests(ID))
    assert not spool.complete(ID)
    assert refusal(spool.committed, ID).reason is Reason.UPLOAD_NOT_FOUND
    create(spool, data)
    assert spool.committed(ID) == 0
    store.verify(ref.digest)


def test_leftovers_go_when_the_spool_is_opened(tmp_path: Path) -> None:
    for name in (".new-1", ".old-1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "data").write_bytes(b"left")
    create(Spool(tmp_path), b"data")
    spool = Spool(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [ID.hex()]
    assert list(spool.ids()) == [ID]


def test_a_look_that_is_not_wanted_any_more_leaves_the_mark(tmp_path: Path) -> None:
    data = some_bytes(3 * MIB)
    spool = Spool(tmp_path)
    create(spool, data)
    spool.append(ID, 0, chunks_of(data))
    spool.path(ID).write_bytes(bytes(3 * MIB))
    assert refusal(spool.reverify, ID, lambda: True).reason is Reason.DRAINING
    assert spool.complete(ID)
    assert spool.reverify(ID) == 0


@pytest.mark.parametrize("damage", ["state", "chunks", "data"])
def test_power_loss_that_empties_files(tmp_path: Path, damage: str) -> None:
    data = some_bytes(3 * MIB)
    spool = Spool(tmp_path)
    create(spool, data)
    spool.append(ID, 0, chunks_of(data))
    (tmp_path / ID.hex() / damage).write_bytes(b"")
    spool = Spool(tmp_path)
    if damage == "data":
        assert spool.reverify(ID) == 0
    else:
        assert refusal(spool.reverify, ID).reason is Reason.UPLOAD_NOT_FOUND
        assert not list(spool.ids())
        create(spool, data)
    spool.append(ID, 0, chunks_of(data))
    assert spool.path(ID).read_bytes() == data


def test_killed_before_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Append is cut off before each of its writes in turn: the mark never covers a byte that is not there."""
    data = some_bytes(3 * MIB + 1)

    class Killed(BaseException):
        pass

    real = os.pwrite
    for allowed in range(5):
        root = tmp_path / str(allowed)
        spool = Spool(root)
        create(spool, data)
        left = allowed

        def write(fd: int, view: memoryview, offset: int) -> int:
            nonlocal left
            if left == 0:
                real(fd, view[: len(view) // 2], offset)
                raise Killed
            left -= 1
            return real(fd, view, offset)

        with monkeypatch.context() as m:
            m.setattr(os, "pwrite", write)
            if allowed < 5:
                with pytest.raises(Killed):
                    spool.append(ID, 0, chunks_of(data))
        spool = Spool(root)
        committed = spool.committed(ID)
        assert committed % MIB == 0 or committed == len(data)
        assert spool.reverify(ID) == committed
        spool.append(ID, committed, chunks_of(data, committed))
        assert spool.path(ID).read_bytes() == data


class SpoolMachine(RuleBasedStateMachine):
    """Appends of every kind, restarts and rot, against a model: a mark and the bytes."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.directory = tempfile.TemporaryDirectory()
        self.root = Path(self.directory.name)
        self.data = b""
        self.mark = 0

    def teardown(self) -> None:
        self.directory.cleanup()

    @initialize(chunks=st.integers(0, 4), tail=st.integers(0, 3))
    def open(self, chunks: int, tail: int) -> None:
        self.data = some_bytes(chunks * MIB + tail)
        self.spool = Spool(self.root)
        create(self.spool, self.data)

    @rule(count=st.integers(1, 3))
    def append(self, count: int) -> None:
        chunks = chunks_of(self.data, self.mark, count)
        if chunks:
            self.mark += sum(map(len, chunks))
            assert self.spool.append(ID, self.mark - sum(map(len, chunks)), chunks) == self.mark

    @rule(offset=st.integers(0, 6).map(lambda n: n * MIB))
    def append_elsewhere(self, offset: int) -> None:
        if offset != self.mark:
            assert refusal(self.spool.append, ID, offset, [bytes(MIB)]).reason is Reason.OFFSET_MISMATCH

    @rule(good=st.integers(0, 2))
    def append_damaged(self, good: int) -> None:
        chunks = chunks_of(self.data, self.mark, good + 1)
        if chunks:
            chunks[-1] = bytes(len(chunks[-1]) - 1) + bytes([chunks[-1][-1] ^ 1])
            start = self.mark
            self.mark += sum(map(len, chunks[:-1]))
            e = refusal(self.spool.append, ID, start, chunks)
            assert (e.reason, e.metadata) == (Reason.CHUNK_CORRUPT, {"committed_size": str(self.mark)})

    @rule()
    def restart(self) -> None:
        self.spool = Spool(self.root)

    @precondition(lambda self: self.mark > 0)
    @rule(data=st.data())
    def rot(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, self.mark - 1))
        with self.spool.path(ID).open("r+b") as f:
            f.seek(at)
            f.write(bytes([self.data[at] ^ 1]))
        self.mark = at // MIB * MIB
        self.spool = Spool(self.root)
        assert self.spool.reverify(ID) == self.mark

    @rule()
    def look(self) -> None:
        assert self.spool.committed(ID) == self.mark
        assert self.spool.complete(ID) is (self.mark == len(self.data))
        assert self.spool.path(ID).read_bytes()[: self.mark] == self.data[: self.mark]


TestSpoolMachine = SpoolMachine.TestCase
TestSpoolMachine.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
