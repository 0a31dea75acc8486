"""Three servers with TLS in three ways, their sites, and what both sides' logs say."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedlink.v1 import admin_service_pb2 as admin_pb
from tests.support.federation import Daemon, Federation, Site, call
from tests.support.pki import Pki, Tls

ADDER = Path(__file__).parent / "workloads" / "adder.py"
START = {"w": np.zeros(4, np.float32), "b": np.zeros(2, np.float32)}


def add_site(federation: Federation, name: str, *, start: bool = True, **extra: Any) -> Site:
    """A site that trains nothing but `work` of ada and bob."""
    server = extra.pop("server", "")
    workload = "work" if name in ("ada", "bob") else "idle"
    extra = {"state_dir": f"state-{name}", **extra}
    return federation.site(
        name, "adder:Adder", source=ADDER, workload=workload, server=server, extra=extra, start=start
    )


def events(daemon: Daemon | None) -> list[dict[str, Any]]:
    """Every line of a log."""
    assert daemon is not None
    return [json.loads(line) for line in daemon.text().splitlines() if line.startswith("{")]


def sentence(daemon: Daemon | None) -> str:
    """What a daemon ended with: its last line, and the only one that is not of its log."""
    assert daemon is not None
    *log, last = daemon.text().strip().splitlines()
    assert last.startswith("fedclient: "), last
    assert not [line for line in log if not line.startswith("{")], log
    return last


def broken_handshake(federation: Federation, cause: str, after: int = 0) -> bool:
    """Whether the server's log has a handshake that failed for this cause, after so many lines."""
    found = [e for e in events(federation.server)[after:] if e["event"] == "refused a connection"]
    return any(cause in e["because"] and e["connections"] > 0 for e in found)


def refused_call(federation: Federation, words: str) -> bool:
    """Whether the server's log has a call that it refused with these words."""
    return any(e["event"] == "refused" and words in e["error"] for e in events(federation.server))


def token_file(federation: Federation, name: str, token: str) -> str:
    """A token in a file."""
    path = federation.root / f"{name}.token"
    path.touch(0o600)
    path.write_text(token + "\n")
    return str(path)


def admit(federation: Federation, *names: str) -> dict[str, str]:
    """Admit sites; returns their tokens."""
    with federation.admin() as stub:
        return {n: stub.AddClient(admin_pb.AddClientRequest(name=n), timeout=60).token for n in names}


def connected(federation: Federation, name: str) -> bool:
    """Whether the server sees a site."""
    with federation.admin() as stub:
        found = stub.ListClients(admin_pb.ListClientsRequest(), timeout=60).clients
    return any(c.name == name and c.connected for c in found)


def train_a_round(federation: Federation, run: str) -> None:
    """A round of ada and bob."""
    settings = {"amount": 1.0, "steps": 2}
    federation.create_run(run, workload="work", model="start", settings=settings)
    assert federation.finish(run)[-1]["data"]["state"] == "completed"
    done = federation.round(run, 1)
    assert done
    assert {t.client for t in done.tasks if t.kind == "train"} == {"ada", "bob"}


@dataclass
class Ground:
    """CAs, and servers that go by them."""

    ours: Pki
    """CA of the server's certificate and of some sites."""
    other: Pki
    """A CA that nobody trusts."""
    own: Path
    """A CA made by `fedserver certificate`; that of the other sites."""
    mutual: Federation
    tokens: Federation
    open: Federation
    secrets: dict[str, str] = field(default_factory=dict)

    def put_revocations(self) -> None:
        """Give the mutual server the lists of both CAs."""
        lists = self.ours.revoked.read_bytes() + (self.own / "revoked.crl").read_bytes()
        self.ours.write("all.crl", lists)

    def of_own(self, name: str) -> Tls:
        """`[tls]` of a site with a certificate of `fedserver certificate`."""
        call("fedserver", "certificate", "site", str(self.own), name)
        sites = self.own / "sites"
        return {
            "ca": str(self.own / "ca.crt"),
            "certificate": str(sites / f"{name}.crt"),
            "key": str(sites / f"{name}.key"),
        }


def local(federation: Federation) -> str:
    """A server's address on loopback."""
    return "127.0.0.1:" + federation.address.rpartition(":")[2]
