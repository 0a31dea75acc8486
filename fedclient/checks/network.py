"""Checks "address" and "tls": the way to the server, before anything of ours is said."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import socket
import time

from fedclient.aside import off_loop
from fedclient.checks.examination import Examination
from fedclient.checks.finding import Finding, failed, ok, together, warning
from fedlink import tls
from fedlink.certificates import CertificateFacts, certificate_facts
from fedlink.errors import FedlinkError, Reason
from fedlink.route import Route, is_loopback

_CONNECT_SECONDS = 8.0


async def check_address(visit: Examination) -> Finding:
    """The name resolves, and something listens there."""
    if visit.site.route.proxy:
        return await _through_proxy(visit.site.route)
    try:
        found = await off_loop(socket.getaddrinfo, visit.host, visit.port, 0, socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as e:
        why = e.strerror if isinstance(e, socket.gaierror) else "not a host name"
        return failed(
            f"the name {visit.host} does not resolve: {why}",
            "Correct server in site.toml, or ask whoever runs the name service here.",
        )
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    began = time.monotonic()
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(visit.host, visit.port)
    except TimeoutError:
        return failed(
            f"{visit.site.server} ({addresses[0]}) does not answer",
            f"A firewall may drop the connection: have outgoing TCP to port {visit.port} allowed. "
            "Or the server's machine is down.",
        )
    except OSError as e:
        return failed(
            f"nothing accepts connections at {visit.site.server} ({', '.join(addresses)}): {e.strerror or e}",
            "Correct server in site.toml, or ask the server's operator whether it runs and on which port it listens.",
        )
    milliseconds = (time.monotonic() - began) * 1000
    reached = writer.get_extra_info("peername")
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    at = "" if reached is None or reached[0] == visit.host else f" ({reached[0]})"
    return ok(f"{visit.site.server}{at} accepts connections, in {milliseconds:.0f} ms")


async def _through_proxy(route: Route) -> Finding:
    began = time.monotonic()
    try:
        connection = await off_loop(route.connect, _CONNECT_SECONDS)
    except FedlinkError as e:
        advice = "Correct proxy in site.toml, or the variable that names it; or ask whoever runs the proxy."
        if e.reason is Reason.UNREACHABLE:
            advice = f"Correct server or proxy in site.toml; or have the proxy allow connections to {route}."
        return failed(e.message, advice)
    connection.close()
    milliseconds = (time.monotonic() - began) * 1000
    return ok(f"{route} accepts connections through the proxy {route.proxy}, in {milliseconds:.0f} ms")


async def check_tls(visit: Examination) -> Finding:
    """Whether the connection is encrypted, whom the certificates are of, and how long they last."""
    if visit.site.client_tls is None:
        return await _unencrypted(visit)
    return await _encrypted(visit, visit.site.client_tls)


async def _unencrypted(visit: Examination) -> Finding:
    if refusal := await off_loop(tls.refusal, visit.site.route, None):
        return failed(refusal.message, "The CA's certificate comes from the server's operator.")
    if is_loopback(visit.site.server):
        return ok("not encrypted; the connection does not leave this machine")
    return warning(
        "not encrypted: insecure = true; everybody on the way can read and change the weights",
        "Ask the server's operator for TLS, then replace insecure = true by [tls].",
    )


async def _encrypted(visit: Examination, mine: tls.ClientTls) -> Finding:
    try:
        own = await off_loop(certificate_facts, mine.certificate) if mine.certificate else None
    except FedlinkError as e:
        return failed(e.message, "Correct [tls] in site.toml, or the file that it names.")
    findings = [_own(own, visit.site.name)] if own else []
    try:
        handshake = await off_loop(tls.probe, visit.site.route, mine)
    except FedlinkError as e:
        advice = "Nothing is sent to this server until that is settled."
        if e.reason is Reason.UNREACHABLE:
            advice = "Try again; if it stays so, something between here and the server cuts TLS off."
        return together([failed(e.message, advice), *findings])
    return together([_servers(handshake), *findings])


def _servers(handshake: tls.Handshake) -> Finding:
    facts = handshake.server
    found = f"{handshake.version}; the server's certificate is by {facts.issuer!r} and {_lasts(facts)}"
    if facts.ends_soon():
        return warning(found, "Tell the server's operator to renew it: after that day no site can connect.")
    return ok(found)


def _own(facts: CertificateFacts, site: str) -> Finding:
    if trouble := facts.trouble():
        return failed(f"this site's certificate {trouble}", "Ask the server's operator for a new certificate.")
    if facts.common_name != site:
        return failed(
            f"this site's certificate is for {facts.common_name!r}, site.toml says {site!r}",
            "Correct name in site.toml, or name this site's own certificate in [tls].",
        )
    found = f"this site's is by {facts.issuer!r} and {_lasts(facts)}"
    if facts.ends_soon():
        return warning(found, "Ask the server's operator for a new certificate for this site in time.")
    return ok(found)


def _lasts(facts: CertificateFacts) -> str:
    days = (facts.not_after - dt.datetime.now(dt.UTC)).days
    return f"lasts {days} days more"
