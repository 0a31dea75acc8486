"""TLS and mutual TLS between real processes: who gets in, who is refused, and what each side says of it."""

from __future__ import annotations

import datetime as dt
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedlink.certificates import certificate_facts
from fedlink.errors import Reason
from fedlink.route import route_to
from fedlink.tls import ClientTls, probe
from tests.support.federation import Daemon, Federation, arrays_equal, call, until
from tests.support.peer import Peer, refusal
from tests.support.pki import Pki, Tls, channel_credentials, key_lines
from tests.support.tls_ground import (
    START,
    Ground,
    add_site,
    admit,
    broken_handshake,
    connected,
    events,
    local,
    refused_call,
    sentence,
    token_file,
    train_a_round,
)

# One worker, so that the servers are shared.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tls")]

SHORT = dt.timedelta(seconds=60)
"""How long a certificate is good for that has to expire while the tests run."""
ADMITTED = ("ada", "bob", "carl", "dora", "eve", "finn", "gail", "ivy", "foreign", "bare", "server", "peer-a", "peer-b")
TRUSTLESS = "does not trust this server's certificate"


# --- Three servers, for all tests here


def add_sites(g: Ground) -> None:
    """Sites that train, for as long as the servers are there."""
    m, t = g.mutual, g.tokens
    # Certificates of two CAs, addresses on and off loopback; the second is not in the server's certificate.
    add_site(m, "ada", server=local(m), tls=g.of_own("ada"))
    tls = {**g.ours.site("bob", g.own / "ca.crt"), "server_name": "fed.example"}
    add_site(m, "bob", server=m.address, tls=tls)
    for name in ("ada", "bob"):
        file = token_file(t, name, g.secrets[f"t {name}"])
        add_site(t, name, token_file=file, tls={"ca": str(g.ours.ca)})


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    root = tmp_path_factory.mktemp("tls")
    with Federation(root / "m") as mutual, Federation(root / "t") as tokens, Federation(root / "o") as open_:
        ours, other, own = Pki(root / "ours"), Pki(root / "other"), root / "own"
        g = Ground(ours, other, own, mutual, tokens, open_)

        call("fedserver", "certificate", "authority", str(own))
        call("fedserver", "certificate", "server", str(own), "fed.example", "localhost", "127.0.0.1")
        g.put_revocations()
        client_ca = ours.write("client_ca.crt", ours.ca.read_bytes() + (own / "ca.crt").read_bytes())
        tls = {"certificate": str(own / "server.crt"), "key": str(own / "server.key"), "client_ca": str(client_ca)}
        tls["revoked"] = str(ours.directory / "all.crl")
        # Not on loopback, and without --insecure.
        mutual.start_server(listen="0.0.0.0:0", tls=tls, max_poll_wait=1.0)
        assert not any(admit(mutual, *ADMITTED).values())

        tokens.start_server(tls=ours.leaf("server", "127.0.0.1"), max_poll_wait=1.0)
        open_.start_server("--insecure", listen="0.0.0.0:0", max_poll_wait=1.0)
        for federation in (tokens, open_):
            made = admit(federation, "ada", "bob", "badtoken")
            g.secrets |= {f"{federation.root.name} {name}": token for name, token in made.items()}
        for federation in (mutual, tokens):
            federation.import_model("start", START)
        add_sites(g)
        yield g


@pytest.fixture(scope="module")
def expiring(tmp_path_factory: pytest.TempPathFactory, ground: Ground) -> Iterator[Federation]:
    """A server whose certificate ends soon."""
    with Federation(tmp_path_factory.mktemp("expiring")) as federation:
        yield federation.start_server(tls=ground.ours.leaf("soon", "127.0.0.1", lasts=SHORT))


@pytest.fixture(scope="module")
def gail(ground: Ground) -> Iterator[tuple[Peer, Tls]]:
    """A site that is connected, and whose certificate ends soon."""
    tls = ground.ours.site("gail", ground.own / "ca.crt", lasts=SHORT)
    with Peer(local(ground.mutual), "gail", credentials=channel_credentials(tls)) as peer:
        yield peer.register(workload="idle"), tls


# --- Who gets in


@pytest.mark.usefixtures("expiring", "gail", "ends")  # for their clocks and processes to run from now on
def test_rounds_with_mutual_tls_and_with_tokens(ground: Ground) -> None:
    m, t = ground.mutual, ground.tokens
    train_a_round(m, "mutual")
    train_a_round(t, "tokens")
    for federation, run in ((m, "mutual"), (t, "tokens")):
        arrays_equal(federation.export(f"{run}@1"), {k: v + 2 for k, v in START.items()})
    assert [e["tls"] for f in (m, t) for e in events(f.server) if e["event"] == "serving"] == ["mutual", "on"]
    assert all(c["admitted"] for c in m.json("client", "list"))


