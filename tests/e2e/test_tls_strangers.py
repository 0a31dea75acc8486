"""Certificates that other tools and other purposes gave: what both sides of a handshake make of them."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedlink.corelog import handshakes_explained
from fedlink.route import route_to
from fedlink.tls import ClientTls, probe, refusal
from fedserver.authority import Authority

pytestmark = pytest.mark.slow


@pytest.fixture
def own(tmp_path: Path) -> Authority:
    authority = Authority(tmp_path / "pki")
    authority.create("Test CA")
    return authority


@contextlib.contextmanager
def listener(certificate: Path, client_ca: Path | None = None) -> Iterator[str]:
    """A gRPC server without a service; its address."""
    pair = certificate.with_suffix(".key").read_bytes(), certificate.read_bytes()
    authorities = client_ca.read_bytes() if client_ca else None
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair], authorities, bool(client_ca)))
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def connects(address: str, tls: ClientTls) -> bool:
    """Whether gRPC itself, without a diagnosis, takes the server."""
    assert tls.ca
    pair = (tls.key.read_bytes(), tls.certificate.read_bytes()) if tls.key and tls.certificate else (None, None)
    options = [("grpc.ssl_target_name_override", tls.server_name)] if tls.server_name else []
    credentials = grpc.ssl_channel_credentials(tls.ca.read_bytes(), *pair)
    with grpc.secure_channel(address, credentials, options) as channel, contextlib.suppress(grpc.FutureTimeoutError):
        grpc.channel_ready_future(channel).result(2)
        # In TLS 1.3 the server's verdict comes after the client's.
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/none/None", _registered_method=False)(b"", timeout=2)
        return caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    return False


def test_a_site_cannot_answer_in_the_servers_place(own: Authority) -> None:
    with listener(own.issue_site("ada", 1)) as address:
        for name in ("", "ada"):
            tls = ClientTls(ca=own.certificate, server_name=name)
            assert not connects(address, tls)
            found = refusal(route_to(address), tls)
            assert found
            assert "shows the certificate of 'ada', which is not one for servers" in found.message


def test_a_servers_certificate_is_no_sites(own: Authority) -> None:
    server = own.issue_server(["127.0.0.1"], 1)
    tls = ClientTls(own.certificate, server, server.with_suffix(".key"))
    causes: list[str] = []
    with handshakes_explained(causes.append), listener(server, own.certificate) as address:
        assert not connects(address, tls)
        found = refusal(route_to(address), tls)
    assert found
    assert "the certificate is not one for clients" in found.message
    assert "its certificate is not one for clients" in causes


def test_a_plain_certificate_of_openssls_kind_is_taken(tmp_path: Path) -> None:
    """No key usage, no key identifiers: RFC 5280 asks for them, gRPC does not, and the diagnosis must not either."""
    now, day = dt.datetime.now(dt.UTC), dt.timedelta(days=1)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    ca, leaf = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("Plain CA", "server"))
    builders = [
        x509.CertificateBuilder(ca, subject, key.public_key(), serial, now - day, now + day)
        for serial, (subject, key) in enumerate(zip((ca, leaf), keys, strict=True), 1)
    ]
    builders[0] = builders[0].add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builders[1] = builders[1].add_extension(x509.SubjectAlternativeName([x509.DNSName("fed.example")]), critical=False)
    for name, builder in zip(("ca", "server"), builders, strict=True):
        signed = builder.sign(keys[0], hashes.SHA256())
        (tmp_path / f"{name}.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    secret = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (tmp_path / "server.key").write_bytes(keys[1].private_bytes(*secret))
    with listener(tmp_path / "server.crt") as address:
        tls = ClientTls(ca=tmp_path / "ca.crt", server_name="fed.example")
        assert connects(address, tls)
        assert probe(route_to(address), tls).server.names == ("fed.example",)
        assert refusal(route_to(address), tls) is None
