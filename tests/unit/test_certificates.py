"""Certificates, keys and revocation lists as files: what is read from them, and what is said of useless ones."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedclient.settings import load_site
from fedlink.certificates import (
    CertificateFacts,
    certificate_facts,
    read_authorities,
    read_pair,
    read_revoked,
)
from fedlink.errors import FedlinkError, Reason
from fedlink.route import is_loopback
from fedlink.tls import ClientTls
from fedserver.services.certificates import Certificates
from fedserver.settings import Proof, ServerSettings, TlsSettings, load_settings
from tests.support.federation import toml
from tests.support.pki import Pki, Tls, serial_of

NOW = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki") / "ours")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki") / "other")


def pair(leaf: Tls) -> tuple[Path, Path]:
    return Path(leaf["certificate"]), Path(leaf["key"])


def refused(*parts: object) -> Any:
    """Expect BAD_CONFIG in a sentence that has these parts."""
    pattern = "".join(f"(?=.*{part})" for part in parts)
    return _Refused(pattern)


class _Refused:
    def __init__(self, pattern: str) -> None:
        self._raises = pytest.raises(FedlinkError, match=pattern)

    def __enter__(self) -> None:
        self._info = self._raises.__enter__()

    def __exit__(self, *e: Any) -> Any:  # noqa: PYI036
        passed = self._raises.__exit__(*e)
        assert self._info.value.reason is Reason.BAD_CONFIG
        return passed


# --- Facts


def test_facts(ours: Pki) -> None:
    leaf = ours.leaf("ada", "fed.example", "*.fed.example", "10.1.2.3", "::1")
    facts = certificate_facts(Path(leaf["certificate"]))
    assert facts.common_name == "ada"
    assert set(facts.names) == {"fed.example", "*.fed.example", "10.1.2.3", "::1"}
    assert facts.serial == serial_of(leaf)
    assert "ours" in facts.issuer
    assert facts.trouble() == ""
    assert facts.ends_soon() == ""


def test_a_certificate_without_names_has_empty_facts(ours: Pki) -> None:
    facts = certificate_facts(ours.ca)
    assert facts.common_name == ""
    assert facts.names == ()


def facts(start: dt.datetime, end: dt.datetime) -> CertificateFacts:
    return CertificateFacts("a", "b", 1, start, end, (), b"")


@given(st.integers(-100, 100), st.integers(0, 100), st.integers(-100, 100))
def test_trouble_and_warning(start: int, length: int, now: int) -> None:
    begins, ends, moment = (NOW + n * DAY for n in (start, start + length, now))
    found = facts(begins, ends)
    trouble = found.trouble(moment)
    assert bool(trouble) == (moment < begins or moment > ends)
    if moment > ends:
        assert trouble == f"expired on {ends:%Y-%m-%d} 12:00 UTC"
    elif moment < begins:
        assert trouble == f"is valid only from {begins:%Y-%m-%d} 12:00 UTC on"
    else:
        soon = found.ends_soon(moment)
        assert soon == (
            "" if ends - moment >= 30 * DAY else f"expires on {ends:%Y-%m-%d} 12:00 UTC, in {(ends - moment).days} days"
        )


# --- A certificate and its key


def test_a_pair(ours: Pki) -> None:
    certificate, key = pair(ours.leaf("pair"))
    chain, secret, found = read_pair(certificate, key)
    assert (chain, secret) == (certificate.read_bytes(), key.read_bytes())
    assert found.common_name == "pair"


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o601, 0o644, 0o666, 0o777])
def test_a_key_for_everybody(ours: Pki, mode: int) -> None:
    certificate, key = pair(ours.leaf("everybody"))
    key.chmod(mode)
    with refused(key, "open to everybody", "chmod 600"):
        read_pair(certificate, key)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o640])
def test_a_key_for_the_user_or_its_group(ours: Pki, mode: int) -> None:
    certificate, key = pair(ours.leaf("group"))
    key.chmod(mode)
    assert read_pair(certificate, key)


def test_pairs_that_cannot_be_used(ours: Pki, tmp_path: Path) -> None:
    certificate, key = pair(ours.leaf("good"))
    foreign_certificate, foreign_key = pair(ours.leaf("foreign"))
    missing, junk = tmp_path / "missing", ours.write("junk", b"junk", 0o600)
    with refused(foreign_key, "does not belong to", certificate):
        read_pair(certificate, foreign_key)
    with refused(missing, "cannot be read", "No such file"):
        read_pair(missing, key)
    with refused(missing, "cannot be read", "No such file"):
        read_pair(certificate, missing)
    with refused(tmp_path, "cannot be read", "Is a directory"):
        read_pair(tmp_path, key)
    with refused(junk, "is not a certificate in PEM"):
        read_pair(junk, key)
    with refused(junk, "is not a private key in PEM"):
        read_pair(certificate, junk)
    # The two mixed up.
    certificate.chmod(0o600)
    with refused(key, "is not a certificate in PEM"):
        read_pair(key, certificate)
    with refused(certificate, "is not a private key in PEM"):
        read_pair(foreign_certificate, certificate)


def test_an_encrypted_key(ours: Pki) -> None:
    certificate, key = pair(ours.leaf("encrypted"))
    secret = serialization.load_pem_private_key(key.read_bytes(), None)
    encoding = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked = secret.private_bytes(*encoding, serialization.BestAvailableEncryption(b"secret"))
    path = ours.write("locked.key", locked, 0o600)
    with refused(path, "is encrypted", "without a pass phrase"):
        read_pair(certificate, path)


def test_a_certificate_out_of_its_time(ours: Pki) -> None:
    certificate, key = pair(ours.leaf("past", lasts=-DAY))
    with refused(certificate, "expired on 20", "put a new one"):
        read_pair(certificate, key)
    certificate, key = pair(ours.leaf("future", start=dt.datetime.now(dt.UTC) + DAY))
    with refused(certificate, "is valid only from 20"):
        read_pair(certificate, key)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_refused_in_a_sentence(ours: Pki, tmp_path: Path, data: bytes, dressed: bool) -> None:
    path = tmp_path / "any"
    for kind in ("CERTIFICATE", "X509 CRL", "PRIVATE KEY"):
        begin, end = f"-----BEGIN {kind}-----\n".encode(), f"\n-----END {kind}-----\n".encode()
        path.write_bytes(begin + data + end if dressed else data)
        path.chmod(0o600)
        certificate, _ = pair({"certificate": str(ours.ca), "key": ""})
        with refused("any"):
            read_authorities(path, "tls.ca")
        with refused("any"):
            read_revoked(path, ours.ca.read_bytes())
        with refused("any"):
            read_pair(certificate, path)


def test_authorities(ours: Pki, other: Pki, tmp_path: Path) -> None:
    both = ours.ca.read_bytes() + b"# a remark\n" + other.ca.read_bytes()
    (tmp_path / "both").write_bytes(both)
    assert read_authorities(tmp_path / "both", "tls.ca") == both
    with refused("tls.ca", tmp_path / "none", "cannot be read"):
        read_authorities(tmp_path / "none", "tls.ca")


# --- Revocation lists


def test_lists_of_several_authorities(ours: Pki, other: Pki, tmp_path: Path) -> None:
    one, two, kept = ours.leaf("one"), other.leaf("two"), ours.leaf("kept")
    path = tmp_path / "all.crl"
    path.write_bytes(ours.revocations(serial_of(one)) + b"\n# of the other\n" + other.revocations(serial_of(two)))
    both = ours.ca.read_bytes() + other.ca.read_bytes()
    revoked = read_revoked(path, both)

    def entry(leaf: Tls) -> tuple[bytes, int]:
        found = certificate_facts(Path(leaf["certificate"]))
        return found.issuer_bytes, found.serial

    assert revoked == {entry(one), entry(two)}
    assert entry(kept) not in revoked
    # The same number of another authority is another certificate.
    assert (certificate_facts(Path(two["certificate"])).issuer_bytes, serial_of(one)) not in revoked
    with refused(path, "the list of", "other", "is not signed by a CA in client_ca"):
        read_revoked(path, ours.ca.read_bytes())


def test_a_list_that_somebody_else_signed(ours: Pki, other: Pki, tmp_path: Path) -> None:
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateRevocationListBuilder(ours.certificate.subject, now, now + DAY)
    key = serialization.load_pem_private_key(other.authority.private_key_pem.bytes(), None)
    path = tmp_path / "forged.crl"
    forged = builder.sign(key, hashes.SHA256())  # type: ignore[arg-type]
    path.write_bytes(forged.public_bytes(serialization.Encoding.PEM))
    for authorities in (ours.ca.read_bytes(), ours.ca.read_bytes() + other.ca.read_bytes()):
        with refused(path, "is not signed by a CA in client_ca"):
            read_revoked(path, authorities)


def test_what_is_no_list(ours: Pki, tmp_path: Path) -> None:
    with refused(tmp_path / "none", "cannot be read"):
        read_revoked(tmp_path / "none", ours.ca.read_bytes())
    with refused(ours.ca, "no revocation list"):
        read_revoked(ours.ca, ours.ca.read_bytes())
    # A list that was cut off must not count as a shorter one.
    path = tmp_path / "cut"
    path.write_bytes(ours.revocations() + ours.revocations()[:-40])
    with refused(path, "revocation list"):
        read_revoked(path, ours.ca.read_bytes())


def test_a_list_whose_issuer_is_written_in_another_type_of_text(tmp_path: Path) -> None:
    """X.520 compares names by what they say; a CA may write its own as UTF-8 here and as printable text there."""
    now = dt.datetime.now(dt.UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    names = [
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Root", kind)])
        for kind in (_ASN1Type.UTF8String, _ASN1Type.PrintableString)
    ]

    def certificate(subject: x509.Name, issuer: x509.Name, serial: int) -> bytes:
        builder = x509.CertificateBuilder(issuer, subject, key.public_key(), serial, now - DAY, now + DAY)
        return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    (tmp_path / "leaf.crt").write_bytes(certificate(names[0], names[0], 77))
    crl = x509.CertificateRevocationListBuilder(
        names[1], now, now + DAY, revoked_certificates=[x509.RevokedCertificateBuilder(77, now).build()]
    ).sign(key, hashes.SHA256())
    (tmp_path / "crl").write_bytes(crl.public_bytes(serialization.Encoding.PEM))
    found = certificate_facts(tmp_path / "leaf.crt")
    assert (found.issuer_bytes, found.serial) in read_revoked(tmp_path / "crl", certificate(names[0], names[0], 1))


# --- Settings


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example:1", False),
        ("127.0.0.1.example:1", False),
        ("fed.example.org:1", False),
    ],
)
def test_loopback_needs_no_tls_and_nothing_else_goes_without(address: str, expected: bool, tmp_path: Path) -> None:
    assert is_loopback(address) is expected
    if expected:
        assert ServerSettings(listen=address).proof is Proof.NONE
    else:
        with refused("is not a loopback address", "--insecure"):
            load_settings(None, {"listen": address})
    assert load_settings(None, {"listen": address, "insecure": True}).proof is (Proof.NONE if expected else Proof.TOKEN)
    site = tmp_path / "site.toml"
    site.write_text(toml({"name": "a", "server": address, "workload": {"w": {"trainer": "m:C"}}}))
    assert load_site(site).client_tls == (None if expected else ClientTls())
    assert load_site(site, insecure=True).client_tls is None


def test_tls_of_a_server(ours: Pki, tmp_path: Path) -> None:
    leaf = ours.leaf("server", "127.0.0.1")
    config = tmp_path / "fedserver.toml"

    def load(**tables: Any) -> ServerSettings:
        config.write_text(toml(tables))
        return load_settings(config, {})

    assert load(listen="0.0.0.0:1", tls=leaf).proof is Proof.TOKEN
    assert load(tls=leaf).proof is Proof.TOKEN
    assert load(tls={**leaf, "client_ca": "ca.crt"}).proof is Proof.CERTIFICATE
    relative = load(tls={**leaf, "client_ca": "ca.crt"}).tls
    assert relative
    assert relative.client_ca == tmp_path / "ca.crt"
    with refused("insecure and .tls. contradict"):
        load(insecure=True, tls=leaf)
    with refused("revoked", "client_ca"):
        load(tls={**leaf, "revoked": "x.crl"})
    with refused("key"):
        load(tls={"certificate": leaf["certificate"]})
    with refused("client_cas"):
        load(tls={**leaf, "client_cas": "x"})


def test_tls_of_a_site(ours: Pki, tmp_path: Path) -> None:
    leaf = ours.leaf("site")
    path = tmp_path / "site.toml"

    def load(**tables: Any) -> Any:
        path.write_text(toml({"name": "a", "workload": {"w": {"trainer": "m:C"}}, **tables}))
        return load_site(path).client_tls

    assert load(tls={"ca": "ca.crt", **leaf}) == ClientTls(tmp_path / "ca.crt", *pair(leaf))
    assert load(tls={}) == ClientTls()
    for half in leaf:
        with refused("certificate and key belong together"):
            load(tls={half: leaf[half]})
    with refused("insecure = true and .tls. contradict"):
        load(insecure=True, tls={})
    missing = ClientTls(ca=tmp_path / "none.crt")
    with refused("tls.ca", tmp_path / "none.crt", "cannot be read"):
        missing.check()
    assert ClientTls().check() is None


def test_files_of_a_server_that_cannot_be_used(ours: Pki, other: Pki, tmp_path: Path) -> None:
    certificate, key = pair(ours.leaf("server", "127.0.0.1"))

    def load(**files: Path) -> None:
        Certificates(TlsSettings(**{"certificate": certificate, "key": key, **files}))

    load(client_ca=ours.ca, revoked=ours.revoked)
    none = tmp_path / "none"
    for name in ("certificate", "key", "client_ca"):
        with refused(none, "cannot be read: No such file"):
            load(**{name: none})
    with refused(none, "cannot be read: No such file"):
        load(client_ca=ours.ca, revoked=none)
    with refused(other.revoked, "is not signed by a CA in client_ca"):
        load(client_ca=ours.ca, revoked=other.revoked)
    with refused(ours.ca, "no revocation list"):
        load(client_ca=ours.ca, revoked=ours.ca)
    with refused(key, "is not a certificate in PEM"):
        load(client_ca=key)
    key.chmod(0o604)
    with refused(key, "open to everybody"):
        load()


def test_who_a_certificate_is(ours: Pki, other: Pki) -> None:
    certificate, key = pair(ours.leaf("server", "127.0.0.1"))
    good, bad, late = ours.leaf("good"), ours.leaf("bad"), ours.leaf("late", lasts=-DAY)
    ours.revoke(bad)
    found = Certificates(TlsSettings(certificate=certificate, key=key, client_ca=ours.ca, revoked=ours.revoked))

    def name(leaf: Tls) -> str:
        return found.client_name({"x509_pem_cert": [Path(leaf["certificate"]).read_bytes()]})

    assert name(good) == "good"
    for leaf, words in ((bad, "'bad', serial number .* was revoked"), (late, "'late' expired on 20")):
        with pytest.raises(FedlinkError, match=words) as e:
            name(leaf)
        assert e.value.reason is Reason.BAD_CREDENTIALS
    with pytest.raises(FedlinkError, match="asks every client for a certificate"):
        found.client_name({})
    # Taken back between two calls; a list that cannot be used takes nothing back and gives nothing back.
    ours.revoke(good)
    for _ in range(2):
        with pytest.raises(FedlinkError, match="was revoked"):
            name(good)
        ours.write("revoked.crl", b"junk")
    with pytest.raises(FedlinkError, match="was revoked"):
        name(bad)


def test_a_ca_between_that_was_taken_back(tmp_path: Path) -> None:
    root = Pki(tmp_path / "root")
    between = Pki(tmp_path / "between", parent=root)
    certificate, key = pair(root.leaf("server", "127.0.0.1"))
    found = Certificates(TlsSettings(certificate=certificate, key=key, client_ca=root.ca, revoked=root.revoked))
    leaf, *chain = Path(between.leaf("ada")["certificate"]).read_bytes().split(b"-----BEGIN")[1:]
    assert chain
    peer = {"x509_pem_cert": [b"-----BEGIN" + leaf], "x509_pem_cert_chain": [b"-----BEGIN" + c for c in chain]}
    assert found.client_name(peer) == "ada"
    root.revoke({"certificate": str(between.ca)})
    with pytest.raises(
        FedlinkError, match=r"'ada' comes from a CA whose own certificate, serial number .* was revoked"
    ):
        found.client_name(peer)


def test_a_revocation_is_seen_while_the_servers_own_key_cannot_be_used(tmp_path: Path) -> None:
    ours = Pki(tmp_path / "own")
    certificate, key = pair(ours.leaf("server", "127.0.0.1"))
    ada = Path(ours.leaf("ada")["certificate"])
    found = Certificates(TlsSettings(certificate=certificate, key=key, client_ca=ours.ca, revoked=ours.revoked))
    peer = {"x509_pem_cert": [ada.read_bytes()]}
    ends = found.facts.not_after
    key.chmod(0o604)
    assert found.client_name(peer) == "ada"
    ours.revoke({"certificate": str(ada)})
    with pytest.raises(FedlinkError, match="was revoked"):
        found.client_name(peer)
    assert found.facts.not_after == ends


def test_files_whose_rights_are_mended_are_read_again(tmp_path: Path) -> None:
    ours = Pki(tmp_path / "own")
    certificate, key = pair(ours.leaf("server", "127.0.0.1"))
    found = Certificates(TlsSettings(certificate=certificate, key=key, client_ca=ours.ca))
    peer = {"x509_pem_cert": [Path(ours.leaf("ada")["certificate"]).read_bytes()]}
    before = found.facts.serial
    new_certificate, new_key = pair(ours.leaf("server", "127.0.0.1", "localhost"))
    new_key.chmod(0o604)
    new_key.rename(key)
    new_certificate.rename(certificate)
    found.client_name(peer)
    assert found.facts.serial == before
    key.chmod(0o600)
    found.client_name(peer)
    assert found.facts.serial != before