def test_an_insecure_server_serves_insecure_sites_with_tokens(ground: Ground) -> None:
    o = ground.open
    by_file = add_site(o, "ada", token_file=token_file(o, "ada", ground.secrets["o ada"]), insecure=True)
    by_option = add_site(o, "bob", token_file=token_file(o, "bob", ground.secrets["o bob"]), start=False)
    refused_first = by_option.start()
    assert refused_first.wait() == 4
    before = len(refused_first.text())
    by_option.start("--insecure")
    for site in (by_file, by_option):
        until(lambda s=site: connected(o, s.name), f"{site.name} to connect")  # type: ignore[misc]
        assert site.daemon
        assert "travels unencrypted" in site.daemon.text()[before if site is by_option else 0 :]
        assert site.daemon.stop() == 0


# --- Who is refused


@dataclass(frozen=True)
class Case:
    """A site that is refused.

    Attributes:
        at: the server's fixture.
        site: makes it.
        says: pattern of the sentence the daemon ends with.
        log: whether the server's log says it, too.
        code: exit code.
    """

    at: str
    site: Callable[[Ground, Federation], dict[str, Any]]
    says: str
    log: Callable[[Federation], bool]
    code: int = 4


def handshake(cause: str) -> Callable[[Federation], bool]:
    return lambda federation: broken_handshake(federation, cause)


def a_call(words: str) -> Callable[[Federation], bool]:
    return lambda federation: refused_call(federation, words)


def nothing(_: Federation) -> bool:
    """It never came so far, or the server has no way to know."""
    return True


def certified(name: str) -> Callable[[Ground, Federation], dict[str, Any]]:
    return lambda g, f: {"server": local(f), "tls": g.ours.site(name, g.own / "ca.crt", file=f"{name}-refused")}


def foreign(g: Ground, f: Federation) -> dict[str, Any]:
    return {"server": local(f), "tls": g.other.site("foreign", g.own / "ca.crt")}


def elsewhere(g: Ground, f: Federation) -> dict[str, Any]:
    tls = {**g.ours.site("elsewhere", g.own / "ca.crt"), "server_name": "elsewhere.example"}
    return {"server": local(f), "tls": tls}


def dora(g: Ground, f: Federation) -> dict[str, Any]:
    tls = g.ours.site("dora", g.own / "ca.crt")
    g.ours.revoke(tls)
    g.put_revocations()
    return {"server": local(f), "tls": tls}


def eve(g: Ground, f: Federation) -> dict[str, Any]:
    f.call("client", "revoke", "eve")
    return certified("eve")(g, f)


def past(g: Ground, f: Federation) -> dict[str, Any]:
    return {"server": local(f), "tls": g.ours.site("past", g.own / "ca.crt", lasts=-dt.timedelta(hours=1))}


def open_key(g: Ground, f: Federation) -> dict[str, Any]:
    tls = g.ours.site("openkey", g.own / "ca.crt")
    Path(tls["key"]).chmod(0o644)
    return {"server": local(f), "tls": tls}


