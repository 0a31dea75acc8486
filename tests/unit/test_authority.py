"""An authority in a directory: what it signs holds before strangers, and what it takes back is taken back."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import (
    ClientVerifier,
    DNSName,
    IPAddress,
    PolicyBuilder,
    ServerVerifier,
    Store,
    VerificationError,
)

from fedlink.certificates import certificate_facts, read_pair, read_revoked
from fedlink.errors import FedlinkError, Reason
from fedserver.authority import AUTHORITY_DAYS, Authority
from tests.support.federation import call

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")


@pytest.fixture
def own(tmp_path: Path) -> Authority:
    authority = Authority(tmp_path / "pki")
    authority.create("Test CA")
    return authority


def loaded(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def server_verifier(authority: Authority, host: x509.GeneralName | DNSName | IPAddress) -> ServerVerifier:
    return PolicyBuilder().store(Store([loaded(authority.certificate)])).build_server_verifier(host)  # type: ignore[arg-type]


def client_verifier(authority: Authority) -> ClientVerifier:
    return PolicyBuilder().store(Store([loaded(authority.certificate)])).build_client_verifier()


def openssl(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)


@contextlib.contextmanager
def refuses(reason: Reason, words: str) -> Iterator[None]:
    with pytest.raises(FedlinkError, match=words) as caught:
        yield
    assert caught.value.reason is reason


def files(authority: Authority) -> dict[str, bytes]:
    return {str(p.relative_to(authority.directory)): p.read_bytes() for p in authority.directory.rglob("*.*")}


# --- What it signs


def test_the_server_is_verified_for_its_names_and_no_other(own: Authority) -> None:
    file = own.issue_server(["fed.example", "*.sites.example", "10.0.0.7", "::1"], 30)
    assert file == own.directory / "server.crt"
    for host in (
        DNSName("fed.example"),
        DNSName("a.sites.example"),
        IPAddress(ipaddress.ip_address("10.0.0.7")),
        IPAddress(ipaddress.ip_address("::1")),
    ):
        assert server_verifier(own, host).verify(loaded(file), [])
    for host in (DNSName("other.example"), DNSName("sites.example"), IPAddress(ipaddress.ip_address("10.0.0.8"))):
        with pytest.raises(VerificationError):
            server_verifier(own, host).verify(loaded(file), [])


def test_a_site_is_its_common_name_and_no_server(own: Authority) -> None:
    file = own.issue_site("hospital-1", 30)
    assert file == own.directory / "sites" / "hospital-1.crt"
    _, _, facts = read_pair(file, file.with_suffix(".key"))
    assert facts.common_name == "hospital-1"
    assert facts.names == ()
    assert facts.issuer == "Test CA"
    certificate = loaded(file)
    certificate.verify_directly_issued_by(loaded(own.certificate))
    with pytest.raises(VerificationError):
        server_verifier(own, DNSName("hospital-1")).verify(certificate, [])
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    # cryptography asks for a name that RFC 5280 knows; a site has one of the directory's kind.
    verified = client_verifier(own).verify(certificate, [])
    assert verified.chain[-1] == loaded(own.certificate)


def test_the_authority_signs_leaves_only(own: Authority) -> None:
    certificate = loaded(own.certificate)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    certificate.verify_directly_issued_by(certificate)
    left = certificate.not_valid_after_utc - dt.datetime.now(dt.UTC)
    assert dt.timedelta(AUTHORITY_DAYS - 1) < left <= dt.timedelta(AUTHORITY_DAYS)


@pytest.mark.parametrize("days", [1, 365, 3650])
def test_certificates_last_as_long_as_asked(own: Authority, days: int) -> None:
    for file in (own.issue_server(["a.example"], days), own.issue_site("a", days)):
        facts = certificate_facts(file)
        now = dt.datetime.now(dt.UTC)
        assert dt.timedelta(days, seconds=-60) < facts.not_after - now <= dt.timedelta(days)
        # A site's clock may be a little behind.
        assert dt.timedelta(minutes=1) < now - facts.not_before < dt.timedelta(minutes=10)


@needs_openssl
def test_openssl_agrees(own: Authority) -> None:
    server, site = own.issue_server(["fed.example"], 30), own.issue_site("ada", 30)
    strict = ("verify", "-x509_strict", "-CAfile", own.certificate)
    assert openssl(*strict, "-purpose", "sslserver", "-verify_hostname", "fed.example", server).returncode == 0
    assert openssl(*strict, "-purpose", "sslserver", "-verify_hostname", "x.example", server).returncode != 0
    assert openssl(*strict, "-purpose", "sslclient", site).returncode == 0
    assert openssl(*strict, "-purpose", "sslserver", site).returncode != 0
    assert openssl(*strict, "-purpose", "sslclient", server).returncode != 0
    listed = (*strict, "-crl_check", "-CRLfile", own.revocations)
    assert openssl(*listed, site).returncode == 0
    own.revoke("ada")
    refused = openssl(*listed, site)
    assert refused.returncode != 0
    assert "revoked" in refused.stderr + refused.stdout
    assert openssl(*listed, server).returncode == 0


def test_keys_are_the_users_alone(own: Authority) -> None:
    own.issue_server(["a.example"], 1)
    own.issue_site("a", 1)
    keys = list(own.directory.rglob("*.key"))
    assert len(keys) == 3
    for key in keys:
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(own.directory.stat().st_mode) == 0o700
    assert not list(own.directory.rglob("*.new"))


# --- Made again


def test_an_authority_is_never_made_again(own: Authority) -> None:
    before = files(own)
    with refuses(Reason.BAD_CONFIG, "holds an authority already"):
        own.create("Another")
    assert files(own) == before
    # One half is enough to keep.
    for half in ("ca.crt", "ca.key"):
        (own.directory / half).unlink()
        with refuses(Reason.BAD_CONFIG, "holds an authority already"):
            own.create("Another")
        (own.directory / half).write_bytes(before[half])


def test_a_certificate_made_again_is_another_one(own: Authority) -> None:
    first = loaded(own.issue_site("ada", 1))
    key = (own.directory / "sites" / "ada.key").read_bytes()
    second = loaded(own.issue_site("ada", 1))
    assert first.serial_number != second.serial_number
    assert (own.directory / "sites" / "ada.key").read_bytes() != key


@pytest.mark.parametrize("name", ["", "../ada", "a/b", ".hidden", "a b", "a\n", "ä", "x" * 65])
def test_names_that_no_site_can_have(own: Authority, name: str) -> None:
    before = files(own)
    with pytest.raises(FedlinkError) as e:
        own.issue_site(name, 1)
    assert e.value.reason is Reason.BAD_NAME
    assert files(own) == before


@pytest.mark.parametrize("host", ["", "a b", "a:8470", "http://a", "ümlaut.example", "a/b"])
def test_hosts_that_are_none(own: Authority, host: str) -> None:
    with refuses(Reason.BAD_CONFIG, "is neither a host name nor an address"):
        own.issue_server(["good.example", host], 1)
    assert not (own.directory / "server.crt").exists()


@pytest.mark.parametrize("length", [64, 65, 253])
def test_a_long_host_name(own: Authority, length: int) -> None:
    host = ("x" * 49 + ".") * 5 + "abc"
    host = host[:length].rstrip(".") if length < 253 else host
    assert certificate_facts(own.issue_server([host], 1)).names == (host,)


@pytest.mark.parametrize("name", ["", "x" * 65])
def test_a_name_that_no_certificate_holds(tmp_path: Path, name: str) -> None:
    with refuses(Reason.BAD_CONFIG, "1 to 64 characters"):
        Authority(tmp_path / "pki").create(name)
    assert not (tmp_path / "pki").exists()


def test_without_an_authority(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "none")
    for attempt in (
        lambda: authority.issue_server(["a"], 1),
        lambda: authority.issue_site("a", 1),
        lambda: authority.revoke("x"),
    ):
        with refuses(Reason.BAD_CONFIG, "there is no authority in"):
            attempt()  # type: ignore[no-untyped-call]
    assert not (tmp_path / "none").exists()


# --- Taken back


def test_revoking(own: Authority) -> None:
    ca = own.certificate.read_bytes()
    assert read_revoked(own.revocations, ca) == frozenset()
    facts = {name: certificate_facts(own.issue_site(name, 1)) for name in ("ada", "bob", "ada-2")}
    for count, name in enumerate(("ada", "bob"), 1):
        assert own.revoke(name) == 1
        revoked = read_revoked(own.revocations, ca)
        assert (facts[name].issuer_bytes, facts[name].serial) in revoked
        assert len(revoked) == count
    before = own.revocations.read_bytes()
    with refuses(Reason.BAD_CONFIG, "every certificate of 'ada' is revoked already"):
        own.revoke("ada")
    assert own.revocations.read_bytes() == before
    # A new one of the same name is good.
    new = certificate_facts(own.issue_site("ada", 1))
    assert (new.issuer_bytes, new.serial) not in read_revoked(own.revocations, ca)


def test_a_former_certificate_is_revoked_with_the_newest(own: Authority) -> None:
    both = [certificate_facts(own.issue_site("ada", 1)) for _ in range(2)]
    assert both[0].serial != both[1].serial
    assert own.revoke("ada") == 2
    revoked = read_revoked(own.revocations, own.certificate.read_bytes())
    assert {(f.issuer_bytes, f.serial) for f in both} == revoked


def test_revoking_what_was_never_made(own: Authority) -> None:
    own.issue_server(["a.example"], 1)
    before = own.revocations.read_bytes()
    for name in ("ada", "a.example"):
        with refuses(Reason.BAD_CONFIG, f"no certificate of '{name}' was ever made here"):
            own.revoke(name)
    assert own.revocations.read_bytes() == before


def test_no_certificate_outlives_the_authority(own: Authority) -> None:
    end = certificate_facts(own.certificate).not_after
    assert certificate_facts(own.issue_site("ada", AUTHORITY_DAYS + 100)).not_after == end


def test_a_lost_list_is_not_begun_anew_in_silence(own: Authority) -> None:
    for name in ("ada", "bob"):
        own.issue_site(name, 1)
    own.revoke("ada")
    for damage in (own.revocations.unlink, lambda: own.revocations.write_bytes(b"junk")):
        damage()
        with refuses(Reason.BAD_CONFIG, "revoked.crl"):
            own.revoke("bob")


def test_the_commands(tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    assert call("fedserver", "certificate", "authority", str(pki)).stdout.strip() == str(pki / "ca.crt")
    made = call("fedserver", "certificate", "site", str(pki), "ada", "bob", "--days", "7")
    assert made.stdout.split() == [str(pki / "sites" / f"{n}.crt") for n in ("ada", "bob")]
    facts = certificate_facts(pki / "sites" / "bob.crt")
    assert facts.ends_soon().endswith("in 6 days")
    call("fedserver", "certificate", "authority", str(pki), code=2)
    revoke = ("fedserver", "certificate", "revoke", str(pki), "ada")
    assert call(*revoke).stdout.strip() == str(pki / "revoked.crl")
    assert call(*revoke, code=2).stderr.startswith("fedserver: ")
