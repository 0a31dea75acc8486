"""The transfer machines against a server that everything happens to, one thing after another."""

from __future__ import annotations

import random

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedlink.blobs import CHUNK_SIZE, MAX_STREAM_BYTES, BlobRef
from fedlink.errors import FedlinkError, Reason
from fedlink.transfer import (
    AWAY_CAP,
    MAX_CORRUPT,
    MAX_RETRY_AFTER,
    Action,
    Done,
    Download,
    Event,
    Failed,
    Fetch,
    Fetched,
    GiveUp,
    Retry,
    Send,
    Start,
    Started,
    Upload,
    Wait,
    Waited,
    Written,
)
from tests.support.effort import effort

MIB = CHUNK_SIZE
FATAL = [r for r in Reason if not r.retryable] + [Reason.SESSION_UNKNOWN] * 10
CURABLE = [r for r in Reason if r.retryable and r not in (Reason.SESSION_UNKNOWN, Reason.CHUNK_CORRUPT)]

sizes = st.integers(0, 3 * MAX_STREAM_BYTES) | st.integers(0, 6).map(lambda n: n * MAX_STREAM_BYTES // 2)
retries = st.builds(Retry, base=st.just(0.25), cap=st.sampled_from([1.0, 15.0]), limit=st.none() | st.integers(1, 8))


def error(reason: Reason, retry_after: float | None = None) -> FedlinkError:
    return FedlinkError(reason, "said so", retry_after=retry_after)


class Dice(random.Random):
    """Remembers its last number."""

    last = 0.0

    def random(self) -> float:
        self.last = super().random()
        return self.last


class Transfer(RuleBasedStateMachine):
    """What both directions share: the action that is due, and the failures since bytes last moved."""

    state: Upload | Download
    action: Action

    def __init__(self) -> None:
        super().__init__()
        self.dice = Dice(1)

    def fresh(self, state: Upload | Download) -> None:
        """A transfer begins."""
        self.failures = self.corrupt = 0
        self.sent = self.lost = 0
        self.state, self.action = state.begin()

    @property
    def over(self) -> bool:
        return isinstance(self.action, Done | GiveUp)

    def answer(self, event: Event, *, moved: bool = False, failed: FedlinkError | None = None) -> None:
        """Report an event, and look at what the machine makes of it.

        Args:
            event: what is reported.
            moved: whether it shows that bytes have moved.
            failed: the failure that it is.
        """
        if moved:
            self.failures = self.corrupt = 0
        before = self.state
        self.state, self.action = self.state.after(event, self.dice)
        if failed is None:
            assert not isinstance(self.action, GiveUp)
            return
        fatal = failed.reason in FATAL
        if not fatal:
            self.failures += 1
            self.corrupt += failed.reason is Reason.CHUNK_CORRUPT
        limit = before.retry.limit
        if fatal or (limit is not None and self.failures >= limit) or self.corrupt >= MAX_CORRUPT:
            assert isinstance(self.action, GiveUp)
            damaged = not fatal and self.corrupt >= MAX_CORRUPT
            reason = Reason.BLOB_CORRUPT if damaged else failed.reason
            assert self.action.error.reason is reason
            # Without a limit it ends only for what no repeat can cure.
            assert limit is not None or not reason.retryable or reason is Reason.SESSION_UNKNOWN
            return
        assert isinstance(self.action, Wait)
        self.look_at_wait(before.retry, failed, self.action.seconds)

    def look_at_wait(self, retry: Retry, failed: FedlinkError, seconds: float) -> None:
        """Full jitter under a bound that doubles with every failure; what the server asks for is the least."""
        asked = failed.retry_after
        if asked is None:
            cap = min(retry.cap, AWAY_CAP) if failed.reason is Reason.UNREACHABLE else retry.cap
            assert seconds == self.dice.last * min(cap, retry.base * 2.0 ** (self.failures - 1))
        else:
            least = min(max(asked, 0.0), MAX_RETRY_AFTER)
            assert least <= seconds <= 1.5 * MAX_RETRY_AFTER
            assert seconds == least * (1 + self.dice.last / 2)

    @precondition(lambda self: isinstance(self.action, Wait))
    @rule()
    def wait(self) -> None:
        self.answer(Waited())


class Uploads(Transfer):
    """A server that keeps whole chunks, and has every fault there is."""

    @initialize(size=sizes, retry=retries)
    def first(self, size: int, retry: Retry) -> None:
        self.begin(size, retry)

    @precondition(lambda self: self.over)
    @rule(size=sizes, retry=retries)
    def another(self, size: int, retry: Retry) -> None:
        self.begin(size, retry)

    def begin(self, size: int, retry: Retry) -> None:
        self.size = size
        self.upload_id = b"1"
        self.committed = 0
        self.told = 0  # where the machine was last told to go on
        self.asked = False  # whether that is the answer to its last call
        self.fresh(Upload(BlobRef(bytes(32), size), retry))

    def teardown(self) -> None:
        """From here on all is well, and the way to the end is short."""
        if not hasattr(self, "action"):
            return  # a failure before the first transfer
        for _ in range(4 + 2 * (self.size // MAX_STREAM_BYTES + 1)):
            if self.over:
                break
            self.wait() if isinstance(self.action, Wait) else self.works()
        assert self.over
        self.what_is_done_is_there()

    # --- The server

    def say(self, event: Started | Written) -> None:
        moved = event.committed > self.told and event.committed <= self.size
        self.told = event.committed
        self.asked = True
        self.answer(event, moved=moved)
        if event.complete:
            assert isinstance(self.action, Done)

    def fail(self, failure: FedlinkError, *, as_if: FedlinkError | None = None) -> None:
        self.asked = False
        self.answer(Failed(failure), failed=as_if or failure)

    def take(self, share: float = 1.0) -> bool:
        """Receive a share of what is sent; False if the call is refused first."""
        action = self.action
        assert isinstance(action, Send)
        assert self.asked, "it sends without knowing where to go on"
        assert action.start == self.told
        assert action.start <= action.stop <= min(self.size, action.start + MAX_STREAM_BYTES)
        assert action.stop > action.start or self.size == 0
        if action.upload_id != self.upload_id:
            self.fail(error(Reason.UPLOAD_NOT_FOUND), as_if=error(Reason.UNKNOWN))
            return False
        if action.start != self.committed:
            self.fail(error(Reason.OFFSET_MISMATCH))
            return False
        arrived = action.start + int((action.stop - action.start) * share)
        kept = arrived if arrived == self.size else arrived - arrived % MIB
        self.sent += arrived - action.start
        self.lost += arrived - kept
        self.committed = kept
        return True

    def lose(self, committed: int) -> None:
        self.lost += self.committed - committed
        self.committed = committed

    @property
    def complete(self) -> bool:
        return self.committed == self.size

    @precondition(lambda self: isinstance(self.action, Start | Send))
    @rule()
    def works(self) -> None:
        if isinstance(self.action, Start):
            self.say(Started(self.upload_id, self.committed, self.complete))
        elif self.take():
            self.say(Written(self.committed, self.complete))

    @precondition(lambda self: isinstance(self.action, Start | Send))
    @rule(share=st.floats(0, 1))
    def connection_breaks(self, share: float) -> None:
        """After some bytes; what arrived is there, and nobody was told."""
        if isinstance(self.action, Start) or self.take(share):
            self.fail(error(Reason.UNREACHABLE))

    @precondition(lambda self: isinstance(self.action, Start | Send))
    @rule(share=st.floats(0, 1))
    def stream_ends_early(self, share: float) -> None:
        """The server drains: it answers in the middle of the stream."""
        if isinstance(self.action, Start):
            self.fail(error(Reason.DRAINING))
        elif self.take(share):
            if self.complete or self.committed > self.told:
                self.say(Written(self.committed, self.complete))
            else:
                self.asked = False
                self.answer(Written(self.committed, complete=False), failed=error(Reason.UNKNOWN))

    @precondition(lambda self: isinstance(self.action, Send))
    @rule(share=st.floats(0, 1))
    def chunk_arrives_damaged(self, share: float) -> None:
        if self.take(share):
            self.fail(error(Reason.CHUNK_CORRUPT))

    @precondition(lambda self: isinstance(self.action, Start | Send))
    @rule()
    def disk_is_damaged(self) -> None:
        """The same bytes, again and again; the file that they come from is not what it was."""
        for _ in range(3 * MAX_CORRUPT):
            if isinstance(self.action, Send):
                self.chunk_arrives_damaged(0.0)
            elif not self.over:
                self.wait() if isinstance(self.action, Wait) else self.works()

    @precondition(lambda self: isinstance(self.action, Send))
    @rule(back=st.integers(0, 3))
    def says_it_kept_less(self, back: int) -> None:
        """A repeat, or a lie: no progress, so it must not be hammered."""
        committed = max(0, self.told - back * MIB)
        if committed != self.size:
            self.asked = False
            self.answer(Written(committed, complete=False), failed=error(Reason.UNKNOWN))

    @precondition(lambda self: isinstance(self.action, Start))
    @rule(committed=st.integers(1, MIB - 1) | st.integers(1, 100).map(lambda n: -n))
    def says_what_cannot_be(self, committed: int) -> None:
        wrong = self.size - committed if committed < 0 else committed
        if wrong != self.size:
            self.asked = False
            self.answer(Started(self.upload_id, wrong, complete=False), failed=error(Reason.UNKNOWN))

    @precondition(lambda self: not self.over)
    @rule(chunks=st.integers(0, 200))
    def power_is_lost(self, chunks: int) -> None:
        self.lose(min(self.committed, chunks * MIB))

    @precondition(lambda self: not self.over)
    @rule()
    def upload_is_forgotten(self) -> None:
        self.upload_id += b"1"
        self.lose(0)

    @precondition(lambda self: not self.over)
    @rule(n=st.integers(1, 200))
    def another_process_sends_too(self, n: int) -> None:
        """A half-open connection of before; the bytes are the same."""
        more = min(self.size, self.committed + n * MIB) - self.committed
        self.committed += more
        self.sent += more

    @precondition(lambda self: isinstance(self.action, Start | Send))
    @rule(reason=st.sampled_from(CURABLE), after=st.none() | st.floats(-1, 1e9))
    def refuses_for_now(self, reason: Reason, after: float | None) -> None:
        self.fail(error(reason, after))

    @precondition(lambda self: isinstance(self.action, Start | Send))
    @rule(reason=st.sampled_from(FATAL), sure=st.sampled_from([False] * 9 + [True]))
    def refuses_for_good(self, reason: Reason, sure: bool) -> None:
        if sure and reason is not Reason.UPLOAD_NOT_FOUND:
            self.fail(error(reason))

    # --- What must hold

    @invariant()
    def nothing_is_sent_twice(self) -> None:
        """Every byte that was sent is there, or was lost by the server or on the way."""
        assert self.sent == self.committed + self.lost

    @invariant()
    def what_is_done_is_there(self) -> None:
        if isinstance(self.action, Done):
            assert self.committed == self.size == self.state.committed


class Downloads(Transfer):
    """A server with a blob, a line that breaks, and a disk that keeps verified chunks."""

    @initialize(size=sizes, retry=retries, share=st.floats(0, 1), known=st.booleans())
    def first(self, size: int, retry: Retry, share: float, known: bool) -> None:
        self.begin(size, retry, share, known)

    @precondition(lambda self: self.over)
    @rule(size=sizes, retry=retries, share=st.floats(0, 1), known=st.booleans())
    def another(self, size: int, retry: Retry, share: float, known: bool) -> None:
        self.begin(size, retry, share, known)

    def begin(self, size: int, retry: Retry, share: float, known: bool) -> None:
        self.size = size
        self.has_list = known
        self.verified = int(size * share) // MIB * MIB if known else 0
        self.before = self.verified
        self.fresh(Download(BlobRef(bytes(32), size), retry, self.verified, self.has_list))

    def teardown(self) -> None:
        if not hasattr(self, "action"):
            return  # a failure before the first transfer
        for _ in range(4 + self.size // MAX_STREAM_BYTES):
            if self.over:
                break
            self.wait() if isinstance(self.action, Wait) else self.comes()
        assert self.over
        self.what_is_done_is_there()

    def take(self, share: float, failed: FedlinkError | None = None, *, damaged: bool = False) -> None:
        """Receive a share of what was asked for; only whole chunks that match the list are kept."""
        action = self.action
        assert isinstance(action, Fetch)
        assert action.start == self.verified, "it asks for what it has, or leaves a gap"
        assert action.stop == min(self.size, action.start + MAX_STREAM_BYTES)
        assert action.with_list is not self.has_list
        arrived = action.start + int((action.stop - action.start) * share)
        kept = arrived if arrived == self.size and not damaged else arrived - arrived % MIB
        self.sent += arrived - action.start
        self.lost += arrived - kept
        moved = kept > self.verified or not self.has_list
        self.verified, self.has_list = kept, True
        complete = kept == self.size
        self.answer(Fetched(kept, has_list=True, error=failed), moved=moved, failed=None if complete else failed)

    def stay(self, failed: FedlinkError, *, as_if: FedlinkError | None = None) -> None:
        """Get nothing but an error."""
        done = self.has_list and self.verified == self.size
        event = Fetched(self.verified, has_list=self.has_list, error=failed)
        self.answer(event, failed=None if done else as_if or failed)

    @precondition(lambda self: isinstance(self.action, Fetch))
    @rule()
    def comes(self) -> None:
        self.take(1.0)

    @precondition(lambda self: isinstance(self.action, Fetch))
    @rule(share=st.floats(0, 1), reason=st.sampled_from([Reason.UNREACHABLE, Reason.DRAINING]))
    def breaks(self, share: float, reason: Reason) -> None:
        self.take(share, error(reason))

    @precondition(lambda self: isinstance(self.action, Fetch))
    @rule(share=st.floats(0, 1))
    def arrives_damaged(self, share: float) -> None:
        self.take(share, error(Reason.CHUNK_CORRUPT), damaged=True)

    @precondition(lambda self: isinstance(self.action, Fetch))
    @rule(other=st.booleans())
    def stays_damaged(self, other: bool) -> None:
        """The same bytes, again and again; or something else lies under the blob's name."""
        for _ in range(2 * MAX_CORRUPT):
            if isinstance(self.action, Fetch):
                self.refuses_for_now(Reason.OFFSET_MISMATCH, None) if other else self.arrives_damaged(0.0)
            elif not self.over:
                self.wait()

    @precondition(lambda self: isinstance(self.action, Fetch))
    @rule()
    def ends_empty(self) -> None:
        """A stream that ends well and brought nothing is a failure, too."""
        if self.size and self.has_list:
            self.answer(Fetched(self.verified, has_list=True), failed=error(Reason.UNKNOWN))

    @precondition(lambda self: isinstance(self.action, Fetch))
    @rule(reason=st.sampled_from(CURABLE), after=st.none() | st.floats(-1, 1e9))
    def refuses_for_now(self, reason: Reason, after: float | None) -> None:
        if reason is Reason.OFFSET_MISMATCH:
            # Something else is there under the blob's name; that counts as damage.
            self.stay(error(reason), as_if=error(Reason.CHUNK_CORRUPT))
        else:
            self.stay(error(reason, after))

    @precondition(lambda self: isinstance(self.action, Fetch))
    @rule(reason=st.sampled_from(FATAL), sure=st.sampled_from([False] * 9 + [True]))
    def refuses_for_good(self, reason: Reason, sure: bool) -> None:
        if sure:
            self.stay(error(reason))

    @invariant()
    def nothing_is_fetched_twice(self) -> None:
        assert self.sent == self.verified - self.before + self.lost

    @invariant()
    def what_is_done_is_there(self) -> None:
        if isinstance(self.action, Done):
            assert (self.verified, self.has_list) == (self.size, True)
            assert (self.state.verified, self.state.has_list) == (self.size, True)


TestUploads = Uploads.TestCase
TestUploads.settings = effort(150, 40)
TestDownloads = Downloads.TestCase
TestDownloads.settings = effort(100, 30)
