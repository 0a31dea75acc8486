"""What every BlobStore promises, and what the directory adds."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from fedlink.blobs import CHUNK_SIZE, BlobRef, chunk_digests_of, ref_of
from fedlink.errors import FedlinkError, Reason
from fedserver.store.blobs import BlobStore, DirectoryBlobStore, read_blob
from tests.support.transfer import some_bytes

SIZES = [0, 1, CHUNK_SIZE - 1, CHUNK_SIZE, 3 * CHUNK_SIZE + 7]


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return DirectoryBlobStore(tmp_path / "blobs")


def put(store: BlobStore, data: bytes, directory: Path) -> BlobRef:
    path = directory / "incoming"
    path.write_bytes(data)
    ref = ref_of(data)
    store.adopt(path, ref, chunk_digests_of(data))
    assert not path.exists()
    return ref


def reason_of(call: object, *args: object) -> Reason:
    with pytest.raises(FedlinkError) as e:
        call(*args)  # type: ignore[operator]
    return e.value.reason


@pytest.mark.parametrize("size", SIZES)
def test_what_goes_in_comes_out(store: BlobStore, tmp_path: Path, size: int) -> None:
    data = some_bytes(size)
    ref = put(store, data, tmp_path)
    assert store.contains(ref.digest)
    assert list(store.digests()) == [ref.digest]
    assert store.local_path(ref.digest).read_bytes() == data
    assert read_blob(store, ref.digest, size) == data
    store.verify(ref.digest)
    with store.open(ref.digest) as reader:
        assert (reader.size, reader.chunk_digests) == (size, chunk_digests_of(data))
        for at, n in ((0, size), (size // 2, size // 3), (size, 0)):
            buffer = bytearray(n)
            reader.read_into(memoryview(buffer), at)
            assert buffer == data[at : at + n]
        assert reason_of(reader.read_into, memoryview(bytearray(2)), size - 1 if size else 0) is Reason.BLOB_CORRUPT


def test_adopt_is_idempotent(store: BlobStore, tmp_path: Path) -> None:
    first = put(store, b"the same", tmp_path)
    assert put(store, b"the same", tmp_path) == first
    assert list(store.digests()) == [first.digest]


def test_adopt_refuses_what_does_not_fit_its_name(store: BlobStore, tmp_path: Path) -> None:
    path = tmp_path / "incoming"
    path.write_bytes(b"12345")
    ref, digests = ref_of(b"12345"), chunk_digests_of(b"12345")
    assert reason_of(store.adopt, path, BlobRef(ref.digest, 4), digests) is Reason.DIGEST_MISMATCH
    assert reason_of(store.adopt, path, ref, digests + digests) is Reason.DIGEST_MISMATCH
    assert reason_of(store.adopt, path, BlobRef(bytes(32), 5), digests) is Reason.DIGEST_MISMATCH
    assert path.exists()
    assert not list(store.digests())


@pytest.mark.parametrize("digest", [bytes(32), b"", b"short", b"x" * 33])
def test_what_is_not_there(store: BlobStore, digest: bytes) -> None:
    for call in (store.open, store.local_path, store.verify):
        assert reason_of(call, digest) is Reason.BLOB_NOT_FOUND
    if len(digest) == 32:
        assert not store.contains(digest)
        store.delete(digest)


def test_deleted_while_open(store: BlobStore, tmp_path: Path) -> None:
    kept, gone = put(store, b"kept", tmp_path), put(store, b"gone", tmp_path)
    with store.open(gone.digest) as reader:
        store.delete(gone.digest)
        store.delete(gone.digest)
        buffer = bytearray(4)
        reader.read_into(memoryview(buffer), 0)
        assert buffer == b"gone"
    assert not store.contains(gone.digest)
    assert list(store.digests()) == [kept.digest]


def test_read_blob_is_bounded_and_checked(store: BlobStore, tmp_path: Path) -> None:
    ref = put(store, b"manifest", tmp_path)
    assert reason_of(read_blob, store, ref.digest, 7) is Reason.TOO_LARGE
    store.local_path(ref.digest).write_bytes(b"manifesT")
    assert reason_of(read_blob, store, ref.digest, 8) is Reason.BLOB_CORRUPT


def test_damage_is_noticed(store: BlobStore, tmp_path: Path) -> None:
    data = some_bytes(2 * CHUNK_SIZE + 9)
    ref = put(store, data, tmp_path)
    path = store.local_path(ref.digest)
    path.write_bytes(data[:-1] + b"!")
    with store.open(ref.digest):
        pass
    assert reason_of(store.verify, ref.digest) is Reason.BLOB_CORRUPT
    path.write_bytes(data[:-CHUNK_SIZE])
    assert reason_of(store.open, ref.digest) is Reason.BLOB_CORRUPT


def test_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DirectoryBlobStore(tmp_path / "blobs")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "incoming":
            raise OSError(errno.EXDEV, "another file system")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    ref = put(store, b"from elsewhere", tmp_path)
    assert read_blob(store, ref.digest, 100) == b"from elsewhere"
    assert sorted(p.name for p in store.local_path(ref.digest).parent.iterdir()) == [
        ref.digest.hex(),
        ref.digest.hex() + ".chunks",
    ]


def test_a_crash_at_any_call_leaves_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adopt is cut off before each of its system calls in turn, and the directory opened anew."""
    data = some_bytes(CHUNK_SIZE + 5)
    ref, digests = ref_of(data), chunk_digests_of(data)
    calls = (os, "open"), (os, "fsync"), (os, "rename"), (os, "unlink"), (Path, "write_bytes"), (os, "mkdir")

    class Killed(BaseException):
        pass

    def run(until: int) -> bool:
        root = tmp_path / str(until)
        store = DirectoryBlobStore(root / "blobs")
        incoming = root / "incoming"
        incoming.write_bytes(data)
        count = 0
        with monkeypatch.context() as m:
            for owner, name in calls:
                real = getattr(owner, name)

                def counted(*args: object, real: object = real, **kwargs: object) -> object:
                    nonlocal count
                    count += 1
                    if count > until:
                        raise Killed
                    return real(*args, **kwargs)  # type: ignore[operator]

                m.setattr(owner, name, counted)
            try:
                store.adopt(incoming, ref, digests)
                killed = False
            except Killed:
                killed = True
        store = DirectoryBlobStore(root / "blobs")
        if store.contains(ref.digest):
            store.verify(ref.digest)
        else:
            assert incoming.read_bytes() == data
            store.adopt(incoming, ref, digests)
            store.verify(ref.digest)
        names = [p.name for p in (root / "blobs" / ref.digest.hex()[:2]).iterdir()]
        assert sorted(names) == [ref.digest.hex(), ref.digest.hex() + ".chunks"]
        shutil.rmtree(root)
        return killed

    points = 0
    while run(points):
        points += 1
    assert points > 8
