"""The transfer machines against servers that a random program drives."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlink.blobs import CHUNK_SIZE, MAX_STREAM_BYTES, BlobRef
from fedlink.errors import FedlinkError, Reason
from fedlink.transfer import (
    MAX_CORRUPT,
    MAX_RETRY_AFTER,
    Done,
    Download,
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

MIB = CHUNK_SIZE
RNG = random.Random(0)
CURABLE = [
    Reason.UNREACHABLE,
    Reason.BUSY,
    Reason.DISK_FULL,
    Reason.DISK_UNWRITABLE,
    Reason.DRAINING,
    Reason.INTERNAL,
    Reason.UNKNOWN,
    Reason.UPLOAD_SUPERSEDED,
    Reason.OFFSET_MISMATCH,
    Reason.UPLOAD_NOT_FOUND,
]
FATAL = [
    Reason.ROUND_CLOSED,
    Reason.TASK_NOT_FOUND,
    Reason.TOO_LARGE,
    Reason.DIGEST_MISMATCH,
    Reason.SESSION_REPLACED,
    Reason.SESSION_UNKNOWN,
    Reason.BAD_CREDENTIALS,
]


def error(reason: Reason, retry_after: float | None = None) -> FedlinkError:
    return FedlinkError(reason, "said so", retry_after=retry_after)


sizes = st.integers(0, 5 * MAX_STREAM_BYTES) | st.integers(0, 6).map(lambda n: n * MAX_STREAM_BYTES // 2)


class ModelServer:
    """Keeps whole chunks of one upload, loses power now and then, and breaks the line as the data says."""

    def __init__(self, size: int, data: st.DataObject) -> None:
        self.size = size
        self.committed = 0
        self.upload_id = b"1"
        self.data = data

    def carry_out(self, action: object) -> object:
        fate = self.data.draw(
            st.sampled_from(["works", "works", "works", "breaks", "refuses", "power loss", "forgets"])
        )
        if isinstance(action, Wait):
            return Waited()
        if fate == "refuses":
            return Failed(
                error(self.data.draw(st.sampled_from(CURABLE)), self.data.draw(st.none() | st.floats(0, 1e12)))
            )
        if fate == "power loss":
            self.committed = self.data.draw(st.integers(0, self.committed // MIB)) * MIB
        if fate == "forgets":
            self.upload_id += b"1"
            self.committed = 0
        if isinstance(action, Start):
            return Started(self.upload_id, self.committed, self.committed == self.size)
        assert isinstance(action, Send)
        if action.upload_id != self.upload_id:
            return Failed(error(Reason.UPLOAD_NOT_FOUND))
        if action.start != self.committed:
            return Failed(error(Reason.OFFSET_MISMATCH))
        assert action.start <= action.stop <= self.size
        assert action.stop - action.start <= MAX_STREAM_BYTES
        if fate == "breaks":
            chunks = (action.stop - action.start) // MIB
            self.committed += self.data.draw(st.integers(0, chunks)) * MIB
            return Failed(error(Reason.UNREACHABLE))
        self.committed = action.stop
        return Written(self.committed, self.committed == self.size)


@given(sizes, st.data())
def test_upload_ends_with_everything_there_whatever_breaks(size: int, data: st.DataObject) -> None:
    server = ModelServer(size, data)
    state, action = Upload(BlobRef(bytes(32), size)).begin()
    for _ in range(60):
        if isinstance(action, Done):
            break
        if isinstance(action, Wait):
            assert 0 <= action.seconds <= 1.5 * MAX_RETRY_AFTER
        assert not isinstance(action, GiveUp)
        state, action = state.after(server.carry_out(action), RNG)
    else:
        # From here on the server behaves, and the way to the end is short.
        for _ in range(4 + 2 * (size // MAX_STREAM_BYTES + 1)):
            if isinstance(action, Done):
                break
            state, action = state.after(quiet(server, action), RNG)
    assert isinstance(action, Done)
    assert server.committed == size
    assert state.committed == size


def quiet(server: ModelServer, action: object) -> object:
    match action:
        case Wait():
            return Waited()
        case Start():
            return Started(server.upload_id, server.committed, server.committed == server.size)
        case Send(upload_id, start, stop):
            if upload_id != server.upload_id:
                return Failed(error(Reason.UPLOAD_NOT_FOUND))
            if start != server.committed:
                return Failed(error(Reason.OFFSET_MISMATCH))
            server.committed = stop
            return Written(stop, stop == server.size)
        case _:
            raise AssertionError(action)


@given(sizes, st.data())
def test_download_ends_with_everything_there_whatever_breaks(size: int, data: st.DataObject) -> None:
    have = data.draw(st.integers(0, size // MIB)) * MIB
    state, action = Download(BlobRef(bytes(32), size), verified=have, has_list=have > 0).begin()
    moved = 0
    while not isinstance(action, Done):
        assert not isinstance(action, GiveUp)
        if isinstance(action, Wait):
            state, action = state.after(Waited(), RNG)
            continue
        assert isinstance(action, Fetch)
        assert action.start == state.verified
        assert action.stop == min(size, action.start + MAX_STREAM_BYTES)
        assert action.with_list is not state.has_list
        moved += 1
        fate = data.draw(st.sampled_from(["works", "breaks", "refuses"])) if moved < 30 else "works"
        if fate == "refuses":
            reason = data.draw(st.sampled_from([r for r in CURABLE if r.retryable and r is not Reason.OFFSET_MISMATCH]))
            event = Fetched(state.verified, state.has_list, error(reason))
        elif fate == "breaks":
            chunks = data.draw(st.integers(0, (action.stop - action.start) // MIB))
            event = Fetched(action.start + chunks * MIB, has_list=True, error=error(Reason.UNREACHABLE))
        else:
            event = Fetched(action.stop, has_list=True)
        state, action = state.after(event, RNG)
    assert (state.verified, state.has_list) == (size, True)


@pytest.mark.parametrize("reason", FATAL)
def test_what_no_repeat_can_cure_ends_it(reason: Reason) -> None:
    ref = BlobRef(bytes(32), MIB)
    refusal = error(reason)
    assert Upload(ref).after(Failed(refusal), RNG)[1] == GiveUp(refusal)
    assert Download(ref).after(Fetched(0, has_list=False, error=refusal), RNG)[1] == GiveUp(refusal)


def test_bytes_that_stay_damaged_end_it() -> None:
    state, action = Upload(BlobRef(bytes(32), 2 * MIB)).begin()
    for _ in range(MAX_CORRUPT - 1):
        state, action = state.after(Started(b"1", MIB, complete=False), RNG)
        assert isinstance(action, Send)
        state, action = state.after(Failed(error(Reason.CHUNK_CORRUPT)), RNG)
        assert isinstance(action, Wait)
        state, action = state.after(Waited(), RNG)
    state, action = state.after(Started(b"1", MIB, complete=False), RNG)
    # Another failure in between does not clear the record; only bytes do.
    state, action = state.after(Failed(error(Reason.UNREACHABLE)), RNG)
    assert isinstance(action, Wait)
    moved, action = state.after(Started(b"1", 2 * MIB, complete=False), RNG)
    assert moved.failures.corrupt == 0
    _, action = state.after(Failed(error(Reason.CHUNK_CORRUPT)), RNG)
    assert isinstance(action, GiveUp)
    assert action.error.reason is Reason.BLOB_CORRUPT

    down, step = Download(BlobRef(bytes(32), 2 * MIB)).begin()
    for n in range(MAX_CORRUPT):
        reason = Reason.CHUNK_CORRUPT if n % 2 else Reason.OFFSET_MISMATCH
        down, step = down.after(Fetched(0, has_list=False, error=error(reason)), RNG)
    assert isinstance(step, GiveUp)
    assert step.error.reason is Reason.BLOB_CORRUPT


def test_after_damage_the_server_is_asked_to_look_until_bytes_move() -> None:
    down, step = Download(BlobRef(bytes(32), 2 * MIB)).begin()
    assert step == Fetch(0, 2 * MIB, with_list=True)
    down, _ = down.after(Fetched(0, has_list=True, error=error(Reason.UNREACHABLE)), RNG)
    down, step = down.after(Waited(), RNG)
    assert step == Fetch(0, 2 * MIB, with_list=False)
    down, _ = down.after(Fetched(0, has_list=True, error=error(Reason.CHUNK_CORRUPT)), RNG)
    down, step = down.after(Waited(), RNG)
    assert step == Fetch(0, 2 * MIB, with_list=False, verify=True)
    _, step = down.after(Fetched(MIB, has_list=True), RNG)
    assert step == Fetch(MIB, 2 * MIB, with_list=False)


@pytest.mark.parametrize("committed", [1, MIB + 1, 3 * MIB])
def test_an_offset_that_cannot_be_is_not_believed(committed: int) -> None:
    state = Upload(BlobRef(bytes(32), 2 * MIB))
    assert isinstance(state.after(Started(b"1", committed, complete=False), RNG)[1], Wait)


def test_a_server_that_keeps_nothing_is_not_hammered() -> None:
    state, action = Upload(BlobRef(bytes(32), 2 * MIB), Retry(limit=3)).begin()
    waits = 0
    for _ in range(20):
        match action:
            case Start():
                event: object = Started(b"1", 0, complete=False)
            case Send():
                event = Written(0, complete=False)
            case Wait():
                waits += 1
                event = Waited()
            case _:
                break
        state, action = state.after(event, RNG)
    assert isinstance(action, GiveUp)
    assert waits == 2


def test_the_limit_counts_failures_in_a_row() -> None:
    state = Download(BlobRef(bytes(32), 9 * MIB), Retry(limit=2), has_list=True)
    for n in range(8):
        state, action = state.after(Fetched(n * MIB, has_list=True, error=error(Reason.UNREACHABLE)), RNG)
        assert isinstance(action, Wait)
    state, action = state.after(Fetched(state.verified, has_list=True, error=error(Reason.UNREACHABLE)), RNG)
    assert isinstance(action, GiveUp)


def test_the_wrong_event_is_a_mistake_of_the_binding() -> None:
    ref = BlobRef(bytes(32), 1)
    with pytest.raises(TypeError):
        Upload(ref).after(Fetched(0, has_list=False), RNG)
    with pytest.raises(TypeError):
        Download(ref).after(Failed(error(Reason.UNKNOWN)), RNG)


@given(st.integers(1, 10_000), st.integers())
def test_waits_are_full_jitter_up_to_the_cap(failures: int, seed: int) -> None:
    retry = Retry(base=0.25, cap=15)
    delay = retry.delay(failures, random.Random(seed))
    assert 0 <= delay <= min(15, 0.25 * 2 ** min(failures - 1, 20))
    assert replace(retry, cap=1e-3).delay(failures, random.Random(seed)) <= 1e-3


@given(st.floats(allow_nan=False), st.integers())
def test_the_server_says_when_to_come_back(retry_after: float, seed: int) -> None:
    delay = Retry().delay(1, random.Random(seed), retry_after)
    asked = min(max(retry_after, 0), MAX_RETRY_AFTER)
    assert asked <= delay <= 1.5 * asked
