"""`fedclient doctor` at real sites of a real server: healthy, and broken in one way at a time."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

import fedlink
from fedclient.cli import app
from fedlink.v1 import coordination_service_pb2 as pb
from fedlink.v1 import coordination_service_pb2_grpc as pb_grpc
from fedserver.authority import Authority
from tests.support.federation import Federation, Site, call, until

# One federation, in one test process.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("doctor")]

CHECKS = [
    "config",
    "address",
    "tls",
    "server",
    "clock",
    "credentials",
    "workloads",
    "data",
    "device",
    "disk",
    "bandwidth",
    "training-step",
]
DRIFT: dict[str, Any] = {"size": 5, "number": 1, "examples": 30}
SMALL = {"cache_limit": 1_000_000}
Report = Mapping[str, Mapping[str, str]]

CLASSES = """
from fedclient.trainer import Workload
import numpy as np


class Mean(Workload):
    def build_model(self):
        return {"mean": np.zeros(3, np.float32)}

    def train(self, model, ctx):
        rows = np.loadtxt(self.site.path("train"), delimiter=",", ndmin=2)
        for _ in ctx.steps(1000):
            model["mean"] += 0.1 * (rows.mean(axis=0) - model["mean"])
        ctx.num_examples = len(rows)

    def evaluate(self, model, ctx):
        ctx.num_examples = len(np.loadtxt(self.site.path("train"), delimiter=",", ndmin=2))
        return {"loss": 0.0}


class Raises(Mean):
    def train(self, model, ctx):
        for _ in ctx.steps(10):
            raise ValueError("secret patient 4711")


class Empty(Mean):
    def train(self, model, ctx):
        ctx.num_examples = 0


class Pixels(Mean):
    def __init__(self, site):
        raise ValueError("secret patient 4711")


