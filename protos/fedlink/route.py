"""The way to a server: straight, or through an HTTP proxy that opens a tunnel (CONNECT).

gRPC goes through the proxy by itself; what is here says which one it takes, and goes the
same way for a diagnosis.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from fedlink.errors import FedlinkError, Reason

NO_PROXY = "none"
"""What is configured for: straight, whatever the environment says."""

_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXEMPTION_VARIABLES = ("no_grpc_proxy", "no_proxy")
_URL = re.compile(r"http://(?:(?P<who>[^@/\s]+)@)?(?P<address>(?:\[[0-9A-Fa-f:.]+\]|[^@/:\s]+):\d{1,5})/?")
_MAX_HEAD = 16 << 10


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy.

    Attributes:
        address: HOST:PORT.
        credentials: USER:PASSWORD, or empty.
        source: where it is configured.
    """

    address: str
    credentials: str
    source: str

    def __str__(self) -> str:
        return f"{self.address} ({self.source})"


@dataclass(frozen=True, slots=True)
class Route:
    """A server's address and the way there.

    Attributes:
        address: HOST:PORT.
        proxy: what the connection goes through, if anything.
        configured: the URL that gRPC has to be told; empty for none, None to leave it to the environment.
    """

    address: str
    proxy: Proxy | None = None
    configured: str | None = None

    def __str__(self) -> str:
        return self.address

    @property
    def host(self) -> str:
        """The host, without brackets."""
        return host_of(self.address)

    @property
    def options(self) -> list[tuple[str, Any]]:
        """Channel options that make gRPC take this way."""
        return [] if self.configured is None else [("grpc.http_proxy", self.configured)]

    def connect(self, seconds: float) -> socket.socket:
        """A connection to the server, on which nothing has been said; blocks.

        Raises:
            OSError: it does not come about.
            UnicodeError: the host is not a name.
            FedlinkError: PROXY_REFUSED; UNREACHABLE if the proxy, or the server from there, cannot be reached.
        """
        if self.proxy is None:
            return _dial(self.address, seconds)
        try:
            connection = _dial(self.proxy.address, seconds)
        except (OSError, UnicodeError) as e:
            raise FedlinkError(Reason.UNREACHABLE, f"the proxy {self.proxy} cannot be reached: {e}") from None
        with contextlib.ExitStack() as unless_open:
            unless_open.callback(connection.close)
            _open_tunnel(connection, self.address, self.proxy)
            unless_open.pop_all()
        return connection


def host_of(address: str) -> str:
    """The host in HOST:PORT, without brackets."""
    return address.rpartition(":")[0].strip("[]")


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT can only be this machine."""
    host = host_of(address)
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def route_to(address: str, configured: str | None = None, environment: Mapping[str, str] = os.environ) -> Route:
    """The way that gRPC takes to HOST:PORT.

    Args:
        address: the server's.
        configured: the proxy's URL, as `check_proxy` lets it pass; `NO_PROXY` for none; None: the environment
            decides, except that a server on this machine is not looked for elsewhere.
        environment: where gRPC looks, too.
    """
    if configured == NO_PROXY or (configured is None and is_loopback(address)):
        return Route(address, None, "")
    url, source = configured, "proxy in site.toml"
    if url is None:
        # The first that is set, even to nothing.
        source = next((v for v in _VARIABLES if v in environment), "")
        url = environment.get(source, "")
    return Route(address, None if _exempt(host_of(address), environment) else _proxy(url, source), configured)


def check_proxy(url: str) -> str:
    """What may stand for `proxy` in a configuration.

    Raises:
        ValueError: in one sentence, without the password.
    """
    if url in ("", NO_PROXY):
        return NO_PROXY
    if not _URL.fullmatch(url):
        raise ValueError('not "http://HOST:PORT", "http://USER:PASSWORD@HOST:PORT" or "none"')
    return url


def _proxy(url: str, source: str) -> Proxy | None:
    # What gRPC cannot read, it does without.
    found = _URL.fullmatch(url)
    return Proxy(found["address"], unquote(found["who"] or ""), source) if found else None


def _exempt(host: str, environment: Mapping[str, str]) -> bool:
    names = next((environment[v] for v in _EXEMPTION_VARIABLES if v in environment), "")
    return any(_exempts(name.strip().lower(), host.lower()) for name in names.split(",") if name.strip())


def _exempts(name: str, host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host) in ipaddress.ip_network(name, strict=False)
    return host == name or host.endswith(f".{name.removeprefix('.')}")


def _dial(address: str, seconds: float) -> socket.socket:
    return socket.create_connection((host_of(address), int(address.rpartition(":")[2])), timeout=seconds)


def _open_tunnel(connection: socket.socket, address: str, proxy: Proxy) -> None:
    lines = [f"CONNECT {address} HTTP/1.1", f"Host: {address}"]
    if proxy.credentials:
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(proxy.credentials.encode()).decode()}")
    try:
        connection.sendall("".join(f"{line}\r\n" for line in (*lines, "")).encode())
        head = b""
        # Byte by byte: what follows is the server's.
        while not head.endswith(b"\r\n\r\n"):
            byte = connection.recv(1)
            if not byte or len(head) >= _MAX_HEAD:
                break
            head += byte
    except OSError as e:
        raise FedlinkError(Reason.UNREACHABLE, f"the proxy {proxy} does not answer: {e}") from None
    answer = re.match(rb"HTTP/1\.[01] (\d{3})", head)
    if not answer:
        raise FedlinkError(Reason.PROXY_REFUSED, f"what listens at {proxy.address} ({proxy.source}) is no HTTP proxy")
    _judge(int(answer[1]), address, proxy)


def _judge(status: int, address: str, proxy: Proxy) -> None:
    if status // 100 == 2:
        return
    if status == 407:
        what = "refuses the user and password that it was given" if proxy.credentials else "wants a user and a password"
        advice = 'give them in site.toml, as proxy = "http://USER:PASSWORD@HOST:PORT"'
        raise FedlinkError(Reason.PROXY_REFUSED, f"the proxy {proxy} {what}; {advice}")
    if status // 100 == 5:
        raise FedlinkError(Reason.UNREACHABLE, f"the proxy {proxy} cannot reach {address} (HTTP {status})")
    raise FedlinkError(
        Reason.PROXY_REFUSED,
        f"the proxy {proxy} does not let connections to {address} pass (HTTP {status}); have its operator allow them",
    )
