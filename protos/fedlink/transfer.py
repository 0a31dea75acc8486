"""Moving one blob, as machines without I/O: what to do next, given what has just happened.

    state, action = state.begin()
    while not isinstance(action, Done | GiveUp):
        event = <carry out the action>
        state, action = state.after(event, rng)

`Upload` and `Download` are frozen; `after` gives the next state and the next action.
They know neither clock nor socket: a Wait is an action, jitter comes from the `rng`
handed in, and the binding (`fedlink.bulk`) reports a call in which nothing moved for
too long as UNREACHABLE, like a connection that broke. Resume and retry live here, once:

* after any failed upload call the server is asked where to go on (StartUpload); its answer
  is believed, even if it lies before what it said earlier (it may have lost power);
* bytes that move clear the record of failures, so a transfer that advances never gives up;
* without progress the waits grow (full jitter), for ever unless `Retry.limit` is set;
* a refusal that no repeat can cure ends it at once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from fedlink.blobs import CHUNK_SIZE, MAX_STREAM_BYTES, BlobRef
from fedlink.errors import FedlinkError, Reason

MAX_RETRY_AFTER = 300.0
"""Seconds a server may ask for at most; more is cut."""
AWAY_CAP = 2.0
"""Seconds; the longest wait while a server cannot be reached. Asking costs it nothing: gRPC answers here, and tries to
connect at its own pace."""
STALL = 60.0
"""Seconds in which at least one chunk must move, or the call is taken for broken; also what a unary call may take."""
MAX_CORRUPT = 5
"""Times in a row that the same bytes may arrive damaged before the blob counts as corrupt."""


@dataclass(frozen=True, slots=True)
class TaskPurpose:
    """A blob is sent as part of a task's result."""

    token: bytes


@dataclass(frozen=True, slots=True)
class ImportPurpose:
    """A blob is sent as part of an operator's import."""

    id: bytes
    """16 bytes the importer chose; the same ones go on with an interrupted import."""


Purpose = TaskPurpose | ImportPurpose
"""Why a blob is sent; what a caller may do follows from it."""


@dataclass(frozen=True, slots=True)
class Retry:
    """How long to wait after failures in a row, and after how many to give up."""

    base: float = 0.25
    """Seconds; the longest first wait. It doubles with every failure."""
    cap: float = 15.0
    """Seconds; no wait is longer, unless the server asks for it; `AWAY_CAP` holds for one that cannot be reached."""
    limit: int | None = None
    """Failures in a row without progress after which to give up; None goes on for ever."""

    def delay(self, failures: int, rng: random.Random, retry_after: float | None = None) -> float:
        """Seconds to wait after the `failures`-th failure in a row (from 1).

        Full jitter: anything from 0 to the bound, so that many clients do not come back together. If the server
        said when to come back, it is at least that, and up to half as much again.
        """
        if retry_after is not None:
            return min(max(retry_after, 0.0), MAX_RETRY_AFTER) * (1.0 + rng.random() / 2)
        return rng.random() * min(self.cap, self.base * 2.0 ** min(failures - 1, 60))

    def wait(self, error: FedlinkError, failures: int, rng: random.Random) -> float:
        """Seconds to wait after the `failures`-th failure in a row, which was this one."""
        away = error.reason is Reason.UNREACHABLE
        retry = replace(self, cap=min(self.cap, AWAY_CAP)) if away else self
        return retry.delay(failures, rng, error.retry_after)


FOREVER = Retry()
"""Go on until it works or is refused: what a daemon does."""


# What the binding is asked to do


@dataclass(frozen=True, slots=True)
class Start:
    """Call StartUpload; answer with Started or Failed."""


@dataclass(frozen=True, slots=True)
class Send:
    """Call WriteBlob with the bytes [start, stop); answer with Written or Failed."""

    upload_id: bytes
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Call ReadBlob for the bytes [start, stop), with the chunk list if there is none yet; answer with Fetched."""

    start: int
    stop: int
    with_list: bool
    verify: bool = False
    """Have the server look whether the damage that came is its own."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Let so many seconds pass; answer with Waited."""

    seconds: float
    because: FedlinkError
    """What went wrong, for the log."""


@dataclass(frozen=True, slots=True)
class Done:
    """Every byte is where it should be."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The transfer has failed for good."""

    error: FedlinkError


Action = Start | Send | Fetch | Wait | Done | GiveUp
"""What to do next."""


# What the binding reports


@dataclass(frozen=True, slots=True)
class Started:
    """StartUpload has answered."""

    upload_id: bytes
    committed: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Written:
    """WriteBlob has answered."""

    committed: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Fetched:
    """A ReadBlob stream is over, for whatever reason."""

    verified: int
    """Bytes on the disk from 0 on that match the chunk list."""
    has_list: bool
    """Whether the chunk list, checked against the digest, is there."""
    error: FedlinkError | None = None
    """Why the stream ended, if not as it should."""


@dataclass(frozen=True, slots=True)
class Failed:
    """StartUpload or WriteBlob has failed, or nothing moved for too long."""

    error: FedlinkError


@dataclass(frozen=True, slots=True)
class Waited:
    """The time is over."""


