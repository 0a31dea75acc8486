"""Which proxy a connection goes through: as gRPC reads the environment, and as site.toml says."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedclient.settings import load_site
from fedlink.errors import FedlinkError
from fedlink.route import route_to

SERVER = "fed.example.org:8470"
URL = "http://user:p%40ss@proxy:3128"


@pytest.mark.parametrize(
    ("environment", "server", "proxy"),
    [
        ({}, SERVER, None),
        ({"https_proxy": URL}, SERVER, "proxy:3128 (https_proxy)"),
        ({"https_proxy": "http://proxy:1", "grpc_proxy": "http://other:2/"}, SERVER, "other:2 (grpc_proxy)"),
        ({"https_proxy": "", "http_proxy": "http://proxy:1"}, SERVER, None),
        ({"https_proxy": "proxy:1"}, SERVER, None),
        ({"HTTPS_PROXY": "http://proxy:1"}, SERVER, None),
        ({"http_proxy": "http://proxy:1", "no_proxy": "localhost, example.org"}, SERVER, None),
        ({"http_proxy": "http://proxy:1", "no_proxy": "ample.org,*"}, SERVER, "proxy:1 (http_proxy)"),
        ({"http_proxy": "http://proxy:1", "no_proxy": ".EXAMPLE.org"}, SERVER, None),
        ({"http_proxy": "http://proxy:1", "no_grpc_proxy": "x", "no_proxy": "example.org"}, SERVER, "proxy:1"),
        ({"http_proxy": "http://proxy:1", "no_proxy": "192.0.2.0/24"}, "192.0.2.7:1", None),
        ({"http_proxy": "http://proxy:1", "no_proxy": "192.0.2.0/24"}, "192.0.3.7:1", "proxy:1"),
        ({"http_proxy": "http://proxy:1"}, "127.0.0.1:8470", None),
    ],
)
def test_proxies_of_the_environment(environment: dict[str, str], server: str, proxy: str | None) -> None:
    found = route_to(server, environment=environment).proxy
    assert str(found).startswith(proxy) if proxy else found is None


def test_site_toml_goes_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://elsewhere:1")
    config = tmp_path / "site.toml"
    text = f'name = "a"\nserver = "{SERVER}"\n{{}}\n[workload.w]\ntrainer = "m:C"\n'
    config.write_text(text.format(""))
    assert str(load_site(config).route.proxy) == "elsewhere:1 (https_proxy)"
    for none in ("none", ""):
        config.write_text(text.format(f'proxy = "{none}"'))
        route = load_site(config).route
        assert route.proxy is None
        assert route.options == [("grpc.http_proxy", "")]
    config.write_text(text.format(f'proxy = "{URL}"'))
    with pytest.raises(FedlinkError, match="holds the proxy's password and is open to others"):
        load_site(config)
    config.chmod(0o600)
    found = load_site(config).route.proxy
    assert found
    assert (found.address, found.credentials) == ("proxy:3128", "user:p@ss")
    assert "p@ss" not in str(found)


@pytest.mark.parametrize("url", ["proxy:3128", "https://proxy:3128", "http://proxy", "http://a:b@c:d", "socks5://a:1"])
def test_what_is_no_proxy_is_refused_without_its_password(url: str, tmp_path: Path) -> None:
    config = tmp_path / "site.toml"
    config.write_text(f'name = "a"\nproxy = "{url}"\n[workload.w]\ntrainer = "m:C"\n')
    with pytest.raises(FedlinkError, match=r'proxy: not "http://HOST:PORT"') as e:
        load_site(config)
    assert url not in e.value.message