class Needy(Mean):
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Settings:
        steps: int
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A server for all tests here; each takes sites of its own."""
    with Federation(tmp_path_factory.mktemp("doctor")) as federation:
        (federation.root / "means.py").write_text(CLASSES)
        yield federation.start_server()


def drifting(federation: Federation, name: str, trainer: str = "drift:Drift", **options: Any) -> Site:
    given = {"data": DRIFT, "extra": SMALL, "start": False, **options}
    return federation.site(name, trainer, **given)


def meaning(federation: Federation, name: str, trainer: str = "Mean", rows: str = "1,2,3\n4,5,6\n") -> Site:
    site = federation.site(
        name,
        f"means:{trainer}",
        source=federation.root / "means.py",
        data={"train": "train.csv"},
        extra=SMALL,
        start=False,
    )
    if rows:
        (site.directory / "train.csv").write_text(rows)
    return site


def examined(site: Site, *options: str, code: int | None = 0) -> Report:
    """What the doctor finds, by check; in this process, which saves the start of one. Without a code any will do."""
    done = CliRunner().invoke(app, ["doctor", "--config", str(site.config), "--json", *options])
    assert done.exit_code in ((0, 1) if code is None else (code,)), done.output
    # Where no command has set logging up, log lines go before.
    return read(done.stdout[done.stdout.index("[\n") :])


def read(text: str) -> Report:
    findings = json.loads(text)
    assert [f["check"] for f in findings] == CHECKS
    assert all(set(f) == {"check", "outcome", "found", "advice"} for f in findings)
    assert all(f["found"] for f in findings)
    assert all(f["advice"] for f in findings if f["outcome"] in ("warning", "failed"))
    return {f["check"]: f for f in findings}


def outcomes(report: Report, *, but: str = "") -> dict[str, str]:
    """Checks that are not ok, without one."""
    return {name: f["outcome"] for name, f in report.items() if f["outcome"] != "ok" and name != but}


def test_a_healthy_site(federation: Federation) -> None:
    site = meaning(federation, "well")
    report = read(call("fedclient", "doctor", "--config", str(site.config), "--json").stdout)
    assert outcomes(report) == {}
    assert "2 examples" in report["data"]["found"]
    assert "one step in" in report["training-step"]["found"]
    assert "2 examples" in report["training-step"]["found"]
    assert "MB of memory" in report["training-step"]["found"]
    assert fedlink.__version__ in report["server"]["found"]
    assert re.search(r"MB/s down, .* MB/s up: a model of 500 MB takes", report["bandwidth"]["found"])
    assert "cpu" in report["device"]["found"]


def test_a_line_for_each_check_and_a_count(federation: Federation) -> None:
    site = drifting(federation, "lines")
    lines = call("fedclient", "doctor", "--config", str(site.config)).stdout.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == CHECKS
    assert {line[0] for line in lines[:-1]} <= {"✓", "+"}
    assert lines[-1] == "12 checks: 12 ok"


def test_a_share_that_cannot_be_counted(federation: Federation) -> None:
    site = drifting(federation, "uncounted", options={"share": {"examples": 5}})
    report = examined(site, code=1)
    assert outcomes(report) == {"training-step": "failed"}
    assert "the limit 'examples'" in report["training-step"]["found"]
    assert "ctx.saw(n)" in report["training-step"]["found"]


def test_what_to_do_is_indented_below(federation: Federation) -> None:
    site = drifting(federation, "advice", extra={"insecure": True, "cache_limit": 1 << 60})
    lines = call("fedclient", "doctor", "--config", str(site.config), "--skip-training-step").stdout.splitlines()
    [at] = [i for i, line in enumerate(lines) if line.startswith("! disk")]
    assert lines[at + 1].startswith("    Set cache_limit in site.toml")
    assert lines[-1] == "12 checks: 10 ok, 1 warning, 1 skipped"


def test_nothing_is_left_behind_but_logs(federation: Federation) -> None:
    site = drifting(federation, "tidy")
    examined(site)
    left = {p.name for p in (site.directory / "fedclient-state" / "doctor").iterdir()}
    assert left <= {"python", "trainer-work-cpu.log"}


def test_the_wrong_port(federation: Federation) -> None:
    site = drifting(federation, "port", server="127.0.0.1:1")
    report = read(call("fedclient", "doctor", "--config", str(site.config), "--json", code=1).stdout)
    assert report["address"]["outcome"] == "failed"
    assert "127.0.0.1:1" in report["address"]["found"]
    assert report["tls"]["found"] == "needs address, which failed"
    assert report["server"]["found"] == "needs tls, which was skipped"
    skipped = {"tls", "server", "clock", "credentials", "bandwidth"}
    assert outcomes(report, but="address") == dict.fromkeys(skipped, "skipped")


def test_a_name_that_does_not_resolve(federation: Federation) -> None:
    report = examined(drifting(federation, "name", server="nowhere.invalid:8470"), "--skip-training-step", code=1)
    assert report["address"]["outcome"] == "failed"
    assert "nowhere.invalid does not resolve" in report["address"]["found"]


def test_something_else_listens_there(federation: Federation) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        report = examined(drifting(federation, "mute", server=address), "--skip-training-step", code=1)
    assert report["address"]["outcome"] == "ok"
    assert report["server"]["outcome"] == "failed"
    assert "does not answer as a fedserver" in report["server"]["found"]


def with_token(federation: Federation, name: str, token: str, mode: int = 0o600) -> Site:
    site = drifting(federation, name, extra={**SMALL, "token_file": "token"})
    path = site.directory / "token"
    path.write_text(token)
    path.chmod(mode)
    return site


def test_tokens_right_wrong_and_revoked(federation: Federation) -> None:
    token = federation.call("client", "add", "keyed").stdout
    site = with_token(federation, "keyed", token)
    assert "by its token" in examined(site, "--skip-training-step")["credentials"]["found"]
    (site.directory / "token").write_text("fedlink_wrong")
    report = examined(site, "--skip-training-step", code=1)
    assert report["credentials"]["outcome"] == "failed"
    assert "keyed" in report["credentials"]["found"]
    assert "fedserver client add keyed" in report["credentials"]["advice"]
    assert report["bandwidth"]["found"] == "needs credentials, which failed"
    (site.directory / "token").write_text(token)
    federation.call("client", "revoke", "keyed")
    assert examined(site, "--skip-training-step", code=1)["credentials"]["outcome"] == "failed"


def test_a_token_that_others_can_read(federation: Federation) -> None:
    report = examined(with_token(federation, "open", "fedlink_x", mode=0o644), "--skip-training-step", code=1)
    assert report["config"]["outcome"] == "failed"
    assert "chmod 600" in report["config"]["found"]
    assert report["credentials"]["outcome"] == "skipped"
    assert report["workloads"]["outcome"] == "ok"


def test_an_unknown_class_module_and_python(federation: Federation) -> None:
    report = examined(drifting(federation, "class", trainer="drift:Nope"), code=1)
    assert report["workloads"]["outcome"] == "failed"
    assert "there is no class Nope" in report["workloads"]["found"]
    assert outcomes(report, but="workloads") == dict.fromkeys(("data", "device", "training-step"), "skipped")
    site = drifting(federation, "module")
    site.config.write_text(site.config.read_text().replace("drift:Drift", "drifting:Drift"))
    report = examined(site, code=1)
    assert report["config"]["outcome"] == "failed"
    assert "no module drifting" in report["config"]["found"]
    assert report["workloads"]["found"] == "needs config, which failed"
    report = examined(drifting(federation, "python", options={"python": "nowhere/python"}), code=1)
    assert report["config"]["outcome"] == "failed"
    assert "nowhere/python is no program" in report["config"]["found"]


@pytest.mark.parametrize(("trainer", "check"), [("Raises", "training-step"), ("Pixels", "workloads")])
def test_a_class_that_raises_is_named_and_not_quoted(federation: Federation, trainer: str, check: str) -> None:
    site = meaning(federation, trainer.lower(), trainer)
    report = examined(site, code=1)
    assert report[check]["outcome"] == "failed"
    assert "ValueError" in report[check]["found"]
    assert "4711" not in json.dumps(report)
    log = re.search(r"are in (\S+)\.$|is in (\S+)\.$", report[check]["advice"])
    assert log
    assert "secret patient 4711" in Path(log[1] or log[2]).read_text()


def test_data_that_are_missing_or_empty(federation: Federation) -> None:
    report = examined(meaning(federation, "gone", rows=""), code=1)
    assert report["data"]["outcome"] == "failed"
    assert "data.train names no file" in report["data"]["found"]
    assert "FileNotFoundError" in report["data"]["found"]
    assert report["training-step"]["outcome"] == "failed"
    report = examined(meaning(federation, "gone2", rows=""), "--skip-training-step")
    assert report["data"]["outcome"] == "warning"
    report = examined(meaning(federation, "empty", "Empty"))
    assert outcomes(report) == {"training-step": "warning"}
    assert "0 examples" in report["training-step"]["found"]


def test_a_class_whose_settings_only_a_run_can_choose(federation: Federation) -> None:
    report = examined(meaning(federation, "needy", "Needy"))
    assert outcomes(report) == {"training-step": "skipped"}
    assert "steps" in report["training-step"]["found"]


def test_a_configuration_that_cannot_be_read(federation: Federation) -> None:
    site = drifting(federation, "unread")
    site.config.write_text('name = "unread"\npassword = "x"\n')
    said = [call("fedclient", c, "--config", str(site.config), code=2).stderr for c in ("start", "doctor")]
    assert said[0] == said[1]
    assert "password: unknown key" in said[0]


def test_beside_a_running_daemon(federation: Federation) -> None:
    site = drifting(federation, "busy")
    daemon = site.start()
    until(lambda: "registered" in daemon.text(), "the daemon to register")
    report = examined(site)
    assert outcomes(report) == {}
    assert "a daemon is running" in report["config"]["found"]
    federation.import_model("start", {"w": np.zeros(5, np.float32), "b": np.zeros(3, np.float32)})
    federation.create_run("after", workload="work", model="start", cohort={"min_clients": 1})
    federation.finish("after")
    assert daemon.running
    assert daemon.text().count('"registered"') == 1
    assert daemon.stop() == 0
    assert "a daemon" not in examined(site, "--skip-training-step")["config"]["found"]


class Answers(pb_grpc.CoordinationServiceServicer):
    """A server of another release, or with another time."""

    def __init__(self, ahead: float, **info: Any) -> None:
        self.ahead = ahead
        self.info = info

    def GetServerInfo(self, request: Any, context: Any) -> pb.GetServerInfoResponse:  # noqa: N802
        answer = pb.GetServerInfoResponse(
            **{"software_version": "9.9", "protocol_version": 1, "min_protocol_version": 1} | self.info
        )
        answer.time.FromNanoseconds(time.time_ns() + int(self.ahead * 1e9))
        return answer


@contextlib.contextmanager
def answering(ahead: float = 0.0, **info: Any) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_CoordinationServiceServicer_to_server(Answers(ahead, **info), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize(
    ("ahead", "outcome", "words"),
    [
        (0.0, "ok", "within"),
        (20.0, "warning", r"(19\.[5-9]|20\.[0-5]) s behind"),
        (-3600.0, "failed", r"(3599\.[5-9]|3600\.[0-5]) s ahead of"),
    ],
)
def test_a_clock_that_is_off(federation: Federation, ahead: float, outcome: str, words: str) -> None:
    with answering(ahead) as address:
        site = drifting(federation, f"clock{ahead:.0f}", server=address)
        report = examined(site, "--skip-training-step", code=outcome == "failed")
    assert report["clock"]["outcome"] == outcome
    assert re.search(words, report["clock"]["found"])
    assert "9.9" in report["server"]["found"]
    # Without the feature the doctor does not try.
    assert report["credentials"]["outcome"] == report["bandwidth"]["outcome"] == "skipped"


@pytest.mark.parametrize("info", [{"min_protocol_version": 9, "protocol_version": 9}, {"protocol_version": 0}])
def test_a_release_that_does_not_fit(federation: Federation, info: dict[str, int]) -> None:
    with answering(**info) as address:
        site = drifting(federation, f"release{info['protocol_version']}", server=address)
        report = examined(site, "--skip-training-step", code=1)
    assert report["server"]["outcome"] == "failed"
    assert "pgrade" in report["server"]["advice"]


def issued(authority: Authority, name: str, days: int = 365) -> dict[str, str]:
    """`[tls]` for a site, with a fresh certificate."""
    certificate = authority.issue_site(name, days)
    files = {"certificate": certificate, "key": certificate.with_suffix(".key"), "ca": authority.certificate}
    return {key: str(path) for key, path in files.items()}


def made(directory: Path) -> Authority:
    authority = Authority(directory)
    authority.create("Fedlink CA")
    return authority


@pytest.mark.timeout(300)
def test_with_certificates(tmp_path: Path) -> None:
    with Federation(tmp_path) as federation:
        d = tmp_path / "ca"
        authority, other = made(d), made(tmp_path / "other")
        authority.issue_server(["127.0.0.1", "localhost"], 20)
        config = federation.root / "fedserver.toml"
        config.write_text(
            f'[tls]\ncertificate = "{d}/server.crt"\nkey = "{d}/server.key"\nclient_ca = "{d}/ca.crt"\n'
            f'revoked = "{d}/revoked.crl"\n'
        )
        federation.start_server("--config", str(config))
        for name in ("ada", "bob", "soon"):
            federation.call("client", "add", name)

        def site(name: str, tls: Mapping[str, str]) -> Site:
            return drifting(federation, name, extra={**SMALL, "tls": tls})

        ada = site("ada", issued(authority, "ada"))
        report = examined(ada)
        assert outcomes(report) == {"tls": "warning"}
        assert "TLSv1.3" in report["tls"]["found"]
        assert "lasts 19 days" in report["tls"]["found"]
        assert "lasts 364 days" in report["tls"]["found"]
        assert "renew" in report["tls"]["advice"]
        assert "by its certificate" in report["credentials"]["found"]

        report = examined(site("bob", issued(authority, "ada")), "--skip-training-step", code=1)
        assert report["tls"]["outcome"] == "failed"
        assert "'ada', site.toml says 'bob'" in report["tls"]["found"]

        report = examined(site("cat", issued(other, "cat")), "--skip-training-step", code=1)
        assert report["tls"]["outcome"] == "failed"
        assert "tls.ca" in report["tls"]["found"]

        report = examined(site("soon", issued(authority, "soon", days=5)), "--skip-training-step")
        assert "lasts 4 days" in report["tls"]["found"]

        report = examined(site("dan", issued(authority, "dan")), "--skip-training-step", code=1)
        assert report["credentials"]["outcome"] == "failed"
        assert "fedserver client add dan" in report["credentials"]["advice"]

        authority.revoke("ada")
        report = until(
            lambda: (r := examined(ada, "--skip-training-step", code=None))["credentials"]["outcome"] == "failed" and r,
            "the revocation to be read",
        )
        assert "revoked" in report["credentials"]["found"]

        report = examined(drifting(federation, "eve"), "--skip-training-step", code=1)
        assert report["tls"]["outcome"] == "failed"
        assert "TLS only" in report["tls"]["found"]
