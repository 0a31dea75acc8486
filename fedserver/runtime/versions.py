"""Versions and models: bytes into the blob store, and out of it when nobody needs them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import Connection

from fedlink import log as logs
from fedlink.blobs import MAX_MANIFEST_SIZE, BlobRef, blob_digest, chunk_digests_of, ref_of
from fedlink.errors import FedlinkError, Reason
from fedlink.failpoints import reach
from fedlink.manifest import Manifest
from fedlink.recycle import Recycler
from fedlink.tensors import Kind, TensorError, read_header
from fedserver.aggregation.fold import aggregate
from fedserver.aggregation.pipeline import Contribution, ModelFiles, NewVersion
from fedserver.aggregation.presets import pipeline_for
from fedserver.runtime.wanted import Unwanted, while_wanted
from fedserver.runtime.whole import whole
from fedserver.store.blobs import BlobStore, read_blob
from fedserver.store.database import Database
from fedserver.store.disk import Disk
from fedserver.store.queries import models as model_queries
from fedserver.store.queries import runs as run_queries
from fedserver.store.queries import tasks as task_queries
from fedserver.store.rows import ModelRow, RunRow, TaskRow, UploadRow, VersionRow
from fedserver.store.spool import Spool

READ_SECONDS = 60.0
"""So long after it was read last, a version is not retired: an export fetches it piece by piece."""
_FOLDS = 2
_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A new version whose bytes are safe in the blob store, not yet in the database."""

    manifest: BlobRef
    master: BlobRef | None
    size: int
    tensors: int
    written: int
    """Bytes of the files that were made for it; a frozen base, shared with the version before, is not among them."""
    digests: frozenset[bytes]
    """Every blob it needs: manifests and files."""


def version_owner(run_id: int, number: int) -> str:
    """Name of a version in `blob_refs`."""
    return f"version:{run_id}:{number}"


def versions_among(owners: Iterable[str]) -> set[tuple[int, int]]:
    """Run id and number of those owners in `blob_refs` that are versions."""
    parts = (owner.split(":") for owner in owners)
    return {(int(p[1]), int(p[2])) for p in parts if p[0] == "version"}


def is_whole(spool: Spool, upload_id: bytes) -> bool:
    """Whether all bytes of an upload are here; a slot that a power loss took is not. Blocking."""
    try:
        return spool.complete(upload_id)
    except FedlinkError:
        return False


def is_as_sent(spool: Spool, upload_id: bytes, unwanted: Unwanted) -> bool:
    """Hash an upload again; whether it is as far as it was. Blocking.

    If not, or damaged beyond use, it goes on from where it is right, or is begun anew.
    """
    try:
        before = spool.committed(upload_id)
        return spool.reverify(upload_id, unwanted) == before
    except FedlinkError:
        return False