CASES = {
    # The server's certificate
    "distrustful": Case(
        "tokens",
        lambda g, f: {"tls": {"ca": str(g.other.ca)}},
        r"the certificate of the server at \S+ is signed by .*ours.*, not by a CA in \S*/other/ca.crt",
        handshake(TRUSTLESS),
    ),
    "public": Case(
        "tokens", lambda g, f: {"tls": {}}, r"signed by .*ours.*, not by a CA in .*tls\.ca", handshake(TRUSTLESS)
    ),
    "elsewhere": Case(
        "mutual",
        elsewhere,
        r"certificate of the server at \S+ is for fed\.example, localhost, 127\.0\.0\.1 and not for elsewhere\.example",
        handshake(TRUSTLESS),
    ),
    # The site's certificate
    "foreign": Case(
        "mutual",
        foreign,
        "refuses this site's certificate: .*other.*which signed it, is not a CA that the server takes",
        handshake("is not signed by a CA in tls.client_ca"),
    ),
    "bare": Case(
        "mutual",
        lambda g, f: {"server": local(f), "tls": {"ca": str(g.own / "ca.crt")}},
        r"wants a certificate of this site; .*tls\.certificate",
        handshake("showed no certificate"),
    ),
    "past": Case("mutual", past, r"certificate \S+past\.crt expired on 20", nothing, code=2),
    "openkey": Case("mutual", open_key, r"key \S+openkey\.key is open to everybody", nothing, code=2),
    "dora": Case(
        "mutual",
        dora,
        "the certificate of 'dora', serial number [0-9a-f]+, was revoked",
        a_call("the certificate of 'dora', serial number "),
    ),
    "eve": Case(
        "mutual",
        eve,
        "'eve' was revoked by the server's operator",
        a_call("'eve' was revoked by the server's operator"),
    ),
    "hank": Case(
        "mutual",
        certified("hank"),
        "'hank' is not admitted.*fedserver client add hank",
        a_call("'hank' is not admitted"),
    ),
    "ivy": Case(
        "mutual",
        certified("bob"),
        "the certificate is that of 'bob', but the call says that it comes from 'ivy'",
        a_call("the certificate is that of 'bob', but the call says that it comes from 'ivy'"),
    ),
    # One side without TLS
    "plain": Case("tokens", lambda g, f: {}, r"speaks TLS only; add \[tls\]", handshake("does not speak TLS")),
    "insecure": Case(
        "mutual",
        lambda g, f: {"insecure": True},
        "speaks TLS only; .*take insecure out",
        handshake("does not speak TLS"),
    ),
    "secure": Case(
        "open",
        lambda g, f: {"server": local(f), "tls": {"ca": str(g.ours.ca)}},
        r"does not speak TLS; .*take \[tls\] out",
        nothing,
    ),
    "unsaid": Case("open", lambda g, f: {}, "does not speak TLS", nothing),
    # Tokens
    "notoken": Case(
        "tokens",
        lambda g, f: {"tls": {"ca": str(g.ours.ca)}},
        "client 'notoken' needs a token",
        a_call("client 'notoken' needs a token"),
    ),
    "badtoken": Case(
        "tokens",
        lambda g, f: {
            "tls": {"ca": str(g.ours.ca)},
            "token_file": token_file(f, "badtoken", g.secrets["t ada"]),
        },
        "the token is not one of client 'badtoken'",
        a_call("the token is not one of client 'badtoken'"),
    ),
    "tokenless": Case(
        "open",
        lambda g, f: {"insecure": True},
        "client 'tokenless' needs a token",
        a_call("client 'tokenless' needs a token"),
    ),
}


@pytest.fixture(scope="module")
def ends(ground: Ground) -> Iterator[dict[str, Future[int]]]:
    """Every case's daemon, begun; some at a time."""
    with ThreadPoolExecutor(4) as pool:
        began = {}
        for name, case in CASES.items():
            federation: Federation = getattr(ground, case.at)
            site = add_site(federation, name, start=False, **case.site(ground, federation))
            began[name] = pool.submit(lambda s=site: s.start().wait())  # type: ignore[misc]
        yield began


@pytest.mark.parametrize("name", CASES)
def test_refused_on_both_sides_in_a_sentence(ground: Ground, ends: dict[str, Future[int]], name: str) -> None:
    case, federation = CASES[name], getattr(ground, CASES[name].at)
    code = ends[name].result()
    daemon = federation.sites[name].daemon
    assert code == case.code, daemon.text()
    assert re.search(case.says, sentence(daemon))
    until(lambda: case.log(federation), f"the server's log: {federation.server.text()}", seconds=20)


# What else is wrong with files: tests/unit/test_certificates.py.
def test_servers_that_do_not_start(ground: Ground, tmp_path: Path) -> None:
    g = ground
    good = g.ours.leaf("good", "127.0.0.1")
    foreign_key = g.ours.leaf("another")["key"]
    expired = g.ours.leaf("expired", "127.0.0.1", lasts=-dt.timedelta(days=1))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"listen": "0.0.0.0:0"}, r"'0\.0\.0\.0:0' is not a loopback address.*\[tls\].*--insecure"),
        ({"tls": expired}, r"certificate \S+expired\.crt expired on 20"),
        ({"tls": {**good, "key": foreign_key}}, r"key \S+another\.key does not belong to certificate \S+good\.crt"),
    ]

    def serve(number: int) -> str:
        table, _ = cases[number]
        directory = tmp_path / str(number)
        directory.mkdir()
        with Federation(directory) as federation:
            listen = table.pop("listen", "127.0.0.1:0")
            with pytest.raises(AssertionError):
                federation.start_server(listen=listen, **table)
            assert federation.server
            assert federation.server.wait() == 2
            return federation.server.text()

    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(serve, range(len(cases))))
    for text, (_, words) in zip(said, cases, strict=True):
        [line] = text.strip().splitlines()
        assert line.startswith("fedserver: ")
        assert re.search(words, line), line


