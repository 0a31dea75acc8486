"""HTTP proxies between a site and its server: a tunnel with a password, one that looks in, and what does not work."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.federation import Federation, program
from tests.support.pki import Pki
from tests.support.proxy import ConnectProxy, Interception
from tests.support.tls_ground import START, add_site, admit, sentence, token_file, train_a_round

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("proxy")]

SECRET = "s3cret@home"
URL_SECRET = "site:s3cret%40home"


@dataclass
class Ground:
    """Two servers with TLS, and two proxies of a company with a CA of its own."""

    tokens: Federation
    mutual: Federation
    ours: Pki
    company: Pki
    both: Path
    """Both CAs in a file."""
    tunnel: ConnectProxy
    nosy: ConnectProxy
    secrets: dict[str, str]

    def site(self, federation: Federation, name: str, proxy: str, ca: Path, **tls: str) -> Any:
        """A site behind a proxy."""
        extra: dict[str, Any] = {"proxy": proxy, "tls": {"ca": str(ca), **tls}}
        if federation is self.tokens:
            extra["token_file"] = token_file(federation, name, self.secrets[name])
        site = add_site(federation, name, start=False, **extra)
        site.config.chmod(0o600)
        return site


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    root = tmp_path_factory.mktemp("proxy")
    ours, company = Pki(root / "ours"), Pki(root / "company")
    both = company.write("both.crt", ours.ca.read_bytes() + company.ca.read_bytes())
    with (
        Federation(root / "t") as tokens,
        Federation(root / "m") as mutual,
        ConnectProxy(credentials=f"site:{SECRET}") as tunnel,
        ConnectProxy(interception=Interception(company, ours.ca)) as nosy,
    ):
        tls = ours.leaf("server", "127.0.0.1")
        tokens.start_server(tls=tls, max_poll_wait=1.0)
        mutual.start_server(tls={**tls, "client_ca": str(ours.ca)})
        secrets = admit(tokens, "ada", "bob", "carl", "dora")
        admit(mutual, "eve")
        yield Ground(tokens, mutual, ours, company, both, tunnel, nosy, secrets)


def test_a_round_through_a_tunnel_and_through_one_that_is_looked_into(ground: Ground) -> None:
    g = ground
    g.tokens.import_model("start", START)
    ada = g.site(g.tokens, "ada", f"http://{URL_SECRET}@{g.tunnel.address}", g.ours.ca)
    bob = g.site(g.tokens, "bob", f"http://{g.nosy.address}", g.both)
    for site in (ada, bob):
        site.start()
    train_a_round(g.tokens, "r")
    for proxy in (g.tunnel, g.nosy):
        assert proxy.tunnels >= 2
        assert set(proxy.asked) == {g.tokens.address}
    assert g.tunnel.refused == 0
    assert "s3cret" not in ada.daemon.text()

    command = [program("fedclient"), "doctor", "--config", str(ada.config), "--json", "--skip-training-step"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = {c["check"]: c for c in json.loads(done.stdout)}
    assert f"through the proxy {g.tunnel.address} (proxy in site.toml)" in found["address"]["found"]
    assert {found[name]["outcome"] for name in ("address", "tls", "server", "credentials")} == {"ok"}
    assert "s3cret" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "carl",
            r"If 'OU=company,.*' is the proxy's own CA, the proxy 127.0.0.1:\d+ .* looks into the connection",
        ),
        ("dora", r"\(proxy in site.toml\) wants a user and a password; give them in site.toml"),
        (
            "eve",
            r"looks into the connection with a certificate by 'OU=company,.*' and cannot show this site's",
        ),
    ],
    ids=["looks in, CA unknown", "wants a password", "looks in, mutual TLS"],
)
def test_what_does_not_work_is_said_in_a_sentence(ground: Ground, name: str, says: str) -> None:
    g = ground
    if name == "carl":
        site = g.site(g.tokens, name, f"http://{g.nosy.address}", g.ours.ca)
    elif name == "dora":
        site = g.site(g.tokens, name, f"http://{g.tunnel.address}", g.ours.ca)
    else:
        site = g.site(g.mutual, name, f"http://{g.nosy.address}", g.both, **g.ours.leaf("eve"))
    daemon = site.start()
    assert daemon.wait() == 4
    assert re.search(says, sentence(daemon))