class Versions:
    """Builds, keeps and retires the versions of every run, and takes in models."""

    def __init__(
        self,
        database: Database,
        store: BlobStore,
        spool: Spool,
        scratch: Path,
        disk: Disk,
        *,
        recycler: Recycler | None = None,
    ) -> None:
        self._db = database
        self._recycler = recycler
        self._disk = disk
        self._store = store
        self._spool = spool
        self._scratch = scratch
        # Held from adopting blobs to committing their rows, and around deletion: a blob that is
        # on its way to a new owner must not be collected because its last old owner went.
        # Its holder may take a driver's lock, so nobody who has a driver's lock may wait for it.
        self.blobs_lock = asyncio.Lock()
        # Folding takes a thread for minutes; the others are for what sites wait for.
        self._folds = asyncio.Semaphore(_FOLDS)
        self._read: dict[tuple[int, int], float] = {}
        self._log = logs.get("versions")

    def read_manifest(self, digest: bytes) -> Manifest:
        """A stored manifest. Blocking."""
        return Manifest.parse(read_blob(self._store, digest, MAX_MANIFEST_SIZE))

    def files_of(self, digest: bytes) -> ModelFiles:
        """A stored model's files. Blocking."""
        manifest = self.read_manifest(digest)
        digests = [f.blob.digest for f in manifest.files]
        paths, lists = map(self._store.local_path, digests), map(self._store.list_path, digests)
        return ModelFiles(manifest, list(paths), list(lists))

    # --- A new version

    @contextlib.asynccontextmanager
    async def built(
        self, run: RunRow, base: VersionRow, tasks: Sequence[TaskRow], scratch_name: str
    ) -> AsyncIterator[StoredVersion]:
        """Aggregate the updates of these tasks onto a version and store the result, to be committed inside.

        On leaving, what was stored and not committed is deleted.

        Raises:
            FedlinkError: NO_EXAMPLES, NOT_FINITE, DISK_FULL, DISK_UNWRITABLE; BLOB_CORRUPT or BLOB_MISSING, with
                metadata "client" if it is that site's update whose bytes have changed or are gone.
        """
        uploads = await self._db.run(lambda c: task_queries.task_uploads(c, [t.id for t in tasks]))
        # Never that of an attempt before, which a disk that could not be written may have kept.
        out_dir = self._scratch / f"{scratch_name}-{secrets.token_hex(4)}"

        def fold(unwanted: Unwanted) -> NewVersion:
            with self._disk.used_for("the next version"):
                out_dir.mkdir(parents=True)
                contributions = [self._contribution(t, [u for u in uploads if u.task_id == t.id]) for t in tasks]
                master = self.files_of(base.master_digest) if base.master_digest else None
                model, pipeline = self.files_of(base.digest), pipeline_for(run.parsed)
                return aggregate(
                    model, master, contributions, pipeline, out_dir, recycler=self._recycler, unwanted=unwanted
                )

        def store(new: NewVersion) -> StoredVersion:
            with self._disk.used_for("the next version"):
                return self._store_version(new, out_dir)

        try:
            async with self._folds:
                new = await while_wanted(fold)
            async with self.blobs_lock:
                digests = {f.entry.blob.digest for f in new.files}
                try:
                    stored = await asyncio.to_thread(store, new)
                    digests |= stored.digests
                    yield stored
                finally:
                    await self._collect(digests)
        finally:
            await asyncio.to_thread(shutil.rmtree, out_dir, True)

    def _contribution(self, task: TaskRow, uploads: Sequence[UploadRow]) -> Contribution:
        assert task.update_digest is not None
        try:
            found = self.uploaded(task.update_digest, uploads, f"the update of client {task.client!r}")
        except FedlinkError as e:
            e.metadata |= {"client": task.client}
            raise
        return Contribution(task.client, task.num_examples, found.manifest, found.files, found.lists)

    def _store_version(self, new: NewVersion, out_dir: Path) -> StoredVersion:
        for file in new.files:
            self._store.adopt(file.path, file.entry.blob, file.chunk_digests)
        digests = set()
        refs: list[BlobRef | None] = []
        for manifest in (new.model, new.master):
            if manifest is None:
                refs.append(None)
                continue
            ref = self._adopt_bytes(manifest.serialize(), out_dir / "manifest")
            refs.append(ref)
            digests |= {ref.digest, *(f.blob.digest for f in manifest.everything)}
        model, master = refs
        assert model is not None
        written = sum(f.entry.blob.size for f in new.files) + sum(ref.size for ref in refs if ref)
        return StoredVersion(model, master, new.model.total_size, len(new.model.tensors), written, frozenset(digests))

    def _adopt_bytes(self, data: bytes, path: Path) -> BlobRef:
        path.write_bytes(data)
        ref = ref_of(data)
        self._store.adopt(path, ref, chunk_digests_of(data))
        return ref

    # --- What was uploaded

    async def reverify(self, task: TaskRow) -> bool:
        """Hash the uploads of a task again, so that its site sends what is not right any more.

        Returns:
            Whether everything is as it was sent.
        """
        uploads = await self._db.run(lambda c: task_queries.task_uploads(c, [task.id]))
        return all(await while_wanted(lambda unwanted: [is_as_sent(self._spool, u.id, unwanted) for u in uploads]))

    def uploaded(self, digest: bytes, uploads: Sequence[UploadRow], what: str) -> ModelFiles:
        """A manifest among uploads, and its files. Blocking.

        Raises:
            FedlinkError: BLOB_MISSING with metadata "digest"; BAD_MANIFEST; BLOB_CORRUPT.
        """
        here = {u.digest: u for u in uploads if is_whole(self._spool, u.id)}

        def id_of(wanted: bytes, name: str) -> bytes:
            if wanted not in here:
                raise FedlinkError(
                    Reason.BLOB_MISSING,
                    f"{name} of {what} was not uploaded completely; send it, then repeat the call",
                    metadata={"digest": wanted.hex()},
                )
            return here[wanted].id

        path = self._spool.path(id_of(digest, "the manifest"))
        if path.stat().st_size > MAX_MANIFEST_SIZE:
            raise FedlinkError(Reason.BAD_MANIFEST, f"the manifest of {what} is larger than {MAX_MANIFEST_SIZE} bytes")
        data = path.read_bytes()
        if blob_digest(data) != digest:
            raise FedlinkError(Reason.BLOB_CORRUPT, f"the manifest of {what} is damaged on the server's disk")
        manifest = Manifest.parse(data)
        for f in manifest.everything:
            if f.blob.digest in here and here[f.blob.digest].size != f.blob.size:
                raise FedlinkError(
                    Reason.BAD_MANIFEST, f"file {f.name} of {what} has another size than its manifest says"
                )
        ids = [id_of(f.blob.digest, f"file {f.name}") for f in manifest.everything][: len(manifest.files)]
        return ModelFiles(manifest, [self._spool.path(i) for i in ids], [self._spool.list_path(i) for i in ids])

    @whole
    async def take_in(self, import_id: bytes, name: str, ref: BlobRef) -> ModelRow:
        """Turn the uploads of an import into a model; a repeat answers the same model.

        Until the model is recorded the uploads stay, so that nothing has to be sent again.

        Raises:
            FedlinkError: MODEL_EXISTS, BLOB_MISSING, BAD_MANIFEST, DISK_FULL, DISK_UNWRITABLE.
        """
        again = await self._db.run(lambda c: _same_model(c, name, ref))
        uploads = await self._db.run(lambda c: task_queries.import_uploads(c, import_id))
        if again is not None:
            await self._db.run(lambda c: task_queries.delete_uploads(c, [u.id for u in uploads]))
            await self.forget_uploads(uploads)
            return again
        async with self.blobs_lock:
            try:
                manifest = await asyncio.to_thread(self._adopt_import, ref, uploads)
                row = await self._db.run(lambda c: _record_model(c, name, ref, manifest, uploads))
            finally:
                await self._collect({u.digest for u in uploads})
        await self.forget_uploads(uploads)
        self._log.info("imported", model=name, size=row.size, tensors=row.tensors)
        return row

    def _adopt_import(self, ref: BlobRef, uploads: Sequence[UploadRow]) -> Manifest:
        found = self.uploaded(ref.digest, uploads, "the import")
        manifest = found.manifest
        if manifest.kind is not Kind.MODEL:
            raise FedlinkError(Reason.BAD_MANIFEST, f"the manifest describes a {manifest.kind}, not a model")
        for index, path in enumerate(found.files):
            try:
                manifest.check_header(index, read_header(path))
            except TensorError as e:
                raise FedlinkError(Reason.BAD_MANIFEST, f"file {manifest.files[index].name}: {e}") from None
        by_digest = {u.digest: u for u in uploads}
        links = self._scratch / f"import-{secrets.token_hex(8)}"
        try:
            with self._disk.used_for("imports"):
                links.mkdir(parents=True)
                for blob in {f.blob for f in manifest.everything} | {ref}:
                    upload = by_digest[blob.digest]
                    if not self._store.contains(blob.digest):
                        link = _linked(self._spool.path(upload.id), links / upload.id.hex())
                        self._store.adopt(link, blob, self._spool.chunk_digests(upload.id))
        finally:
            shutil.rmtree(links, ignore_errors=True)
        return manifest

    # --- What goes

    def note_read(self, versions: Iterable[tuple[int, int]]) -> None:
        """An operator reads these now, piece by piece: they stay for a while."""
        now = time.monotonic()
        self._read |= dict.fromkeys(versions, now)
        self._read = {key: at for key, at in self._read.items() if now - at < READ_SECONDS}

    async def retire(self, run_id: int) -> bool:
        """Delete what the run's retention does not keep, unless it is pinned, in use or may yet be the best.

        Returns:
            Whether something stays only because it was read a moment ago.
        """
        now = time.monotonic()
        read = {number for (of, number), at in self._read.items() if of == run_id and now - at < READ_SECONDS}
        spared: set[int] = set()

        def work(c: Connection) -> set[bytes]:
            run = run_queries.run_by_id(c, run_id)
            kept = run_queries.list_versions(c, run_id)
            wanted = {v.number for v in kept[-run.parsed.retention.keep_versions :]} | {run.best_version}
            wanted |= {v.number for v in kept if v.pinned} | task_queries.versions_in_use(c, run_id)
            if run.state in run_queries.LIVE_STATES:
                wanted |= set(task_queries.versions_in_evaluation(c, run_id))
            dropped: set[bytes] = set()
            for v in kept:
                if v.number in read - wanted:
                    spared.add(v.number)
                elif v.number not in wanted:
                    run_queries.save_version(c, run_id, v.number, kept=False)
                    dropped |= model_queries.drop_refs(c, version_owner(run_id, v.number))
            return dropped

        async with self.blobs_lock:
            dropped = await self._db.run(work)
            reach("versions.retired")
            await self._collect(dropped)
        return bool(spared)

    async def pin(self, name: str) -> VersionRow:
        """Keep a version, "RUN@VERSION", whatever the run's retention says.

        Raises:
            FedlinkError: MODEL_NOT_FOUND, naming the versions that are kept.
        """
        _check_version_name(name)

        def work(c: Connection) -> VersionRow:
            version = _version_named(c, name, kept=True)
            run_queries.save_version(c, version.run_id, version.number, pinned=True)
            return replace(version, pinned=True)

        return await self._db.run(work)

    @whole
    async def unpin(self, name: str) -> VersionRow:
        """Leave a version, "RUN@VERSION", to the run's retention, which may delete it at once.

        Raises:
            FedlinkError: MODEL_NOT_FOUND if there never was such a version, naming those that are kept.
        """
        _check_version_name(name)

        def work(c: Connection) -> VersionRow:
            version = _version_named(c, name, kept=False)
            run_queries.save_version(c, version.run_id, version.number, pinned=False)
            return version

        version = await self._db.run(work)
        if version.pinned:
            await self.retire(version.run_id)
        return await self._db.run(lambda c: _version_named(c, name, kept=False))

    async def _collect(self, digests: Collection[bytes]) -> None:
        """Delete those of these blobs that nobody needs; `blobs_lock` is held."""
        garbage = set(digests) - await self._db.run(lambda c: model_queries.needed_of(c, digests))

        def work() -> None:
            for digest in garbage:
                self._store.delete(digest)

        await asyncio.to_thread(work)

    async def forget_uploads(self, uploads: Iterable[UploadRow]) -> None:
        """Delete the bytes of uploads whose rows are gone."""
        ids = [u.id for u in uploads]

        def work() -> None:
            for upload_id in ids:
                self._spool.delete(upload_id)

        await asyncio.to_thread(work)

    async def find(self, name: str) -> tuple[str, BlobRef, VersionRow | ModelRow]:
        """A model by "NAME", "RUN@VERSION" or "RUN" (its newest version).

        Returns:
            The full name, the manifest and the row.

        Raises:
            FedlinkError: MODEL_NOT_FOUND, naming what there is instead.
        """

        def work(c: Connection) -> tuple[str, ModelRow | VersionRow]:
            if "@" not in name and (row := model_queries.model(c, name)):
                return name, row
            version = _version_named(c, name, kept=True)
            return f"{name.partition('@')[0]}@{version.number}", version

        full_name, found = await self._db.run(work)
        return full_name, found.manifest, found


