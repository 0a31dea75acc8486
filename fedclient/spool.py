"""What the daemon keeps on disk so that a kill at any instant loses no work.

    state_dir/lock                         held while a daemon runs
    state_dir/journal/TOKEN.json           one `Held` task each, replaced atomically
    state_dir/tasks/TOKEN/                 its model directory and its update, until it is over
    state_dir/checkpoints/RUN@WORKLOAD/    what a training goes on from, until its update is whole
    state_dir/cache/DIGEST                 downloaded blobs, least recently used first out
    state_dir/recycled/                    files that are over, for a while, to be written over

A task is FETCHED until its update is whole, TRAINED until the server gave its verdict,
COMPLETED until the server says that the round is over. An update is not synced at once: it
survives the end of every process, and its entry says under which boot of the machine it was
written; after a power loss it counts as not made. Everything here blocks; the daemon calls
it in threads.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from fedlink import log
from fedlink.blobs import DIGEST_SIZE, MAX_BLOB_SIZE, BlobRef
from fedlink.config import Config, Name
from fedlink.errors import FedlinkError, Reason
from fedlink.failpoints import reach
from fedlink.files import boot_id, make_directory, sync
from fedlink.lock import holder, take
from fedlink.recycle import Recycler
from fedlink.run_file import MAX_JSON_BYTES
from fedlink.tensors import Kind
from fedlink.work import WorkLimits

MAX_TOKEN_SIZE = 64
"""Bytes in the longest task token."""
MAX_CACHED_FILES = 1000
"""Files in the cache that are not needed now; tiny models would make them countless under any limit of bytes."""

CHECKPOINT_WAITS = 86400.0
"""Seconds that the checkpoint of a failed training waits for the server to give the training once more."""

DISK_REFUSES = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS))
"""What a disk says that is full or cannot be written now."""

_DIGEST_CHARS = 2 * DIGEST_SIZE


class _Kept(Config):
    model_config = ConfigDict(ser_json_bytes="hex", val_json_bytes="hex")


class Order(_Kept):
    """A task as the server wrote it; see `fedlink.v1.Task`."""

    token: bytes = Field(min_length=1, max_length=MAX_TOKEN_SIZE)
    run: Name
    round: int = Field(ge=0)
    attempt: int = Field(ge=0)
    workload: Name
    version: int = Field(ge=0)
    model_digest: bytes = Field(min_length=DIGEST_SIZE, max_length=DIGEST_SIZE)
    model_size: int = Field(ge=0, le=MAX_BLOB_SIZE)
    settings_json: str = Field(max_length=MAX_JSON_BYTES)
    seed: int = Field(ge=0)
    rounds: int = Field(0, ge=0)
    """Rounds of the whole run; 0: not known."""
    update: Kind | None = None
    """What a training task sends: DELTA or GRADIENT. None: the task is an evaluation."""
    update_dtype: str = ""
    max_update_bytes: int = Field(0, ge=0)
    work: WorkLimits = WorkLimits()
    """What the run asks of this site."""
    calibrate: tuple[str, ...] = Field((), max_length=64)
    """The settings to measure; with some, the task is nothing else."""

    @property
    def model(self) -> BlobRef:
        """The manifest of the model to start from."""
        return BlobRef(self.model_digest, self.model_size)

    @property
    def activity(self) -> str:
        """What it is, in a word: train, evaluate or calibrate."""
        if self.calibrate:
            return "calibrate"
        return "evaluate" if self.update is None else "train"

    @property
    def checkpoint(self) -> str:
        """What the directory of its checkpoint is called: one for each run and workload, whatever the token."""
        return f"{self.run}@{self.workload}"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.update is Kind.MODEL or (self.update is None) != (not self.update_dtype):
            raise ValueError("the task asks for an update that is none")
        if self.calibrate and self.update is not None:
            raise ValueError("the task asks for two things at once")
        return self


class Outcome(_Kept):
    """What the trainer gave for a task."""

    num_examples: int = Field(ge=0, le=1 << 53)
    steps: int = Field(ge=0)
    metrics: Mapping[str, float]
    """Those the site lets out."""
    compute_seconds: float = Field(ge=0)
    files: tuple[str, ...] = ()
    """Names of the update's shards in the task's `update` directory, in canonical order."""
    examples_seen: int = Field(0, ge=0, le=1 << 53)
    """Examples that its steps used; 0: not known."""
    cut: str = Field("", max_length=32)
    """Which limit ended it early."""

    @field_validator("files")
    @classmethod
    def _plain_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any("/" in name or name.startswith(".") for name in value):
            raise ValueError("not a file name")
        return value


class Stage(enum.StrEnum):
    """How far a held task is."""

    FETCHED = "fetched"
    TRAINED = "trained"
    COMPLETED = "completed"


class Held(_Kept):
    """One journal entry: a task the daemon keeps anything of."""

    format: Literal[1] = 1
    order: Order
    outcome: Outcome | None = None
    """Set from TRAINED on."""
    boot: str = ""
    """The boot of the machine under which the result was written; empty once it has been synced."""
    completed: bool = False
    retryable: bool = False
    """It failed, and the server may give the same work again: its checkpoint is kept."""

    @property
    def token(self) -> bytes:
        """The task's token."""
        return self.order.token

    @property
    def stage(self) -> Stage:
        """How far it is."""
        if self.completed:
            return Stage.COMPLETED
        return Stage.TRAINED if self.outcome else Stage.FETCHED

    @property
    def unsure(self) -> bool:
        """Whether it may have to be trained yet, if only after a power loss."""
        return self.stage is Stage.FETCHED or (self.stage is Stage.TRAINED and bool(self.boot))

    def trained(self, outcome: Outcome, boot: str = "") -> Held:
        """The entry once its result is written."""
        return self.model_copy(update={"outcome": outcome, "boot": boot})

    def secured(self) -> Held:
        """The entry once its result has been synced."""
        return self.model_copy(update={"boot": ""})

    def accepted(self) -> Held:
        """The entry once the server counts its result."""
        return self.model_copy(update={"completed": True})


