"""Checks "server", "clock" and "credentials": what the server says, without opening a session."""

from __future__ import annotations

import time
from dataclasses import dataclass

import grpc
import grpc.aio

import fedlink
from fedclient.checks.examination import Examination
from fedclient.checks.finding import Finding, failed, ok, skipped, warning
from fedclient.session import credentials
from fedlink import rpc
from fedlink.errors import FedlinkError, Reason
from fedlink.v1 import blob_service_pb2 as blob_pb
from fedlink.v1 import coordination_service_pb2 as pb
from fedlink.v1.blob_service_pb2_grpc import BlobServiceStub
from fedlink.v1.coordination_service_pb2_grpc import CoordinationServiceStub

CLOCK_WARNS = 5.0
"""Seconds between the clocks that are worth a word."""
CLOCK_FAILS = 60.0
"""Seconds between the clocks that make certificates and times in logs unreliable."""

_CALL_SECONDS = 10.0
_CLOCK_CALLS = 3


async def check_server(visit: Examination) -> Finding:
    """A fedserver of a release that fits answers."""
    try:
        visit.server = info = await _server_info(visit)
    except FedlinkError as e:
        if e.reason is Reason.BAD_CONFIG:
            return failed(e.message, "Correct [tls] in site.toml, or the file that it names.")
        return failed(
            f"what listens at {visit.site.server} does not answer as a fedserver: {e.message}",
            "Correct server in site.toml; if that is right, ask the operator what is between here and the server.",
        )
    found = f"fedserver {info.software_version[:32]}, protocol {info.protocol_version}"
    ours = fedlink.PROTOCOL_VERSION
    if ours < info.min_protocol_version:
        return failed(
            f"{found}; it needs at least protocol {info.min_protocol_version}, this site speaks {ours}",
            "Upgrade fedlink at this site.",
        )
    if ours > info.protocol_version:
        return failed(
            f"{found}; this site speaks protocol {ours}",
            "Have the server upgraded, or use an older fedlink at this site.",
        )
    same = info.software_version == fedlink.__version__
    return ok(found if same else f"{found}; this site has release {fedlink.__version__}, which fits")


async def check_clock(visit: Examination) -> Finding:
    """The clocks of the server and this machine agree."""
    assert visit.server is not None
    if not visit.server.HasField("time"):
        return skipped("this server does not tell its time", "Compare the clocks by hand.")
    readings = [await _reading(visit) for _ in range(_CLOCK_CALLS)]
    best = min(readings, key=lambda r: r.uncertainty)
    ahead = best.ahead
    found = f"this machine's clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    # The way there and the way back need not be equally long.
    surely = abs(ahead) - best.uncertainty
    if surely > CLOCK_FAILS:
        return failed(
            found,
            "Set the clock of the machine that is wrong and keep it right with NTP: by a wrong clock TLS takes good "
            "certificates for expired or not yet valid, and the times in both logs do not match.",
        )
    if surely > CLOCK_WARNS:
        return warning(found, "Keep both clocks right with NTP (chrony or systemd-timesyncd).")
    return ok(found if abs(ahead) >= 0.1 else "this machine's clock is the server's to within 0.1 s")


async def check_credentials(visit: Examination) -> Finding:
    """The server takes this site for the one it says it is, by a call that moves nothing and touches no session."""
    assert visit.server is not None
    try:
        metadata = credentials(visit.site)
    except FedlinkError as e:
        return skipped(f"needs the token: {e.message}")
    if "probe" not in visit.server.features:
        return skipped("this server cannot say it without opening a session", "Have the server upgraded.")
    call = BlobServiceStub(visit.channel).ProbeDownload(
        blob_pb.ProbeDownloadRequest(size=0), metadata=metadata, timeout=_CALL_SECONDS
    )
    try:
        await call.read()
    except grpc.RpcError as e:
        error = rpc.from_rpc_error(e)
        return failed(error.message, _how_to_be_admitted(visit, error))
    means = "its token" if visit.site.token_file else "its certificate" if _certified(visit) else "its name alone"
    return ok(f"the server admits {visit.site.name} by {means}")


@dataclass(frozen=True)
class _Reading:
    ahead: float
    """Seconds by which this machine's clock is ahead, if both ways are equally long."""
    uncertainty: float


async def _reading(visit: Examination) -> _Reading:
    began, wall = time.monotonic(), time.time()
    info = await _server_info(visit)
    half = (time.monotonic() - began) / 2
    return _Reading(wall + half - info.time.ToNanoseconds() / 1e9, half)


async def _server_info(visit: Examination) -> pb.GetServerInfoResponse:
    stub = CoordinationServiceStub(visit.channel)
    try:
        info: pb.GetServerInfoResponse = await stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=_CALL_SECONDS)
    except grpc.RpcError as e:
        raise rpc.from_rpc_error(e) from None
    return info


def _certified(visit: Examination) -> bool:
    tls = visit.site.client_tls
    return tls is not None and tls.certificate is not None


def _how_to_be_admitted(visit: Examination, error: FedlinkError) -> str:
    name = visit.site.name
    if error.reason not in (Reason.BAD_CREDENTIALS, Reason.BAD_NAME):
        return "Try again; if it stays so, the server's log says why."
    if _certified(visit):
        return f"Ask the server's operator to admit this site: fedserver client add {name}"
    return (
        f"Ask the server's operator for a token (fedserver client add {name}; with --rotate if there was one), "
        "put it into a file with mode 600, and name that as token_file in site.toml."
    )