def _check_version_name(name: str) -> None:
    # "the newest version" is another one a moment later, and an imported model is kept anyway.
    if "@" not in name:
        raise FedlinkError(Reason.MODEL_NOT_FOUND, f"{name!r} names no version; only RUN@VERSION is pinned")


def _version_named(c: Connection, name: str, *, kept: bool) -> VersionRow:
    """The version of "RUN@VERSION", or the newest one of "RUN"; only one whose files are here if it has to be `kept`.

    Raises:
        FedlinkError: MODEL_NOT_FOUND, naming the versions that are kept.
    """
    run_name, at, number = name.partition("@")
    if at and not (number.isascii() and number.isdigit() and len(number) < 10):
        raise FedlinkError(Reason.MODEL_NOT_FOUND, f"{name!r} is not MODEL, RUN or RUN@VERSION")
    run = run_queries.run_by_name(c, run_name)
    if run is None:
        raise FedlinkError(Reason.MODEL_NOT_FOUND, f"there is no model or run {run_name!r}; see `fedserver model list`")
    version = run_queries.version(c, run.id, int(number) if at else run.version)
    if version is None or (kept and not version.kept):
        there = ", ".join(f"{run_name}@{v.number}" for v in run_queries.list_versions(c, run.id))
        raise FedlinkError(Reason.MODEL_NOT_FOUND, f"{name!r} is not kept; there is {there}")
    return version


