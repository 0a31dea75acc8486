"""The server's side of TLS: its certificate, read again when the files change, and who a client's certificate is."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import grpc
from cryptography import x509

from fedlink import log as logs
from fedlink.certificates import CertificateFacts, facts_of, read_authorities, read_pair, read_revoked
from fedlink.errors import FedlinkError, Reason
from fedserver.settings import TlsSettings

_KNOWN = 10_000
"""Certificates of clients whose facts are kept."""
_TRY_AGAIN = 5.0
"""Seconds after which files that could not be used are read once more."""
_WARN_EVERY = 86_400.0
_Stamp = tuple[tuple[int, int, int], ...]


class Certificates:
    """What `[tls]` names, as it is now.

    Args:
        tls: the settings.

    Raises:
        FedlinkError: BAD_CONFIG if a file cannot be used.
    """

    def __init__(self, tls: TlsSettings) -> None:
        self._tls = tls
        self._log = logs.get("tls")
        self._lock = threading.Lock()
        self._clients: OrderedDict[bytes, tuple[CertificateFacts, ...]] = OrderedDict()
        self._stamp = self._look()
        self._try_again = self._warn_again = 0.0
        self._load_pair()
        self._load_clients()
        self._configure()
        self._warn(time.monotonic())

    def _load_pair(self) -> None:
        chain, key, facts = read_pair(self._tls.certificate, self._tls.key)
        self._pair, self.facts = (key, chain), facts

    def _load_clients(self) -> None:
        authorities = read_authorities(self._tls.client_ca, "tls.client_ca") if self._tls.client_ca else None
        revoked = read_revoked(self._tls.revoked, authorities) if self._tls.revoked and authorities else frozenset()
        self._authorities, self._revoked = authorities, revoked

    def _configure(self) -> None:
        self._configuration = grpc.ssl_server_certificate_configuration([self._pair], self._authorities)

    def credentials(self) -> grpc.ServerCredentials:
        """For the listener; every handshake uses the files as they are then."""
        handed = self._configuration

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal handed
            self._refresh()
            if self._configuration is handed:
                return None
            handed = self._configuration
            return handed

        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            changed,  # type: ignore[arg-type]  # None is gRPC's word for "as before"; its stubs do not know
            require_client_authentication=self._tls.client_ca is not None,
        )

    def _refresh(self) -> None:
        """Read the files again if they have changed; what cannot be used is said, and the former stays.

        The server's own pair and what judges clients are read apart: a key that is being replaced
        must not keep a revocation from being seen.
        """
        with self._lock:
            now, stamp = time.monotonic(), self._look()
            self._warn(now)
            if stamp == self._stamp and not 0 < self._try_again <= now:
                return
            said, self._stamp, self._try_again = stamp == self._stamp, stamp, 0.0
            for load in (self._load_pair, self._load_clients):
                try:
                    load()
                except FedlinkError as e:
                    # A certificate that is not valid yet becomes so without any file changing.
                    self._try_again = now + _TRY_AGAIN
                    if not said:
                        self._log.error("new certificates cannot be used; going on with the former", error=e.message)
            self._configure()
            if not self._try_again:
                self._log.info("certificates read again", ends=self.facts.not_after.isoformat())

    def _warn(self, now: float) -> None:
        if now >= self._warn_again:
            self._warn_again = now + _WARN_EVERY
            if soon := self.facts.ends_soon():
                self._log.warning(f"the server's certificate {soon}", file=str(self._tls.certificate))

    def client_name(self, peer: Mapping[str, Iterable[bytes]]) -> str:
        """Who a client is by the certificate of its connection.

        A connection may outlive the certificate that opened it, so each call looks at it anew.

        Args:
            peer: `auth_context()` of the call.

        Raises:
            FedlinkError: BAD_CREDENTIALS if it expired or was revoked, or names nobody.
        """
        pem = next(iter(peer.get("x509_pem_cert", ())), b"")
        if not pem:
            raise FedlinkError(Reason.BAD_CREDENTIALS, "this server asks every client for a certificate")
        facts, *signers = self._facts(pem, b"".join(peer.get("x509_pem_cert_chain", ())))
        whose = f"the certificate of {facts.common_name or 'a client without a name'!r}"
        if trouble := facts.trouble():
            raise FedlinkError(Reason.BAD_CREDENTIALS, f"{whose} {trouble}; ask the server's operator for a new one")
        self._refresh()
        if (facts.issuer_bytes, facts.serial) in self._revoked:
            raise FedlinkError(
                Reason.BAD_CREDENTIALS,
                f"{whose}, serial number {facts.serial:x}, was revoked; ask the server's operator for a new one",
            )
        for signer in signers:
            if (signer.issuer_bytes, signer.serial) in self._revoked:
                raise FedlinkError(
                    Reason.BAD_CREDENTIALS,
                    f"{whose} comes from a CA whose own certificate, serial number {signer.serial:x}, was revoked; "
                    "ask the server's operator for a new one",
                )
        return facts.common_name

    def _facts(self, pem: bytes, chain: bytes) -> tuple[CertificateFacts, ...]:
        facts = self._clients.get(pem + chain)
        if facts is None:
            found = tuple(facts_of(c) for c in x509.load_pem_x509_certificates(pem + b"\n" + chain))
            facts = self._clients[pem + chain] = found
            if len(self._clients) > _KNOWN:
                self._clients.popitem(last=False)
        return facts

    def _look(self) -> _Stamp:
        stamps = []
        for file in self._tls.files:
            try:
                found = os.stat(file)  # noqa: PTH116 - os.stat follows how secrets are mounted, and costs a microsecond
            except OSError:
                stamps.append((0, 0, 0))
            else:
                stamps.append((found.st_ctime_ns, found.st_size, found.st_ino))
        return tuple(stamps)
