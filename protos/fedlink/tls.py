"""TLS on both sides, and what to say when it fails.

gRPC tells little of a failed handshake ("Socket closed"), so the client makes another one by
itself, with the standard library, and finds out by what it sees and by elimination:

    the server's certificate fails here      wrong CA, wrong name, expired: OpenSSL says which
    no TLS on one of the two sides           the bytes look wrong
    the server hangs up after the handshake  it refused our certificate: absent, expired, or of another CA
"""

from __future__ import annotations

import contextlib
import datetime as dt
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography import x509

from fedlink.certificates import CertificateFacts, certificate_facts, facts_of, read_authorities, read_file, read_pair
from fedlink.errors import FedlinkError, Reason
from fedlink.route import Route

PROBE_SECONDS = 3.0
"""How long a handshake made for a diagnosis may take."""

_AGAIN_AFTER = 0.5
_EXPIRED, _NOT_YET_VALID, _WRONG_PURPOSE, _WRONG_HOST, _WRONG_ADDRESS = 10, 9, 26, 62, 64
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


@dataclass(frozen=True, slots=True)
class ClientTls:
    """What a client brings to a handshake: PEM files.

    Attributes:
        ca: certificates that the server's must come from; None for what this machine trusts.
        certificate: own chain, for mutual TLS.
        key: its private key.
        server_name: the name in the server's certificate, if it is not the host in the address.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str = ""

    def check(self) -> CertificateFacts | None:
        """Read every file; returns the facts of the own certificate, if there is one.

        Raises:
            FedlinkError: BAD_CONFIG, naming the file and what is wrong with it.
        """
        if self.ca:
            read_authorities(self.ca, "tls.ca")
        return read_pair(self.certificate, self.key)[2] if self.certificate and self.key else None


@dataclass(frozen=True, slots=True)
class Handshake:
    """A handshake that went well."""

    version: str
    """Such as TLSv1.3."""
    server: CertificateFacts


def open_channel(server: Route, tls: ClientTls | None, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
    """A channel to a server; unencrypted without `tls`.

    Raises:
        FedlinkError: BAD_CONFIG if a file cannot be used.
    """
    options = [*options, *server.options]
    if tls is None:
        return grpc.aio.insecure_channel(server.address, options)
    own = read_pair(tls.certificate, tls.key)[:2] if tls.certificate and tls.key else (None, None)
    credentials = grpc.ssl_channel_credentials(_roots(tls), own[1], own[0])
    if tls.server_name:
        options = [*options, ("grpc.ssl_target_name_override", tls.server_name)]
    return grpc.aio.secure_channel(server.address, credentials, options)


def probe(server: Route, tls: ClientTls) -> Handshake:
    """Make one handshake and hang up; blocks for a few seconds at most.

    Raises:
        FedlinkError: UNREACHABLE; PROXY_REFUSED; BAD_CONFIG if a file cannot be used; TLS_REFUSED in a sentence that
            names the cause, whichever side refuses.
    """
    try:
        raw = _connected(server)
    except (OSError, UnicodeError) as e:
        raise FedlinkError(Reason.UNREACHABLE, f"{server} cannot be reached: {e}") from None
    with raw:
        # OpenSSL has no sentences about files, and asks for a pass phrase on the terminal.
        tls.check()
        context = _context(tls)
        try:
            secure = context.wrap_socket(raw, server_hostname=tls.server_name or server.host)
        except ssl.SSLCertVerificationError as e:
            raise FedlinkError(Reason.TLS_REFUSED, _why_distrusted(server, tls, e)) from None
        except OSError as e:
            raise _no_handshake(server, e) from None
        with secure:
            der = secure.getpeercert(binary_form=True) or b""
            facts = facts_of(x509.load_der_x509_certificate(der))
            if secure.selected_alpn_protocol() != "h2":
                raise FedlinkError(Reason.TLS_REFUSED, _why_no_http2(server, facts))
            if not _goes_on(secure):
                raise FedlinkError(Reason.TLS_REFUSED, _why_refused(server, tls, facts))
            return Handshake(secure.version() or "", facts)


def refusal(server: Route, tls: ClientTls | None) -> FedlinkError | None:
    """Why no connection comes about, if TLS or a proxy is the reason and not an absent server; blocks for seconds."""
    if tls is None:
        try:
            wants_tls = _wants_tls(server)
        except FedlinkError as e:
            return None if e.reason is Reason.UNREACHABLE else e
        if wants_tls:
            text = f"the server at {server} speaks TLS only; add [tls] with its CA to site.toml, and take insecure out"
            return FedlinkError(Reason.TLS_REFUSED, text)
        return None
    found = None
    # Twice: a server that goes down hangs up, too.
    for pause in (0.0, _AGAIN_AFTER):
        time.sleep(pause)
        try:
            probe(server, tls)
        except FedlinkError as e:
            if e.reason is Reason.UNREACHABLE:
                return None
            found = e
        else:
            return None
    return found


def _no_handshake(server: Route, error: OSError) -> FedlinkError:
    if _answers_without_tls(server):
        text = f"the server at {server} does not speak TLS; turn TLS on at the server, or take [tls] out of site.toml"
        return FedlinkError(Reason.TLS_REFUSED, text)
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return FedlinkError(Reason.TLS_REFUSED, f"the TLS handshake with {server} fails: {error.reason}")
    return FedlinkError(Reason.UNREACHABLE, f"{server} hung up during the TLS handshake: {error}")


def _goes_on(secure: ssl.SSLSocket) -> bool:
    """Whether the server speaks HTTP/2 after the handshake. In TLS 1.3 it judges our certificate only then."""
    try:
        secure.sendall(_HTTP2)
        return bool(secure.recv(1))
    except TimeoutError:
        return True
    except OSError:
        return False


def _why_distrusted(server: Route, tls: ClientTls, error: ssl.SSLCertVerificationError) -> str:
    facts = _shown_certificate(server, tls)
    host = tls.server_name or server.host
    if facts and error.verify_code in (_EXPIRED, _NOT_YET_VALID):
        what = facts.trouble() or f"is not valid at this machine's time, {dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M} UTC"
        return f"the certificate of the server at {server} {what}; its operator has to renew it"
    if facts and error.verify_code in (_WRONG_HOST, _WRONG_ADDRESS):
        names = ", ".join(facts.names) or "no name at all"
        return (
            f"the certificate of the server at {server} is for {names} and not for {host}; "
            "set server (or tls.server_name) in site.toml to a name it is for"
        )
    if facts and error.verify_code == _WRONG_PURPOSE:
        return (
            f"the server at {server} shows the certificate of {facts.common_name!r}, which is not one for servers; "
            "its operator took a wrong file, or somebody else answers in its place"
        )
    issuer = f"by {facts.issuer!r}, " if facts else ""
    return (
        f"the certificate of the server at {server} is signed {issuer}not by a CA in {tls.ca or 'the public list'} "
        f"({error.verify_message}); ask its operator for the CA's certificate and name it as tls.ca in site.toml"
        + _if_intercepted(server, facts)
    )


def _if_intercepted(server: Route, facts: CertificateFacts | None) -> str:
    if server.proxy is None or facts is None:
        return ""
    return (
        f". If {facts.issuer!r} is the proxy's own CA, the proxy {server.proxy} looks into the connection: "
        "have it let this server pass untouched, or add its CA to the file in tls.ca"
    )


def _why_no_http2(server: Route, facts: CertificateFacts) -> str:
    at = f"the proxy {server.proxy}" if server.proxy else "something on the way"
    return (
        f"what answers for {server}, with a certificate by {facts.issuer!r}, does not offer HTTP/2: it is another "
        f"server, or {at} ends TLS and speaks HTTP/1.1 only; have it let this server pass untouched"
    )


def _why_refused(server: Route, tls: ClientTls, shown: CertificateFacts) -> str:
    if tls.certificate is None:
        return (
            f"the server at {server} wants a certificate of this site; "
            "ask its operator for one and name it as tls.certificate and tls.key in site.toml"
        )
    own = certificate_facts(tls.certificate)
    ended = (
        f", or the proxy {server.proxy} looks into the connection with a certificate by {shown.issuer!r} and cannot "
        "show this site's to the server: have it let this server pass untouched"
        if server.proxy
        else ""
    )
    return (
        f"the server at {server} refuses this site's certificate: {own.issuer!r}, which signed it, is not a CA that "
        "the server takes (its tls.client_ca), or the certificate is not one for clients, or not valid by its clock"
        + ended
    )


def _shown_certificate(server: Route, tls: ClientTls) -> CertificateFacts | None:
    with (
        contextlib.suppress(OSError, ValueError),
        _connected(server) as raw,
        _unverified(tls).wrap_socket(raw) as secure,
    ):
        return facts_of(x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b""))
    return None


def _wants_tls(server: Route) -> bool:
    return _shown_certificate(server, ClientTls()) is not None


def _answers_without_tls(server: Route) -> bool:
    with contextlib.suppress(OSError, UnicodeError), _connected(server) as raw:
        raw.sendall(_HTTP2)
        # Length of a SETTINGS frame, its type, no flag but ACK: what a gRPC server says first.
        return raw.recv(4)[3:] == b"\x04"
    return False


def _connected(server: Route) -> socket.socket:
    return server.connect(PROBE_SECONDS)


def _unverified(tls: ClientTls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return _dressed(context, tls)


def _context(tls: ClientTls) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=tls.ca or _system_ca())
    # Set by default from Python 3.13 on, and stricter than gRPC: it refuses what `openssl req -x509` makes.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return _dressed(context, tls)


def _dressed(context: ssl.SSLContext, tls: ClientTls) -> ssl.SSLContext:
    context.set_alpn_protocols(["h2"])
    if tls.certificate and tls.key:
        context.load_cert_chain(tls.certificate, tls.key)
    return context


def _roots(tls: ClientTls) -> bytes | None:
    if tls.ca:
        return read_authorities(tls.ca, "tls.ca")
    # Not parsed: public lists have certificates with flaws that only a stricter parser minds.
    system = _system_ca()
    return read_file(system, "this machine's list of CAs") if system else None


def _system_ca() -> Path | None:
    """What this machine trusts, where it says so in one file; else gRPC has a list of its own."""
    file = ssl.get_default_verify_paths().cafile
    return Path(file) if file else None