def test_taken_back_while_connected(ground: Ground) -> None:
    g, m = ground, ground.mutual
    of_own, by_name = g.of_own("carl"), g.ours.site("finn", g.own / "ca.crt")
    carl = add_site(m, "carl", server=local(m), tls=of_own)
    finn = add_site(m, "finn", server=local(m), tls=by_name)
    for name in ("carl", "finn"):
        until(lambda n=name: connected(m, n), f"{name} to connect")  # type: ignore[misc]
    call("fedserver", "certificate", "revoke", str(g.own), "carl")
    g.put_revocations()
    m.call("client", "revoke", "finn")
    for site, words in ((carl, "the certificate of 'carl', serial number"), (finn, "'finn' was revoked by")):
        assert site.daemon
        assert site.daemon.wait() == 4
        assert words in sentence(site.daemon)
        until(lambda w=words: refused_call(m, w), "the server's log", seconds=20)  # type: ignore[misc]
    # The others of both CAs stay.
    assert all(m.sites[n].daemon.running for n in ("ada", "bob"))  # type: ignore[union-attr]


def test_another_sites_certificate_gives_none_of_its_rights(ground: Ground) -> None:
    g, m = ground, ground.mutual
    m.create_run("rights", workload="rights", model="start", evaluation={"enabled": False})
    trust = g.own / "ca.crt"

    def peer(name: str) -> Peer:
        return Peer(local(m), name, credentials=channel_credentials(g.ours.site(name, trust)))

    with peer("peer-a") as a, peer("peer-b") as b:
        for p in (a, b):
            p.register(workload="rights")
        task, own = b.task(), a.task()
        upload = b.start(task.token, b"x" * 100).upload_id
        digest = task.model.digest

        honest = dict(a.metadata)
        # b's session, stolen, with a's certificate: as a, as nobody in particular, as b.
        for client in ({"fedlink-client": "peer-a"}, {}):
            a.metadata = {**client, "fedlink-session-bin": b.metadata["fedlink-session-bin"]}
            with refusal(Reason.SESSION_UNKNOWN):
                a.poll()
            with refusal(Reason.SESSION_UNKNOWN):
                a.read(task.token, digest)
        a.metadata = dict(b.metadata)
        for attempt in (a.poll, lambda: a.read(task.token, digest), lambda: a.extend(task.token)):
            with refusal(Reason.BAD_CREDENTIALS) as said:
                attempt()
            assert "the certificate is that of 'peer-a', but the call says that it comes from 'peer-b'" in (
                said[0].message
            )
        until(lambda: refused_call(m, "is that of 'peer-a', but the call says that it comes from 'peer-b'"), "the log")

        # As itself, with b's task and upload.
        a.metadata = honest
        for reason, attempt in (
            (Reason.TASK_NOT_FOUND, lambda: a.extend(task.token)),
            (Reason.TASK_NOT_FOUND, lambda: a.complete(task.token, None)),
            (Reason.TASK_NOT_FOUND, lambda: a.read(task.token, digest)),
            (Reason.TASK_NOT_FOUND, lambda: a.missing(task.token, digest)),
            (Reason.TASK_NOT_FOUND, lambda: a.start(task.token, b"y")),
            (Reason.UPLOAD_NOT_FOUND, lambda: a.write(upload, b"x" * 100)),
        ):
            with refusal(reason):
                attempt()  # type: ignore[no-untyped-call]
        # Each still has what is its own, and needs no name beside its certificate.
        assert a.read(own.token, own.model.digest)
        del b.metadata["fedlink-client"]
        assert b.read(task.token, digest)
        assert b.write(upload, b"x" * 100).complete
    m.call("run", "stop", "rights")


# --- Certificates that are renewed


def serial(ground: Ground) -> int:
    return probe(route_to(ground.tokens.address), ClientTls(ca=ground.ours.ca)).server.serial


