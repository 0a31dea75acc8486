"""The registry of sites: credentials, sessions, what a registration may hold."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fedlink import MIN_PROTOCOL_VERSION, PROTOCOL_VERSION
from fedlink.errors import FedlinkError, Reason
from fedlink.v1 import coordination_service_pb2 as pb
from fedserver.runtime.sites import SiteRegistry, token_hash
from fedserver.settings import Proof
from fedserver.store.database import Database
from fedserver.store.queries import clients as q

SCHEMA = '{"type": "object", "additionalProperties": false, "properties": {}}'


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    db = Database(f"sqlite:///{tmp_path / 'server.db'}")
    db.open()
    yield db
    db.close()


def registry(database: Database, *, proof: Proof = Proof.NONE, lease_term: float = 30.0) -> SiteRegistry:
    return SiteRegistry(database, lease_term=lease_term, proof=proof, changed=lambda: None)


def hello(instance: bytes | None = None, **values) -> pb.RegisterClientRequest:
    offer = pb.RegisterClientRequest.WorkloadOffer(name="heart", settings_schema_json=SCHEMA, abilities=["train"])
    values = {"protocol_version": PROTOCOL_VERSION, "workloads": [offer], **values}
    return pb.RegisterClientRequest(instance_id=instance or os.urandom(16), **values)


def reason(error: pytest.ExceptionInfo[FedlinkError]) -> Reason:
    return error.value.reason


async def test_the_newest_process_of_a_site_wins_and_the_older_is_told(database: Database) -> None:
    sites = registry(database)
    first = await sites.register("a", hello(b"1" * 16))
    again = await sites.register("a", hello(b"1" * 16))
    assert first == again
    second = await sites.register("a", hello(b"2" * 16))
    assert sites.check_session("a", second).name == "a"
    with pytest.raises(FedlinkError) as e:
        sites.check_session("a", first)
    assert reason(e) is Reason.SESSION_REPLACED
    with pytest.raises(FedlinkError) as e:
        sites.check_session("a", b"")
    assert reason(e) is Reason.SESSION_UNKNOWN


async def test_a_certificate_counts_only_for_a_name_that_an_operator_admitted(database: Database) -> None:
    await registry(database).register("loopback", hello())
    sites = registry(database, proof=Proof.CERTIFICATE)
    await sites.load()
    for name in ("loopback", "nobody"):
        with pytest.raises(FedlinkError, match="is not admitted") as e:
            sites.admit(name)
        assert reason(e) is Reason.BAD_CREDENTIALS
    assert await sites.add("loopback", rotate=False) == ""
    assert sites.admit("loopback") == "loopback"
    with pytest.raises(FedlinkError, match="is here already"):
        await sites.add("loopback", rotate=False)
    await sites.revoke("loopback")
    with pytest.raises(FedlinkError, match="revoked by the server's operator"):
        sites.admit("loopback")
    assert await sites.add("loopback", rotate=True) == ""
    assert sites.admit("loopback") == "loopback"


async def test_two_processes_that_register_at_once_leave_one_session_and_one_replaced(database: Database) -> None:
    sites = registry(database)
    await sites.register("a", hello())
    sessions = await asyncio.gather(*(sites.register("a", hello(bytes([i]) * 16)) for i in range(2)))
    verdicts = []
    for session in sessions:
        try:
            sites.check_session("a", session)
            verdicts.append(None)
        except FedlinkError as e:
            verdicts.append(e.reason)
    assert sorted(map(str, verdicts)) == sorted(map(str, [None, Reason.SESSION_REPLACED]))


async def test_a_late_goodbye_does_not_end_the_session_that_took_over(database: Database) -> None:
    sites = registry(database)
    old = await sites.register("a", hello())
    site = sites.check_session("a", old)
    # The call was let in under the old session, and its turn comes after the new registration.
    await sites.register("a", hello())
    assert not await sites.deregister(site, old)
    assert sites.connected(site)
    assert await sites.deregister(site, site.row.session or b"")
    assert not sites.connected(site)


async def test_a_registration_that_races_a_revocation_does_not_bring_the_site_back(database: Database) -> None:
    sites = registry(database)
    await sites.register("a", hello())
    outcomes = await asyncio.gather(sites.revoke("a"), sites.register("a", hello()), return_exceptions=True)
    assert isinstance(outcomes[1], FedlinkError)
    assert outcomes[1].reason is Reason.BAD_CREDENTIALS
    assert sites.offers() == {}


async def test_tokens(database: Database) -> None:
    sites = registry(database, proof=Proof.TOKEN)
    token = await sites.add("a", rotate=False)
    assert sites.authenticate("a", token) == "a"
    stored = await database.run(lambda c: q.client(c, "a"))
    assert stored is not None
    assert stored.token_hash == token_hash(token)
    assert token.encode() not in stored.token_hash
    for name, wrong in (("a", token + "x"), ("a", None), ("b", token), ("b", None)):
        with pytest.raises(FedlinkError) as e:
            sites.authenticate(name, wrong)
        assert reason(e) is Reason.BAD_CREDENTIALS
    with pytest.raises(FedlinkError) as e:
        await sites.add("a", rotate=False)
    assert reason(e) is Reason.CLIENT_EXISTS
    newer = await sites.add("a", rotate=True)
    with pytest.raises(FedlinkError):
        sites.authenticate("a", token)
    await sites.revoke("a")
    with pytest.raises(FedlinkError):
        sites.authenticate("a", newer)
    with pytest.raises(FedlinkError) as e:
        await sites.revoke("nobody")
    assert reason(e) is Reason.CLIENT_NOT_FOUND


async def test_on_loopback_a_name_is_taken_on_its_word_until_it_has_a_token(database: Database) -> None:
    sites = registry(database)
    assert sites.authenticate("a", None) == "a"
    await sites.add("a", rotate=False)
    with pytest.raises(FedlinkError):
        sites.authenticate("a", None)
    with pytest.raises(FedlinkError) as e:
        sites.authenticate("x" * 10_000, None)
    assert reason(e) is Reason.BAD_NAME
    assert len(e.value.message) < 300


@pytest.mark.parametrize(
    ("version", "expected"),
    [(MIN_PROTOCOL_VERSION - 1, Reason.CLIENT_TOO_OLD), (PROTOCOL_VERSION + 1, Reason.CLIENT_TOO_NEW)],
)
async def test_a_version_that_does_not_fit_is_told_which_side_to_upgrade(
    database: Database, version: int, expected: Reason
) -> None:
    with pytest.raises(FedlinkError, match="upgrade") as e:
        await registry(database).register("a", hello(protocol_version=version))
    assert reason(e) is expected


def _hostile() -> list[pb.RegisterClientRequest]:
    offer = pb.RegisterClientRequest.WorkloadOffer
    full = hello(workloads=[offer(name=f"w{i}", settings_schema_json=SCHEMA + " " * 60_000) for i in range(64)])
    long_device = hello()
    long_device.devices.add(name="cpu", model="x" * 100_000)
    return [
        hello(b"short"),
        full,
        long_device,
        hello(software_version="9" * 1000),
        hello(features=["f"] * 65),
        hello(features=["f" * 1000]),
        hello(workloads=[offer(name="../x", settings_schema_json=SCHEMA)]),
        hello(workloads=[offer(name="w", settings_schema_json="[" * 10_000)]),
        hello(workloads=[offer(name="w", settings_schema_json=SCHEMA)] * 2),
        hello(workloads=[offer(name="w", settings_schema_json=SCHEMA, allowed_runs=["*" * 65])]),
    ]


@pytest.mark.parametrize("request_", _hostile())
async def test_what_a_registration_may_hold_is_bounded(database: Database, request_: pb.RegisterClientRequest) -> None:
    sites = registry(database)
    with pytest.raises(FedlinkError) as e:
        await sites.register("a", request_)
    assert reason(e) is Reason.BAD_REGISTRATION
    assert sites.find("a") is None


async def test_sessions_survive_a_restart(database: Database) -> None:
    session = await registry(database).register("a", hello())
    again = registry(database)
    await again.load()
    site = again.check_session("a", session)
    assert list(site.offers) == ["heart"]


async def test_a_stored_registration_that_is_no_longer_understood_does_not_stop_the_server(database: Database) -> None:
    session = await registry(database).register("a", hello())
    offer = pb.RegisterClientRequest.WorkloadOffer(name="heart", settings_schema_json="{}")
    stored = hello(workloads=[offer]).SerializeToString()
    await database.run(lambda c: q.save_client(c, "a", 0.0, registration=stored))
    again = registry(database)
    await again.load()
    with pytest.raises(FedlinkError) as e:
        again.check_session("a", session)
    assert reason(e) is Reason.SESSION_UNKNOWN
    await again.register("a", hello())
    assert list(again.offers()) == ["a"]


async def test_a_site_is_there_while_it_is_heard_or_polls(database: Database) -> None:
    sites = registry(database, lease_term=0.05)
    session = await sites.register("a", hello())
    site = sites.check_session("a", session)
    assert sites.connected(site)
    await asyncio.sleep(0.1)
    assert not sites.connected(site)
    site.polls += 1
    assert sites.connected(site)


async def test_a_site_that_was_there_when_the_server_stopped_has_a_term_to_come_back(database: Database) -> None:
    before = registry(database)
    sessions = {name: await before.register(name, hello()) for name in ("a", "b", "left", "revoked", "gone")}
    await before.deregister(before.check_session("left", sessions["left"]), sessions["left"])
    await before.revoke("revoked")
    gone = before.check_session("gone", sessions["gone"])
    gone.heard, gone.last_seen = -1e9, gone.last_seen - 1000
    await before.look_round()

    changes: list[None] = []
    again = SiteRegistry(database, lease_term=0.5, proof=Proof.NONE, changed=lambda: changes.append(None))
    await again.load()

    def states() -> dict[str, str]:
        return {
            s.name: "connected" if again.connected(s) else "returning" if again.returning(s) else "away"
            for s in again.all()
        }

    away = {"left": "away", "revoked": "away", "gone": "away"}
    assert states() == {"a": "returning", "b": "returning", **away}
    assert again.offers() == {}
    assert [s.name for s in again.absent()] == ["a", "b", "left", "gone"]
    again.check_session("a", sessions["a"])
    assert states() == {"a": "connected", "b": "returning", **away}
    changes.clear()
    await again.look_round()
    assert not changes
    await asyncio.sleep(0.5)
    assert states()["b"] == "away"
    # That its time is over is news, and the next start does not wait for it again.
    again.check_session("a", sessions["a"])
    await again.look_round()
    assert changes
    third = registry(database)
    await third.load()
    assert [s.name for s in third.all() if third.returning(s)] == ["a"]