Event = Started | Written | Fetched | Failed | Waited
"""What has happened."""


@dataclass(frozen=True, slots=True)
class Failures:
    """Failures in a row: how many, and how many of them damaged bytes."""

    count: int = 0
    corrupt: int = 0

    def after(self, error: FedlinkError, retry: Retry, rng: random.Random) -> tuple[Failures, Wait | GiveUp]:
        """Count one more: when to try again, or that it is over."""
        if not error.reason.retryable or error.reason is Reason.SESSION_UNKNOWN:
            return self, GiveUp(error)
        damaged = error.reason is Reason.CHUNK_CORRUPT
        record = Failures(self.count + 1, self.corrupt + damaged)
        if record.corrupt >= MAX_CORRUPT:
            text = f"The same bytes came damaged {MAX_CORRUPT} times ({error.message}); check the file they come from."
            return record, GiveUp(FedlinkError(Reason.BLOB_CORRUPT, text, metadata=error.metadata))
        if retry.limit is not None and record.count >= retry.limit:
            return record, GiveUp(error)
        return record, Wait(retry.wait(error, record.count, rng), error)


@dataclass(frozen=True, slots=True)
class Upload:
    """Sending one blob."""

    ref: BlobRef
    retry: Retry = FOREVER
    upload_id: bytes = b""
    committed: int = 0
    """Where the server said to go on, last."""
    failures: Failures = Failures()

    def begin(self) -> tuple[Upload, Action]:
        """The first action."""
        return self, Start()

    def after(self, event: Event, rng: random.Random) -> tuple[Upload, Action]:
        """The next state and action."""
        match event:
            case Started(upload_id, committed, complete):
                return _started(replace(self, upload_id=upload_id), committed, rng, complete=complete)
            case Written(committed, complete):
                if complete or committed > self.committed:
                    return _started(self, committed, rng, complete=complete)
                text = f"The server took bytes of blob {self.ref} and did not keep them."
                return _not_sent(self, FedlinkError(Reason.UNKNOWN, text), rng)
            case Failed(error):
                return _not_sent(self, error, rng)
            case Waited():
                return self, Start()
            case Fetched():
                raise TypeError(f"an upload has no {event}")


def _started(state: Upload, committed: int, rng: random.Random, *, complete: bool) -> tuple[Upload, Action]:
    size = state.ref.size
    if complete:
        return replace(state, committed=size), Done()
    if committed > size or (committed % CHUNK_SIZE and committed != size):
        text = f"The server says that {committed} bytes of blob {state.ref} are there, which cannot be."
        return _not_sent(state, FedlinkError(Reason.UNKNOWN, text), rng)
    failures = Failures() if committed > state.committed else state.failures
    stop = min(size, committed + MAX_STREAM_BYTES)
    return replace(state, committed=committed, failures=failures), Send(state.upload_id, committed, stop)


def _not_sent(state: Upload, error: FedlinkError, rng: random.Random) -> tuple[Upload, Action]:
    if error.reason is Reason.UPLOAD_NOT_FOUND:
        # The server may have let an idle upload go; StartUpload opens it anew or says that it is not wanted.
        error = FedlinkError(Reason.UNKNOWN, error.message)
    failures, action = state.failures.after(error, state.retry, rng)
    return replace(state, failures=failures), action


@dataclass(frozen=True, slots=True)
class Download:
    """Fetching one blob."""

    ref: BlobRef
    retry: Retry = FOREVER
    verified: int = 0
    """Bytes from 0 on that are on the disk and match the list."""
    has_list: bool = False
    failures: Failures = Failures()

    def begin(self) -> tuple[Download, Action]:
        """The first action."""
        return self, _fetch(self)

    def after(self, event: Event, rng: random.Random) -> tuple[Download, Action]:
        """The next state and action."""
        match event:
            case Fetched(verified, has_list, error):
                moved = verified > self.verified or (has_list and not self.has_list)
                failures = Failures() if moved else self.failures
                state = replace(self, verified=verified, has_list=has_list, failures=failures)
                action = _fetch(state)
                if isinstance(action, Done) or (moved and error is None):
                    return state, action
                return _not_fetched(state, error or FedlinkError(Reason.UNKNOWN, "The stream ended empty."), rng)
            case Waited():
                return self, _fetch(self)
            case Started() | Written() | Failed():
                raise TypeError(f"a download has no {event}")


def _fetch(state: Download) -> Fetch | Done:
    if state.has_list and state.verified == state.ref.size:
        return Done()
    stop = min(state.ref.size, state.verified + MAX_STREAM_BYTES)
    return Fetch(state.verified, stop, with_list=not state.has_list, verify=state.failures.corrupt > 0)


def _not_fetched(state: Download, error: FedlinkError, rng: random.Random) -> tuple[Download, Action]:
    if error.reason is Reason.OFFSET_MISMATCH:
        # The range was cut from the size in the reference, so the server holds something else under this name.
        error = FedlinkError(Reason.CHUNK_CORRUPT, error.message, metadata=error.metadata)
    failures, action = state.failures.after(error, state.retry, rng)
    return replace(state, failures=failures), action