def in_use(state_dir: Path) -> bool:
    """Whether a daemon holds a state directory."""
    return holder(state_dir / "lock") is not None


class Spool:
    """The state directory: its lock, the journal and the directories of tasks.

    Args:
        root: made if missing, readable for its owner only.

    Attributes:
        recycler: gets the files of updates that are over.

    Raises:
        FedlinkError: FAILED: another daemon uses it; BAD_CONFIG: it cannot be made.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._journal, self._tasks, self._checkpoints = root / "journal", root / "tasks", root / "checkpoints"
        self._held: dict[bytes, Held] = {}
        try:
            for directory in (root, self._journal, self._tasks, self._checkpoints):
                make_directory(directory, 0o700)
            self._lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise FedlinkError(Reason.BAD_CONFIG, f"state_dir {root} cannot be used: {e.strerror}") from None
        if not take(self._lock):
            os.close(self._lock)
            raise FedlinkError(
                Reason.FAILED, f"another fedclient runs with state_dir {root}: stop it, or give this site its own"
            )
        self.recycler = Recycler(root / "recycled")

    def close(self) -> None:
        """Release the lock."""
        self.recycler.clear()
        os.close(self._lock)

    def load(self) -> list[Held]:
        """Every held task, the oldest first; removes what belongs to none.

        A result that a power loss may have taken counts as not made; one that the server has accepted is dropped, for
        the server gives the task again if it needs it.
        """
        held, logger, boot = list[Held](), log.get("spool"), boot_id()
        for path in sorted(self._journal.iterdir(), key=lambda p: p.stat().st_mtime_ns):
            if path.suffix == ".json":
                try:
                    found = Held.model_validate_json(path.read_bytes())
                    if found.boot in ("", boot):
                        held.append(found)
                        continue
                    logger.warning("the machine went down before a result was synced", task=found.token.hex()[:8])
                    if not found.completed:
                        held.append(found.model_copy(update={"outcome": None, "boot": ""}))
                        continue
                except ValidationError as e:
                    logger.warning(
                        "dropped a journal entry that cannot be read", file=path.name, errors=e.error_count()
                    )
            path.unlink()
        known = {h.token.hex() for h in held}
        for directory in self._tasks.iterdir():
            if directory.name not in known:
                shutil.rmtree(directory)
        self._held = {h.token: h for h in held}
        self._drop_checkpoints(waits=CHECKPOINT_WAITS)
        return held

    def put(self, held: Held) -> None:
        """Write a journal entry; it survives a power loss once this returns.

        Once no task would go on from a checkpoint any more, also after a power loss, the checkpoint is deleted.
        """
        path = self._journal / f"{held.token.hex()}.json"
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as f:
            f.write(held.model_dump_json().encode())
            f.flush()
            os.fsync(f.fileno())
        reach(f"journal.{held.stage}")
        temporary.replace(path)
        sync(self._journal)
        self._held[held.token] = held
        if held.stage is Stage.FETCHED:
            self._drop_checkpoints(waits=CHECKPOINT_WAITS)
        elif not held.unsure:
            self._drop_checkpoint(held)

    def drop(self, token: bytes, *, keep_checkpoint: bool = False) -> None:
        """Forget a task and delete its files.

        Args:
            token: the task's.
            keep_checkpoint: the server may give the same work again, under another token.

        Raises:
            OSError: the disk refuses.
        """
        (self._journal / f"{token.hex()}.json").unlink(missing_ok=True)
        reach("task.dropped")
        update_dir = self.update_dir(token)
        with contextlib.suppress(OSError):
            for path in update_dir.iterdir():
                self.recycler.give(path)
        shutil.rmtree(self._tasks / token.hex(), ignore_errors=True)
        held = self._held.pop(token, None)
        # One whose result is safe has none any more: what is there is a later round's, for its next attempt.
        if held and held.unsure and not keep_checkpoint:
            self._drop_checkpoint(held)

    def prepare_update(self, token: bytes, files: Mapping[str, int]) -> None:
        """Make the directory for an update, in place of whatever was there.

        Args:
            token: the task's.
            files: names and sizes of what will be written: where there is an old file for one, it is written over.
        """
        update_dir = fresh_directory(self.update_dir(token))
        for name, size in files.items():
            self.recycler.take(update_dir / name, size)

    def keep_files(self, token: bytes) -> None:
        """Make what the directories of a task hold survive a power loss."""
        task = self._tasks / token.hex()
        for directory in (self.model_dir(token), self.update_dir(token)):
            sync_files(directory.iterdir())
        sync(task)
        sync(self._tasks)

    def model_dir(self, token: bytes) -> Path:
        """Where the trainer finds the model of a task."""
        return self._tasks / token.hex() / "model"

    def update_dir(self, token: bytes) -> Path:
        """Where the trainer writes the update of a task."""
        return self._tasks / token.hex() / "update"

    def checkpoint_dir(self, order: Order) -> Path:
        """Where the trainer keeps the checkpoint of a training task, and finds that of an earlier attempt."""
        return self._checkpoints / order.checkpoint

    def _needed_checkpoints(self) -> set[str]:
        return {h.order.checkpoint for h in self._held.values() if h.unsure and h.order.update}

    def _drop_checkpoint(self, held: Held) -> None:
        if held.order.update and held.order.checkpoint not in self._needed_checkpoints():
            shutil.rmtree(self._checkpoints / held.order.checkpoint, ignore_errors=True)

    def _drop_checkpoints(self, waits: float) -> None:
        """Delete what no held task goes on from, and what is older than an attempt may be waited for."""
        needed, oldest = self._needed_checkpoints(), time.time() - waits
        for directory in self._checkpoints.iterdir():
            if directory.name not in needed and directory.stat().st_mtime <= oldest:
                shutil.rmtree(directory, ignore_errors=True)


class BlobCache:
    """Downloaded blobs under a limit.

    What a held task needs is pinned and stays, even over the limit; the rest goes, least
    recently used first. Pins belong to the event loop; only one thread at a time may call the rest.

    Attributes:
        recycler: gets the files of blobs that nothing will ask for again, if there is one.
    """

    def __init__(self, root: Path, limit: int, recycler: Recycler | None = None) -> None:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.recycler = recycler
        self._root, self._limit = root, limit
        self._pins: dict[bytes, frozenset[bytes]] = {}

    def path(self, digest: bytes) -> Path:
        """Where a blob is, or would be."""
        return self._root / digest.hex()

    def pin(self, owner: bytes, digests: Iterable[bytes]) -> None:
        """Keep these blobs until `unpin(owner)`, in place of those the owner pinned before."""
        self._pins[owner] = frozenset(digests)

    def unpin(self, owner: bytes) -> None:
        """Let an owner's blobs go when room is needed."""
        self._pins.pop(owner, None)

    def touch(self, digest: bytes) -> bool:
        """Mark a blob as just used; False if it is not here."""
        try:
            os.utime(self.path(digest))
        except FileNotFoundError:
            return False
        return True

    def pinned(self) -> frozenset[bytes]:
        """What must stay now."""
        return frozenset[bytes]().union(*self._pins.values())

    def drop(self, digests: Iterable[bytes]) -> None:
        """Delete blobs that nothing will ask for again."""
        for digest in digests:
            with contextlib.suppress(FileNotFoundError):
                if self.recycler:
                    self.recycler.give(self.path(digest))
                else:
                    self.path(digest).unlink()

    def trim(self, pinned: frozenset[bytes], incoming: int = 0) -> None:
        """Delete what is least recently used, and not pinned, until `incoming` more bytes fit under the limit.

        Never more than `MAX_CACHED_FILES` stay, either.
        """
        kept = {digest.hex() for digest in pinned}
        entries = sorted(self._entries(), key=lambda e: e[1].st_mtime_ns)
        excess = sum(stat.st_size for _, stat in entries) + incoming - self._limit
        too_many = len(entries) - MAX_CACHED_FILES
        for path, stat in entries:
            if excess <= 0 and too_many <= 0:
                return
            if path.name[:_DIGEST_CHARS] not in kept:
                path.unlink()
                excess -= stat.st_size
                too_many -= 1

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self._root.iterdir():
            with contextlib.suppress(FileNotFoundError):
                yield path, path.stat()


def fresh_directory(path: Path) -> Path:
    """Make an empty directory, in place of whatever was there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700, parents=True)
    return path


def refuses(directory: Path, size: int) -> str:
    """Why the disk does not take a file of so many bytes into a directory, which is emptied; "" if it does. Blocks."""
    probe = directory / "room"
    try:
        fresh_directory(directory)
        try:
            with probe.open("wb") as f:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(f.fileno(), 0, min(max(size, 1), MAX_BLOB_SIZE))
                elif shutil.disk_usage(directory).free < size:
                    return os.strerror(errno.ENOSPC)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as e:
        return str(e.strerror) if e.errno in DISK_REFUSES else ""
    return ""


def sync_files(paths: Iterable[Path]) -> None:
    """Make files, and their directories' knowledge of them, survive a power loss."""
    directories = set()
    for path in paths:
        sync(path)
        directories.add(path.parent)
    for directory in directories:
        sync(directory)