def _linked(path: Path, link: Path) -> Path:
    """A second name for a file; where the file system has none, the file itself."""
    try:
        link.hardlink_to(path)
    except OSError as e:
        if e.errno not in _NO_LINKS:
            raise
        return path
    return link


def _record_model(c: Connection, name: str, ref: BlobRef, manifest: Manifest, uploads: Iterable[UploadRow]) -> ModelRow:
    """The transaction that makes uploads a model."""
    task_queries.delete_uploads(c, [u.id for u in uploads])
    if (found := _same_model(c, name, ref)) is not None:
        return found
    model_queries.insert_model(
        c,
        name=name,
        digest=ref.digest,
        manifest_size=ref.size,
        size=manifest.total_size,
        tensors=len(manifest.tensors),
        created=time.time(),
    )
    model_queries.add_refs(c, f"model:{name}", [ref.digest, *(f.blob.digest for f in manifest.everything)])
    row = model_queries.model(c, name)
    assert row is not None
    return row


def _same_model(c: Connection, name: str, ref: BlobRef) -> ModelRow | None:
    """The model that an import made before, if its name is not free.

    Raises:
        FedlinkError: MODEL_EXISTS.
    """
    model = model_queries.model(c, name)
    if model is not None and model.digest == ref.digest:
        return model
    if model is not None or run_queries.run_by_name(c, name) is not None:
        raise FedlinkError(Reason.MODEL_EXISTS, f"there is a model or run named {name!r} already; choose another name")
    return None