def test_a_renewed_certificate_is_used_for_the_next_connection(ground: Ground) -> None:
    t = ground.tokens
    first = serial(ground)
    ground.ours.leaf("server", "127.0.0.1")
    second = serial(ground)
    assert second != first
    assert sum(e["event"] == "certificates read again" for e in events(t.server)) == 1

    good = (ground.ours.directory / "server.crt").read_bytes()
    for broken in (b"junk", ground.other.authority.cert_pem.bytes()):
        ground.ours.write("server.crt", broken)
        assert serial(ground) == second
    (ground.ours.directory / "server.crt").unlink()
    assert serial(ground) == second
    said = [e["error"] for e in events(t.server) if e["event"].startswith("new certificates cannot be used")]
    assert len(said) == 3
    assert "is not a certificate in PEM" in said[0]
    assert "does not belong to certificate" in said[1]
    assert "cannot be read" in said[2]

    ground.ours.write("server.crt", good)
    assert serial(ground) == second
    train_a_round(t, "renewed")


def test_a_registered_site_waits_for_the_right_certificate(ground: Ground) -> None:
    t = ground.tokens
    daemons = [t.sites[name].daemon for name in ("ada", "bob")]
    right = [ground.ours.directory / f"server.{end}" for end in ("crt", "key")]
    kept = [path.read_bytes() for path in right]
    wrong = ground.other.leaf("wrong", "127.0.0.1")
    for name in ("ada", "bob"):  # one that was never registered would end instead
        until(lambda n=name: connected(t, n), f"{name} to connect")  # type: ignore[misc]
    t.kill_server()
    before = len(events(t.server))
    for path, data in zip(right, (wrong["certificate"], wrong["key"]), strict=True):
        path.write_bytes(Path(data).read_bytes())
    t.start_server(tls={"certificate": str(right[0]), "key": str(right[1])}, max_poll_wait=1.0)

    def explained(daemon: Daemon | None) -> bool:
        found = [e["error"] for e in events(daemon) if e["event"].startswith("no connection comes about")]
        return any("not by a CA in" in error for error in found)

    for daemon in daemons:
        until(lambda d=daemon: explained(d), "the daemon to say why", seconds=30)  # type: ignore[misc]
    until(lambda: broken_handshake(t, TRUSTLESS, before), "the server's log", seconds=20)
    for path, data_ in zip(right, kept, strict=True):
        path.write_bytes(data_)
    train_a_round(t, "again")
    for daemon in daemons:
        assert daemon
        assert daemon.running
        assert any(e["event"] == "the server answers again" for e in events(daemon))


# --- Last, for these have to expire


def test_expired_on_the_way(ground: Ground, expiring: Federation, gail: tuple[Peer, Tls]) -> None:
    m = ground.mutual
    peer, tls = gail
    ends = dt.datetime.now(dt.UTC)
    for certificate in (tls["certificate"], str(ground.ours.directory / "soon.crt")):
        ends = max(ends, certificate_facts(Path(certificate)).not_after)
    time.sleep(max(0.0, (ends - dt.datetime.now(dt.UTC)).total_seconds() + 1.5))

    late = add_site(expiring, "late", tls={"ca": str(ground.ours.ca)}).daemon
    # A connection that was opened in time.
    with refusal(Reason.BAD_CREDENTIALS) as said:
        peer.poll()
    assert "the certificate of 'gail' expired on 20" in said[0].message
    until(lambda: refused_call(m, "the certificate of 'gail' expired on 20"), "the server's log", seconds=20)
    # A new one, without the daemon, which would not even try.
    with (
        Peer(local(m), "gail", credentials=channel_credentials(tls)) as again,
        pytest.raises(grpc.RpcError) as caught,
    ):
        again.poll()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    until(lambda: broken_handshake(m, "its certificate has expired"), "the server's log", seconds=20)

    assert late
    assert late.wait() == 4
    assert re.search(r"certificate of the server at \S+ expired on 20.*renew", sentence(late))
    until(lambda: broken_handshake(expiring, TRUSTLESS), "the server's log", seconds=20)


def test_secrets_are_in_no_log(ground: Ground, ends: dict[str, Future[int]], expiring: Federation) -> None:
    for end in ends.values():
        end.result()
    roots = [f.root for f in (ground.mutual, ground.tokens, ground.open, expiring)]
    secrets = set(ground.secrets.values())
    for directory in (ground.ours.directory, ground.other.directory, ground.own):
        secrets |= key_lines(directory.rglob("*.key"))
    assert len(secrets) > 20
    logs = [path for root in roots for path in root.rglob("*log*") if path.is_file()]
    assert len(logs) > 20
    for path in logs:
        text = path.read_text(errors="replace")
        assert not [s for s in secrets if s in text], path
