"""The journal and the cache."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedclient import spool as spool_module
from fedclient.spool import MAX_CACHED_FILES, BlobCache, Held, Outcome, Spool, Stage, in_use
from fedlink.errors import FedlinkError
from fedlink.tensors import Kind
from tests.support.orders import order

OUTCOME = Outcome(num_examples=7, steps=3, metrics={"loss": 0.1}, compute_seconds=1.5, files=("update.safetensors",))


def test_a_task_survives_every_stage(tmp_path: Path) -> None:
    held = Held(order=order(b"\x00\xff"))
    for stage in (held, held.trained(OUTCOME), held.trained(OUTCOME).accepted()):
        spool = Spool(tmp_path)
        spool.put(stage)
        spool.update_dir(stage.token).mkdir(parents=True, exist_ok=True)
        spool.close()
        again = Spool(tmp_path)
        assert again.load() == [stage]
        assert again.update_dir(stage.token).exists()
        again.close()
    assert [s.stage for s in (held, held.trained(OUTCOME))] == [Stage.FETCHED, Stage.TRAINED]


def test_what_belongs_to_no_task_is_removed(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.put(Held(order=order(b"good")))
    journal = tmp_path / "journal"
    (journal / "half.tmp").write_text('{"format": 1')
    (journal / "torn.json").write_text('{"format": 1')
    (journal / "future.json").write_text('{"format": 2}')
    spool.model_dir(b"good").mkdir(parents=True)
    spool.model_dir(b"lost").mkdir(parents=True)
    assert [h.token for h in spool.load()] == [b"good"]
    assert [p.name for p in journal.iterdir()] == [f"{b'good'.hex()}.json"]
    assert [p.name for p in (tmp_path / "tasks").iterdir()] == [b"good".hex()]


def test_dropping_twice_is_fine(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.put(Held(order=order()))
    spool.model_dir(b"token").mkdir(parents=True)
    for _ in range(2):
        spool.drop(b"token")
        assert spool.load() == []
    assert list((tmp_path / "tasks").iterdir()) == []


def checkpoints(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints").iterdir())


def write_checkpoint(spool: Spool, held: Held) -> None:
    spool.checkpoint_dir(held.order).mkdir(exist_ok=True)
    (spool.checkpoint_dir(held.order) / "checkpoint.safetensors").write_text("x")


def test_a_checkpoint_belongs_to_the_work_and_not_to_the_token(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    first, second = (Held(order=order(token)) for token in (b"first", b"second"))
    assert spool.checkpoint_dir(first.order) == spool.checkpoint_dir(second.order)
    spool.put(first)
    write_checkpoint(spool, first)
    spool.drop(b"first", keep_checkpoint=True)
    assert checkpoints(tmp_path) == ["r1@heart"]
    spool.put(second)
    assert checkpoints(tmp_path) == ["r1@heart"]
    spool.drop(b"first")
    spool.put(second.trained(OUTCOME))
    assert checkpoints(tmp_path) == []


def test_a_checkpoint_stays_while_a_task_would_go_on_from_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    old, new, evaluation = (
        Held(order=order(b"old")),
        Held(order=order(b"new")),
        Held(order=order(b"e", update=None, update_dtype="")),
    )
    for held in (old, new, evaluation):
        spool.put(held)
    write_checkpoint(spool, new)
    spool.drop(b"e")
    spool.drop(b"old")
    assert checkpoints(tmp_path) == ["r1@heart"]
    spool.drop(b"new")
    assert checkpoints(tmp_path) == []


def test_at_the_start_checkpoints_wait_for_another_attempt_but_not_for_ever(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    fetched, failed, older = (Held(order=order(run.encode(), run=run)) for run in ("fetched", "failed", "older"))
    for held in (fetched, failed, older):
        spool.put(held)
        write_checkpoint(spool, held)
    for held in (failed, older):
        spool.drop(held.token, keep_checkpoint=True)
    for held in (fetched, older):
        os.utime(spool.checkpoint_dir(held.order), times=(1e9, 1e9))
    spool.close()
    again = Spool(tmp_path)
    again.load()
    assert checkpoints(tmp_path) == ["failed@heart", "fetched@heart"]


def test_an_update_that_is_over_takes_no_later_checkpoint_along(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    late, failed = Held(order=order(b"late", round=1)), Held(order=order(b"failed", round=2))
    spool.put(late.trained(OUTCOME))
    spool.put(failed)
    write_checkpoint(spool, failed)
    spool.drop(b"failed", keep_checkpoint=True)
    spool.drop(b"late")
    assert checkpoints(tmp_path) == ["r1@heart"]


def test_a_checkpoint_does_not_wait_for_another_attempt_for_ever(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    failed = Held(order=order(b"failed", run="failed"))
    spool.put(failed)
    write_checkpoint(spool, failed)
    spool.drop(b"failed", keep_checkpoint=True)
    spool.put(Held(order=order(b"other")))
    assert checkpoints(tmp_path) == ["failed@heart"]
    os.utime(tmp_path / "checkpoints" / "failed@heart", times=(1e9, 1e9))
    spool.put(Held(order=order(b"another")))
    assert checkpoints(tmp_path) == []


def test_one_daemon_at_a_time(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    with pytest.raises(FedlinkError, match="another fedclient"):
        Spool(tmp_path)
    spool.close()
    Spool(tmp_path).close()


def test_a_state_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FedlinkError, match="state_dir"):
        Spool(tmp_path / "file" / "state")


@pytest.mark.parametrize(
    "fields",
    [
        {"token": b""},
        {"token": b"x" * 65},
        {"run": "../etc"},
        {"workload": ""},
        {"model_digest": b"short"},
        {"model_size": 1 << 40},
        {"update": Kind.MODEL},
        {"update": None},
        {"update": Kind.DELTA, "update_dtype": ""},
    ],
)
def test_orders_that_break_the_protocol(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        order(**fields)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", ".hidden", "a/b"])
def test_results_cannot_name_other_directories(name: str) -> None:
    with pytest.raises(ValidationError):
        Outcome(num_examples=1, steps=1, metrics={}, compute_seconds=0, files=(name,))


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_cache_keeps_its_limit_and_its_pins(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    cache = BlobCache(tmp_path_factory.mktemp("cache"), limit=100)
    clock = 0
    pins: dict[bytes, frozenset[bytes]] = {}
    used: list[bytes] = []
    for _ in range(data.draw(st.integers(1, 15))):
        digest = bytes([data.draw(st.integers(0, 5))]) * 32
        match data.draw(st.sampled_from(["put", "pin", "unpin", "trim"])):
            case "put":
                cache.path(digest).write_bytes(b"x" * 30)
                clock += 1
                os.utime(cache.path(digest), (clock, clock))
                used = [d for d in used if d != digest] + [digest]
            case "pin":
                pins[digest] = frozenset({digest})
                cache.pin(digest, [digest])
            case "unpin":
                pins.pop(digest, None)
                cache.unpin(digest)
            case "trim":
                incoming = data.draw(st.sampled_from([0, 30, 200]))
                kept = frozenset().union(*pins.values())
                assert cache.pinned() == kept
                cache.trim(kept, incoming)
                while len(used) * 30 + incoming > 100 and (old := next((d for d in used if d not in kept), None)):
                    used.remove(old)
        assert {d for d in used if cache.path(d).exists()} == set(used)
        assert sum(1 for _ in cache.path(digest).parent.iterdir()) == len(used)


def test_pieces_of_a_download_belong_to_its_blob(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, limit=0)
    digest = bytes(32)
    part = cache.path(digest).with_name(digest.hex() + ".part")
    part.write_bytes(b"x")
    cache.trim(frozenset({digest}))
    assert part.exists()
    cache.trim(frozenset())
    assert not part.exists()


def test_touch_says_what_is_here(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, limit=10)
    assert not cache.touch(bytes(32))
    cache.path(bytes(32)).touch()
    assert cache.touch(bytes(32))


def test_the_cache_does_not_keep_countless_files(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, limit=1 << 40)
    digests = [n.to_bytes(32, "big") for n in range(MAX_CACHED_FILES + 10)]
    for n, digest in enumerate(digests):
        cache.path(digest).touch()
        os.utime(cache.path(digest), (n, n))
    cache.trim(frozenset(digests[:2]))
    assert [d for d in digests if not cache.path(d).exists()] == digests[2:12]


def test_a_look_at_the_lock_keeps_no_daemon_from_starting(tmp_path: Path) -> None:
    Spool(tmp_path).close()
    lock = os.open(tmp_path / "lock", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    timer = threading.Timer(0.05, os.close, [lock])
    timer.start()
    spool = Spool(tmp_path)
    timer.join()
    assert in_use(tmp_path)
    with pytest.raises(FedlinkError, match="another fedclient runs"):
        Spool(tmp_path)
    spool.close()
    assert not in_use(tmp_path)


def test_what_a_power_loss_may_have_taken_counts_as_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boot = "first"
    monkeypatch.setattr(spool_module, "boot_id", lambda: boot)
    spool = Spool(tmp_path)
    trained, accepted, secured = (Held(order=order(bytes([n]))) for n in range(3))
    for held in (trained, accepted, secured):
        spool.prepare_update(held.token, {})
    spool.checkpoint_dir(trained.order).mkdir()
    spool.put(trained.trained(OUTCOME, boot))
    spool.put(accepted.trained(OUTCOME, boot).accepted())
    spool.put(secured.trained(OUTCOME, boot).secured())
    spool.close()
    again = Spool(tmp_path)
    assert [h.stage for h in again.load()] == [Stage.TRAINED, Stage.COMPLETED, Stage.TRAINED]
    # It may be needed after all.
    assert again.checkpoint_dir(trained.order).exists()
    again.close()
    boot = "second"
    after = Spool(tmp_path)
    assert [(h.token, h.stage) for h in after.load()] == [
        (trained.token, Stage.FETCHED),
        (secured.token, Stage.TRAINED),
    ]
    assert after.checkpoint_dir(trained.order).exists()
    assert not after.update_dir(accepted.token).exists()
    after.close()
