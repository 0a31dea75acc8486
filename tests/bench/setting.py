"""Where a federation to be measured stands: on loopback, or on loopback with mutual TLS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlink.v1 import admin_service_pb2 as pb
from tests.support.federation import Federation
from tests.support.pki import Pki


class Setting:
    """Loopback, as `fedserver serve` and `fedclient start` are without further configuration."""

    def federation(self, root: Path) -> Federation:
        """One below a directory, with nothing started."""
        return Federation(root)

    def start_server(self, federation: Federation) -> None:
        """Start its server."""
        federation.start_server()

    def site(self, federation: Federation, name: str) -> dict[str, Any]:
        """Further keys of a site's configuration."""
        return {}


class Mutual(Setting):
    """Loopback with mutual TLS: every site has a certificate of its own."""

    def start_server(self, federation: Federation) -> None:
        """Start it with a certificate, and have it ask the sites for theirs."""
        self._pki = Pki(federation.root / "pki")
        leaf = self._pki.leaf("server", "localhost", "127.0.0.1")
        federation.start_server(tls={**leaf, "client_ca": str(self._pki.ca)})

    def site(self, federation: Federation, name: str) -> dict[str, Any]:
        """Its certificate; it is admitted."""
        with federation.admin() as stub:
            stub.AddClient(pb.AddClientRequest(name=name), timeout=60)
        return {"tls": self._pki.site(name, self._pki.ca)}
