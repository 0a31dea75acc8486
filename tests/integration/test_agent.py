"""The daemon against a server on a real socket, with a real trainer process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fedclient.agent import Agent
from fedlink.errors import FedlinkError, Reason
from fedlink.v1 import coordination_service_pb2 as pb
from fedlink.v1 import types_pb2 as types_pb
from tests.support.fake_server import FakeServer
from tests.support.site import Site, add_model, evaluate_task, journal, killed, running, train_task, values


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer() as running:
        yield running


@pytest.fixture
def site(tmp_path: Path, server: FakeServer) -> Site:
    return Site(tmp_path / "site", server.address)


def task_dirs(site: Site) -> list[str]:
    return [p.name for p in (site.directory / "fedclient-state" / "tasks").iterdir()]


async def test_trains_and_evaluates(server: FakeServer, site: Site, tmp_path: Path) -> None:
    model = add_model(server, tmp_path / "model", start=1.0)
    async with running(site):
        token = await server.give(train_task(model, settings_json='{"amount": 0.25, "steps": 3}', rounds=9))
        await server.until(lambda s: s.completed)
        await server.give(evaluate_task(model))
        await server.until(lambda s: len(s.completed) == 2)
    trained, evaluated = server.state.completed
    assert (trained.token, trained.num_examples, trained.steps) == (token, 7, 3)
    assert values(server, trained) == {"w": [0.75] * 4, "b": [0.75] * 2}
    assert dict(trained.metrics) == {"loss": 0.5}  # "secret" stays
    assert [line.split()[3] for line in site.trained] == ["9"]
    assert evaluated.num_examples == 5
    assert dict(evaluated.metrics) == {"accuracy": 1.0}
    assert not evaluated.HasField("update")
    registered = server.state.registrations[0]
    assert [o.name for o in registered.workloads] == ["adder"]
    assert set(registered.workloads[0].abilities) == {"train", "evaluate"}
    assert [d.name for d in registered.devices] == ["cpu"]
    assert server.state.deregistered == 1
    # The accepted update stays until the round is over; the evaluation leaves nothing.
    assert [j["order"]["token"] for j in journal(site)] == [token.hex()] == task_dirs(site)
    assert all(m["fedlink-client"] == "site" for m in server.state.metadata)


async def test_released_tasks_are_deleted_and_the_model_is_not_fetched_twice(
    server: FakeServer, site: Site, tmp_path: Path
) -> None:
    model = add_model(server, tmp_path / "model")
    async with running(site):
        first = await server.give(train_task(model))
        await server.until(lambda s: s.completed)
        reads = len(server.state.read)
        async with server.state.changed:
            server.state.released.add(first)
            server.state.changed.notify_all()
        await server.until(lambda s: s.polls[-1] == ())
        await server.give(train_task(model, round=2))
        await server.until(lambda s: len(s.completed) == 2)
        assert first.hex() not in task_dirs(site)
    assert len(server.state.read) == reads == 3
    assert len({line.split()[2] for line in site.trained}) == 1  # one warm process


async def test_refusals_of_the_site(server: FakeServer, tmp_path: Path) -> None:
    limits = 'runs = ["r*"]\n[workload.adder.limits]\namount = { max = 2.0 }\n'
    site = Site(tmp_path / "site", server.address, workload=limits)
    model = add_model(server, tmp_path / "model")
    wrong = [
        train_task(model, run="other"),
        train_task(model, workload="unheard-of"),
        train_task(model, settings_json='{"amount": 3.0}'),
        train_task(model, settings_json='{"steps": 4.0}'),
        train_task(model, settings_json='{"path": "/etc/passwd"}'),
        train_task(model, settings_json="nonsense"),
        train_task(model, update=types_pb.Manifest.KIND_GRADIENT),
        train_task(model, update=types_pb.Manifest.KIND_MODEL),
    ]
    async with running(site):
        for task in wrong:
            await server.give(task)
        await server.until(lambda s: len(s.failed) == len(wrong))
    failed = {f.token: f for f in server.state.failed}
    assert all(failed[t.token].reason == pb.FailTaskRequest.REASON_NOT_ALLOWED for t in wrong)
    assert not any(failed[t.token].retryable for t in wrong)
    words = [failed[t.token].message for t in wrong]
    for word, text in zip(
        ["run other", "unheard-of", "maximum", "integer", "path", "JSON", "gradient", ""], words, strict=True
    ):
        assert word in text
    assert site.trained == []
    assert journal(site) == []
    schema = json.loads(server.state.registrations[0].workloads[0].settings_schema_json)
    assert schema["properties"]["amount"]["maximum"] == 2
    assert list(server.state.registrations[0].workloads[0].allowed_runs) == ["r*"]


@pytest.mark.parametrize("share", [False, True])
async def test_failures_are_reported_without_output(server: FakeServer, tmp_path: Path, share: bool) -> None:
    site = Site(tmp_path / "site", server.address, workload=f"share_errors = {str(share).lower()}")
    model = add_model(server, tmp_path / "model")
    async with running(site):
        site.set("raise")
        await server.give(train_task(model))
        await server.until(lambda s: s.failed)
        site.clear("raise")
        site.set("crash")
        await server.give(train_task(model))
        await server.until(lambda s: len(s.failed) == 2)
        site.clear("crash")
        await server.give(train_task(model))
        await server.until(lambda s: s.completed)
    raised, crashed = server.state.failed
    assert raised.reason == pb.FailTaskRequest.REASON_EXCEPTION
    assert raised.exception_class == "LookupError"
    assert ("patient 17" in raised.message) == share
    assert crashed.reason == pb.FailTaskRequest.REASON_CRASHED
    assert (crashed.exit_code, crashed.retryable) == (3, True)


async def test_killed_in_training_trains_again(server: FakeServer, site: Site, tmp_path: Path) -> None:
    model = add_model(server, tmp_path / "model")
    site.set("hold")
    async with killed(site):
        token = await server.give(train_task(model))
        await server.until(lambda _: site.trained)
    assert [j["order"]["token"] for j in journal(site)] == [token.hex()]
    site.clear("hold")
    async with running(site):
        await server.until(lambda s: s.completed)
    assert server.state.polls[-1] == (token,)
    assert len(site.trained) == 2
    assert values(server, server.state.completed[0])["b"] == [2.0, 2.0]


async def test_killed_in_upload_goes_on_from_the_committed_offset(server: FakeServer, tmp_path: Path) -> None:
    size = 3 << 20  # 12 MiB of update
    site = Site(tmp_path / "site", server.address, size=size)
    model = add_model(server, tmp_path / "model", size=size)
    server.state.write_delay = 0.2
    async with killed(site):
        token = await server.give(train_task(model))
        await server.until(lambda s: s.received > 4 << 20)
    assert not server.state.completed
    server.state.write_delay = 0.0
    async with running(site):
        await server.until(lambda s: s.completed)
    assert len(site.trained) == 1
    assert server.state.completed[0].token == token
    assert set(values(server, server.state.completed[0])["w"]) == {2.0}
    assert server.state.received < size * 4 + (2 << 20)  # nothing that was acknowledged came again


async def test_cancelled_and_closed_tasks_are_dropped(server: FakeServer, site: Site, tmp_path: Path) -> None:
    server.state.lease_term = 0.6
    model = add_model(server, tmp_path / "model")
    async with running(site):
        site.set("hold")
        first = await server.give(train_task(model))
        await server.until(lambda _: site.trained)
        server.state.cancelled.add(first)
        second = await server.give(train_task(model))
        await server.until(lambda _: len(site.trained) == 2)
        server.state.over[first] = Reason.ROUND_CLOSED
        server.state.over[second] = Reason.ROUND_CLOSED
        third = await server.give(train_task(model))
        await server.until(lambda _: len(site.trained) == 3)
        site.clear("hold")
        await server.until(lambda s: s.completed)
    assert [c.token for c in server.state.completed] == [third]
    assert server.state.failed == []
    assert task_dirs(site) == [third.hex()]
    assert len({line.split()[2] for line in site.trained}) == 1  # the process stayed warm
    beats = [b for b in server.state.beats if b.token == first]
    assert beats[-1].activity == pb.ExtendLeaseRequest.ACTIVITY_COMPUTING


async def test_round_closed_on_upload(
    server: FakeServer, site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = add_model(server, tmp_path / "model")
    server.state.faults["StartUpload"].append(FedlinkError(Reason.ROUND_CLOSED, "too late"))
    async with running(site):
        await server.give(train_task(model))
        await server.until(lambda s: not s.faults["StartUpload"])
        server.state.tasks.clear()
        await server.until(lambda _: not journal(site))
    assert server.state.completed == []
    [said] = [line for line in capsys.readouterr().out.splitlines() if "dropped a task that is over" in line]
    assert "reason='too late'" in said


async def test_verdicts(server: FakeServer, site: Site, tmp_path: Path) -> None:
    model = add_model(server, tmp_path / "model")
    outcomes = pb.CompleteTaskResponse
    server.state.verdicts.extend(
        [
            outcomes(outcome=outcomes.OUTCOME_CHECKING),
            outcomes(outcome=outcomes.OUTCOME_CHECKING),
            outcomes(outcome=outcomes.OUTCOME_REFUSED, reason="NOT_FINITE", tensor="w", message="w holds NaN"),
        ]
    )
    async with running(site):
        await server.give(train_task(model))
        await server.until(lambda s: len(s.completed) == 3)
        await server.until(lambda _: not journal(site))
    assert task_dirs(site) == []


async def test_an_update_over_the_limit_is_said_before_it_moves(server: FakeServer, site: Site, tmp_path: Path) -> None:
    model = add_model(server, tmp_path / "model")
    async with running(site):
        await server.give(train_task(model, max_update_bytes=10))
        await server.until(lambda s: s.failed)
    assert server.state.received == 0
    assert "10" in server.state.failed[0].message
    assert not server.state.failed[0].retryable


@pytest.mark.parametrize("reason", [Reason.SESSION_REPLACED, Reason.BAD_CREDENTIALS, Reason.CLIENT_TOO_OLD])
async def test_a_server_that_wants_us_no_more_ends_the_daemon(server: FakeServer, site: Site, reason: Reason) -> None:
    server.state.faults["PollTask"].append(FedlinkError(reason, "go away"))
    with pytest.raises(FedlinkError, match="go away") as e:
        await asyncio.wait_for(Agent(site.settings).run(), 20)
    assert e.value.reason is reason
    assert e.value.reason.exit_code == 4


async def test_one_daemon_for_a_state_directory(server: FakeServer, site: Site) -> None:
    async with running(site):
        await server.until(lambda s: s.polls)
        with pytest.raises(FedlinkError, match="another fedclient"):
            await Agent(site.settings).run()


async def test_a_class_that_cannot_be_used_is_said_at_the_start(server: FakeServer, site: Site) -> None:
    (site.directory / "adder.py").write_text("import does_not_exist\n")
    with pytest.raises(FedlinkError, match=r"adder.*does_not_exist") as e:
        await Agent(site.settings).run()
    assert e.value.reason is Reason.BAD_CONFIG
    assert server.state.registrations == []


async def test_a_limit_on_nothing_is_said_at_the_start(server: FakeServer, tmp_path: Path) -> None:
    site = Site(tmp_path / "site", server.address, workload="[workload.adder.limits]\nlearning_rat = { max = 1 }\n")
    with pytest.raises(FedlinkError, match="learning_rat"):
        await Agent(site.settings).run()


async def test_a_limit_that_excludes_the_default_makes_the_setting_required(server: FakeServer, tmp_path: Path) -> None:
    site = Site(tmp_path / "site", server.address, workload="[workload.adder.limits]\namount = { max = 0.5 }\n")
    model = add_model(server, tmp_path / "model")
    async with running(site):
        await server.give(train_task(model))
        await server.until(lambda s: s.failed)
        await server.give(train_task(model, settings_json='{"amount": 0.5}'))
        await server.until(lambda s: s.completed)
    assert "amount: missing" in server.state.failed[0].message


async def test_a_torn_cache_is_fetched_again(server: FakeServer, site: Site, tmp_path: Path) -> None:
    model = add_model(server, tmp_path / "model")
    async with running(site):
        await server.give(evaluate_task(model))
        await server.until(lambda s: s.completed)
    reads = len(server.state.read)
    cache = site.directory / "fedclient-state" / "cache"
    torn = next(p for p in cache.iterdir() if p.name == server.state.read[-1].hex())
    torn.write_bytes(bytes(torn.stat().st_size))
    async with running(site):
        await server.give(evaluate_task(model))
        await server.until(lambda s: len(s.completed) == 2)
    assert server.state.read[reads:] == [server.state.read[reads - 1]]


async def test_the_cache_obeys_its_limit(server: FakeServer, tmp_path: Path) -> None:
    site = Site(tmp_path / "site", server.address, size=1000, extra='cache_limit = "10KB"')
    cache = site.directory / "fedclient-state" / "cache"
    async with running(site):
        for n in range(5):
            model = add_model(server, tmp_path / f"model{n}", size=1000, start=n)
            await server.give(evaluate_task(model, version=n))
            await server.until(lambda s, n=n: len(s.completed) == n + 1)
            assert sum(p.stat().st_size for p in cache.iterdir()) <= 10_000
    assert [c.metrics["accuracy"] for c in server.state.completed] == [0, 1, 2, 3, 4]


async def test_older_versions_of_a_run_leave_the_cache(server: FakeServer, site: Site, tmp_path: Path) -> None:
    cache = site.directory / "fedclient-state" / "cache"
    async with running(site):
        for n in range(6):
            model = add_model(server, tmp_path / f"model{n}", start=n)
            await server.give(evaluate_task(model, version=n))
            await server.until(lambda s, n=n: len(s.completed) == n + 1)
    # A manifest and a shard each, of the newest version and at most of the one before it.
    assert 2 <= len([p for p in cache.iterdir() if p.suffix == ""]) <= 4


async def test_a_hostile_model_fails_the_task_only(server: FakeServer, site: Site, tmp_path: Path) -> None:
    good = add_model(server, tmp_path / "model")
    bad = [
        types_pb.BlobRef(digest=good.digest, size=1 << 40),
        types_pb.BlobRef(digest=b"short", size=10),
        server.add_blob(b"no manifest"),
        types_pb.BlobRef(digest=bytes(32), size=100),
    ]
    async with running(site):
        for ref in bad:
            await server.give(train_task(ref))
        await server.until(lambda s: len(s.failed) == len(bad))
        await server.give(train_task(good))
        await server.until(lambda s: s.completed)


async def test_metrics_are_reported_while_training(server: FakeServer, site: Site, tmp_path: Path) -> None:
    server.state.lease_term = 0.6
    model = add_model(server, tmp_path / "model")
    async with running(site):
        await server.give(train_task(model, settings_json='{"steps": 100000000}'))
        await server.until(lambda s: s.points)
        server.state.cancelled.add(server.state.points[0].token)
        await server.until(lambda s: not journal(site))
    assert {p.name for r in server.state.points for p in r.points} == {"loss"}
    assert any(b.total == 100_000_000 and b.done > 0 for b in server.state.beats)


async def test_a_device_for_each_task_and_the_rest_queue(server: FakeServer, tmp_path: Path) -> None:
    site = Site(tmp_path / "site", server.address)
    text = site.config.read_text()
    model = add_model(server, tmp_path / "model")
    site.config.write_text(text.replace('["cpu"]', '["cpu", "auto"]'))
    site.set("hold")
    async with killed(site):
        for n in range(3):
            await server.give(train_task(model, round=n))
        await server.until(lambda _: len(site.trained) == 2)
        await asyncio.sleep(0.3)
        assert len(server.state.given) == 2  # the third waits at the server
    # Held tasks come first, even if the site has fewer devices now.
    site.config.write_text(text)
    site.clear("hold")
    async with running(site):
        await server.until(lambda s: len(s.completed) == 3)
    assert [line.split()[1] for line in site.trained[2:]] == ["0", "1", "2"]


async def test_workloads_have_a_process_each(server: FakeServer, tmp_path: Path) -> None:
    other = '[workload.other]\ntrainer = "adder:Adder"\ndata = { control = "control" }\n'
    site = Site(tmp_path / "site", server.address, extra=other)
    model = add_model(server, tmp_path / "model")
    async with running(site):
        for n, workload in enumerate(["adder", "other", "adder"]):
            await server.give(train_task(model, workload=workload, round=n))
            await server.until(lambda s, n=n: len(s.completed) == n + 1)
    processes = [line.split()[2] for line in site.trained]
    assert processes[0] == processes[2] != processes[1]
    assert [o.name for o in server.state.registrations[0].workloads] == ["adder", "other"]
