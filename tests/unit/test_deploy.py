"""What can be said of the images and compose.yaml without a container engine."""

from __future__ import annotations

import fnmatch
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedclient.settings import SiteSettings
from fedserver.settings import load_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SITES = ("cleveland", "hungary", "switzerland", "long-beach")
DOCKERFILES = ("Dockerfile.server", "Dockerfile.client")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return loaded


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, continued lines joined."""
    text = (DEPLOY / dockerfile).read_text(encoding="utf-8")
    lines = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
    joined = lines.replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def final_stage(dockerfile: str) -> list[tuple[str, str]]:
    steps = instructions(dockerfile)
    last = max(i for i, (word, _) in enumerate(steps) if word == "FROM")
    return steps[last:]


def test_every_service_is_confined(compose: Mapping[str, Any]) -> None:
    assert set(compose["services"]) == {"server", *SITES}
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service["init"] is True, name
        assert service["restart"] == "unless-stopped", name
        assert not {"privileged", "user", "network_mode", "pid", "ipc", "ports", "cap_add", "devices"} & set(service), (
            name
        )


def test_each_site_sees_the_server_only(compose: Mapping[str, Any]) -> None:
    services = compose["services"]
    assert all(network == {"internal": True} for network in compose["networks"].values())
    for site in SITES:
        assert services[site]["networks"] == [site]
        peers = {name for name, service in services.items() if site in service["networks"]}
        assert peers == {"server", site}


def test_each_container_mounts_only_its_own_volumes(compose: Mapping[str, Any]) -> None:
    mounted: dict[str, str] = {}
    for name, service in compose["services"].items():
        for mount in service["volumes"]:
            volume, target, *options = mount.split(":")
            assert volume in compose["volumes"], "a named volume, nothing of the host"
            assert volume not in mounted, f"{volume} is mounted by {mounted.get(volume)} and {name}"
            mounted[volume] = name
            assert options == ([] if target.startswith("/var/lib/") else ["ro"]), "only state can be written"
    assert set(mounted) == set(compose["volumes"])


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_runs_as_nobody_special(dockerfile: str) -> None:
    steps = final_stage(dockerfile)
    users = [rest for word, rest in steps if word == "USER"]
    assert users == ["10001:10001"]
    after = steps.index(("USER", users[0]))
    assert not any(word in ("RUN", "COPY", "ADD") for word, _ in steps[after:])
    words = dict(steps)
    assert words["STOPSIGNAL"] == "SIGTERM"
    for word in ("ENTRYPOINT", "CMD"):
        assert words[word].startswith("["), f"{word} in exec form, or the shell keeps the signals"
    assert 'CMD ["' in words["HEALTHCHECK"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_holds_pinned_packages_and_no_tools(dockerfile: str) -> None:
    installs = [rest for word, rest in instructions(dockerfile) if word == "RUN" and "pip" in rest]
    assert installs
    for rest in installs:
        for command in re.findall(r"pip(?: --python \S+)? install[^&]*", rest):
            assert "-c deploy/constraints.txt" in command or "--no-deps" in command, command
    assert not any("apt-get" in rest or "gcc" in rest for _, rest in instructions(dockerfile))
    copies = [rest for word, rest in final_stage(dockerfile) if word == "COPY"]
    assert copies == ["--from=build /opt/fedlink /opt/fedlink"], (
        "sources, wheels and pip's files stay in the build stage"
    )


def test_the_server_has_no_torch() -> None:
    assert "torch" not in "\n".join(rest for _, rest in instructions("Dockerfile.server"))


def test_the_build_context_holds_no_secrets_and_no_data() -> None:
    lines = [
        line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"
    ]
    assert lines[0] == "*", "everything is left out but what is named"
    allowed = [line.removeprefix("!") for line in lines if line.startswith("!")]
    for path in (
        "server.key",
        ".demo/compose/authority/ca.key",
        ".venv/bin/python",
        ".git/config",
        "examples/heart/x.csv",
    ):
        assert not any(path == a or path.startswith(f"{a}/") for a in allowed), path
    denied = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    for name in ("server.key", "ca.crt", "token.pem"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in denied), name
    copied = {
        source
        for dockerfile in DOCKERFILES
        for word, rest in instructions(dockerfile)
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert {"deploy/wheels" if source == "${WHEELS}" else source for source in copied} == set(allowed)


def test_the_files_of_the_demo_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(DEPLOY), *sys.path])
    import demo_compose

    settings = load_settings(DEPLOY / "fedserver.toml", {})
    assert settings.tls
    assert settings.tls.client_ca
    assert set(SITES) == set(demo_compose.HOSPITALS)
    files = demo_compose.site_files(tmp_path, "cleveland", ["cleveland"], ["cleveland"], server=True)
    site = SiteSettings.checked(tomllib.loads(bytes(files["site.toml"]).decode()), "site.toml")
    assert site.tls
    assert site.tls.certificate
    assert sorted(files) == ["cleveland-test.csv", "cleveland-train.csv", "heart.py", "site.toml", "statistics.json"]
