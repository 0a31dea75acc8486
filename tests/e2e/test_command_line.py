"""By hand, as the README shows it: every command against a real server, its exit code and its words."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedlink.v1 import admin_service_pb2 as admin_pb
from fedlink.v1 import admin_service_pb2_grpc as admin_grpc
from fedserver.settings import admin_socket
from tests.support.classes.drift import expected
from tests.support.federation import PATIENCE, Federation, Site, arrays_equal, call, program, until

# One federation, in one test process.
pytestmark = pytest.mark.xdist_group("command-line")

START = {"w": np.arange(5, dtype=np.float32), "b": np.ones(3, np.float32)}
SITES = {"ada": (1, 30), "bob": (2, 10)}
LIMIT = {"limits": {"steps": {"max": 100}}}


def refused(federation: Federation, *arguments: str, code: int, words: str) -> None:
    """A command that fails: one line that begins with the program and says what is wrong."""
    said = federation.call(*arguments, code=code).stderr.removesuffix("\n")
    assert len(said.splitlines()) == 1, said
    assert said.startswith("fedserver: ")
    assert words in said


def add_site(federation: Federation, name: str, **options: Any) -> Site:
    number, examples = SITES[name]
    data = {"size": 5, "number": number, "examples": examples}
    return federation.site(name, "drift:Drift", data=data, options=LIMIT, **options)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A server with two sites and a model, for all tests here; each takes run names of its own."""
    with Federation(tmp_path_factory.mktemp("federation")) as federation:
        config = federation.root / "fedserver.toml"
        config.write_text("max_poll_wait = 2.0\n")
        federation.start_server("--config", str(config))
        federation.import_model("start", START)
        for name in SITES:
            add_site(federation, name)

        def everybody() -> bool:
            clients = federation.json("client", "list")
            return sum(c["connected"] for c in clients) == len(SITES)

        until(everybody, "the sites to connect")
        yield federation


def test_a_run_from_the_first_to_the_last_command(federation: Federation) -> None:
    path = federation.root / "first.toml"
    path.write_text('name = "first"\nworkload = "work"\nmodel = "start"\nrounds = 2\n[retention]\nkeep_versions = 9\n')
    followed = federation.call("run", "create", str(path), "--follow")
    assert "completed" in followed.stdout.splitlines()[-1]

    shown = federation.json("run", "show", "first")
    assert (shown["name"], shown["state"], shown["version"], shown["rounds"]) == ("first", "completed", 2, 2)
    assert shown["spec"]["workload"] == "work"
    assert "first" in [r["name"] for r in federation.json("run", "list")]
    assert "first" in federation.call("run", "list").stdout
    assert "completed" in federation.call("run", "show", "first").stdout

    rounds = federation.json("round", "list", "first")
    assert [(r["number"], r["phase"]) for r in rounds] == [(1, "committed"), (2, "committed")]
    assert "committed" in federation.call("round", "list", "first").stdout
    assert "ada" in federation.call("round", "show", "first", "2").stdout
    [second] = federation.json("round", "show", "first", "2")
    trained = {t["client"]: t["num_examples"] for t in second["tasks"] if t["kind"] == "train"}
    assert trained == {"ada": 30, "bob": 10}

    events = federation.finish("first")
    sequences = [e["sequence"] for e in events]
    assert sequences == sorted(set(sequences))
    assert (events[0]["kind"], events[-1]["kind"]) == ("run_created", "run_ended")
    assert federation.call("run", "watch", "first").stdout

    names = [m["name"] for m in federation.json("model", "list")]
    assert {"start", "first@1", "first@2"} <= set(names)
    assert "first@2" in federation.call("model", "list").stdout
    arrays_equal(federation.export("first@1"), expected(START, SITES.values(), 1))
    arrays_equal(federation.export("first"), expected(START, SITES.values(), 2))
    arrays_equal(federation.export("start"), START)

    extended = json.loads(federation.call("run", "extend", "first", "--rounds", "1", "--json").stdout)
    assert extended["rounds"] == 3
    federation.finish("first")
    arrays_equal(federation.export("first@3"), expected(START, SITES.values(), 3))

    path.write_text('name = "second"\nworkload = "work"\nrounds = 1\n')
    federation.call("run", "create", str(path), "--from", "first@1")
    federation.finish("second")
    arrays_equal(federation.export("second"), expected(federation.export("first@1"), SITES.values(), 1))


def test_stopping_a_run(federation: Federation) -> None:
    ada = federation.sites["ada"]
    ada.hold()
    before = len(ada.trained)
    federation.create_run("stopped", workload="work", model="start", rounds=5)
    until(lambda: len(ada.trained) > before, "the run to train")
    assert federation.run_state("stopped").waiting  # type: ignore[union-attr]
    assert json.loads(federation.call("run", "stop", "stopped", "--json").stdout)["state"] == "stopped"
    ada.release()
    assert federation.finish("stopped", code=1)[-1]["data"]["state"] == "stopped"
    federation.call("run", "stop", "stopped")
    refused(federation, "round", "close", "stopped", code=4, words="stopped")
    # The site is free again for what comes next.
    federation.create_run("after-it", workload="work", model="start", rounds=1)
    federation.finish("after-it")


def test_the_list_of_clients(federation: Federation) -> None:
    def look() -> dict[str, Any]:
        return {c["name"]: c for c in federation.json("client", "list")}

    # This test may be the first of its process, and the sites take a moment to register.
    clients = until(lambda: c if "ada" in (c := look()) and c["ada"]["connected"] else None, "ada to register")
    assert not clients["ada"]["admitted"]
    assert clients["ada"]["workloads"] == ["work"]
    assert "ada" in federation.call("client", "list").stdout


def test_importing_and_exporting_directories(federation: Federation, tmp_path: Path) -> None:
    source = tmp_path / "sharded"
    source.mkdir()
    shards = {
        "model-00001-of-00002.safetensors": {"w": START["w"]},
        "model-00002-of-00002.safetensors": {"b": START["b"]},
    }
    for name, tensors in shards.items():
        save_file(tensors, source / name)
    index = {"metadata": {"total_size": 32}, "weight_map": {t: name for name, ts in shards.items() for t in ts}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert json.loads(federation.call("model", "import", str(source), "--json").stdout)["name"] == "sharded"
    arrays_equal(federation.export("sharded"), START)

    # The same again changes nothing; another model does not take the name.
    federation.call("model", "import", str(source))
    save_file({"w": START["b"]}, tmp_path / "other.safetensors")
    refused(
        federation, "model", "import", str(tmp_path / "other.safetensors"), "--name", "sharded", code=4, words="sharded"
    )
    refused(federation, "model", "import", str(tmp_path / "absent.safetensors"), code=2, words="absent")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(federation, "model", "import", str(tmp_path / "pickled"), code=2, words="safetensors")
    refused(federation, "model", "export", "nothing", str(tmp_path / "out"), code=4, words="nothing")
    refused(federation, "model", "export", "sharded@7", str(tmp_path / "out"), code=4, words="sharded")


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("name = ", 2, "TOML"),
        ('name = "x"\nworkload = "work"\n', 2, "rounds"),
        ('name = "x"\nworkload = "work"\nmodel = "start"\nrounds = 1\nround = 3\n', 2, "round"),
        ('name = "../x"\nworkload = "work"\nmodel = "start"\nrounds = 1\n', 2, "name"),
        ('name = "x"\nworkload = "work"\nrounds = 1\nmodel = "absent"\n', 4, "absent"),
        ('name = "x"\nworkload = "work"\nrounds = 1\nmodel = "start"\nstrategy = "fedsgd"\n', 2, "learning_rate"),
    ],
)
def test_run_files_that_are_wrong(federation: Federation, tmp_path: Path, text: str, code: int, words: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    refused(federation, "run", "create", str(path), code=code, words=words)


def test_what_is_not_there(federation: Federation, tmp_path: Path) -> None:
    refused(federation, "run", "create", str(tmp_path / "none.toml"), code=2, words="none.toml")
    for arguments in (("show", "none"), ("watch", "none"), ("stop", "none"), ("extend", "none", "--rounds", "1")):
        refused(federation, "run", *arguments, code=4, words="none")
    refused(federation, "round", "list", "none", code=4, words="none")
    refused(federation, "client", "revoke", "none", code=4, words="none")
    refused(federation, "client", "add", "no/name", code=2, words="no/name")
    # Of usage, typer speaks in its own way.
    assert call("fedserver", "run", "nonsense", code=2).stderr
    assert call("fedserver", "run", "extend", "x", code=2).stderr
    done = call("fedserver", "run", "list", "--data-dir", str(tmp_path / "nowhere"), code=3)
    assert len(done.stderr.strip().splitlines()) == 1
    assert "fedserver serve" in done.stderr


def test_settings_that_every_site_refuses_are_said(federation: Federation, tmp_path: Path) -> None:
    path = tmp_path / "greedy.toml"
    path.write_text('name = "greedy"\nworkload = "work"\nmodel = "start"\nrounds = 1\n[settings]\nsteps = 1000\n')
    refused(federation, "run", "create", str(path), code=2, words="steps: 1000 is above the maximum 100")


def test_serving_in_the_wrong_place(federation: Federation, tmp_path: Path) -> None:
    def serve(*arguments: str, code: int) -> str:
        said = call("fedserver", "serve", *arguments, code=code).stderr.strip().splitlines()
        assert len(said) == 1, said
        assert said[0].startswith("fedserver: ")
        return said[0]

    said = serve("--data-dir", str(tmp_path / "d"), "--listen", "0.0.0.0:0", code=2)
    assert "--insecure" in said
    said = serve("--data-dir", str(federation.data_dir), "--listen", "127.0.0.1:0", code=2)
    assert "in use" in said
    assert str(federation.server.pid) in said  # type: ignore[union-attr]
    assert "--listen" in serve("--data-dir", str(tmp_path / "e"), "--listen", federation.address, code=2)
    # The server that was there goes on.
    federation.call("run", "list")


def test_insecure_is_served_only_to_tokens(tmp_path: Path) -> None:
    with Federation(tmp_path) as federation:
        federation.address = "0.0.0.0:0"
        federation.start_server("--insecure")
        federation.address = "127.0.0.1:" + federation.address.rpartition(":")[2]
        ada = add_site(federation, "ada")
        assert ada.daemon
        assert ada.daemon.wait() == 4


def test_tokens(federation: Federation) -> None:
    added = federation.call("client", "add", "carl")
    token = added.stdout.strip()
    assert len(token) > 32
    assert token not in added.stderr
    refused(federation, "client", "add", "carl", code=4, words="carl")
    assert next(c for c in federation.json("client", "list") if c["name"] == "carl")["admitted"]
    # It is stored hashed, and said nowhere.
    for path in (*federation.data_dir.glob("*"), federation.root / "server.log"):
        if path.is_file():
            assert token.encode() not in path.read_bytes(), path

    carl = federation.site(
        "carl",
        "drift:Drift",
        data={"size": 5, "number": 3, "examples": 1},
        extra={"token_file": "token"},
        start=False,
    )
    file = carl.directory / "token"

    def record() -> Any:
        return next(c for c in federation.json("client", "list") if c["name"] == "carl")

    def ends_with_4(site: Site) -> None:
        daemon = site.start()
        assert daemon.wait() == 4
        last = daemon.text().strip().splitlines()[-1]
        assert last.startswith("fedclient: ")
        assert "Traceback" not in daemon.text()
        assert token not in daemon.text()

    with_token = carl.config.read_text()
    carl.config.write_text(with_token.replace('token_file = "token"', ""))
    ends_with_4(carl)
    carl.config.write_text(with_token)
    file.write_text("fedlink_" + "x" * 43)
    file.chmod(0o600)
    ends_with_4(carl)
    file.write_text(token)
    daemon = carl.start()
    until(lambda: record()["connected"], "carl to connect")
    federation.call("client", "revoke", "carl")
    assert daemon.wait() == 4
    assert "Traceback" not in daemon.text()
    assert record()["revoked"]
    ends_with_4(carl)
    rotated = federation.call("client", "add", "carl", "--rotate").stdout.strip()
    ends_with_4(carl)
    file.write_text(rotated)
    daemon = carl.start()
    until(lambda: record()["connected"], "carl to connect again")
    assert daemon.stop() == 0


def test_a_sites_token_does_not_operate(federation: Federation) -> None:
    token = federation.call("client", "add", "dora").stdout.strip()
    metadata = (("fedlink-client", "dora"), ("authorization", f"Bearer {token}"))
    with grpc.insecure_channel(f"unix:{admin_socket(federation.data_dir)}") as channel:
        stub = admin_grpc.AdminServiceStub(channel)
        for method, request in (
            (stub.ListRuns, admin_pb.ListRunsRequest()),
            (stub.AddClient, admin_pb.AddClientRequest(name="mallory")),
            (stub.StopRun, admin_pb.StopRunRequest(run="first")),
        ):
            with pytest.raises(grpc.RpcError) as refusal:
                method(request, metadata=metadata, timeout=30)
            assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.RpcError) as refusal:
            list(stub.WatchRun(admin_pb.WatchRunRequest(run="first"), metadata=metadata, timeout=30))
        assert refusal.value.code() is grpc.StatusCode.PERMISSION_DENIED
    with grpc.insecure_channel(federation.address) as channel:
        with pytest.raises(grpc.RpcError) as refusal:
            admin_grpc.AdminServiceStub(channel).ListRuns(admin_pb.ListRunsRequest(), metadata=metadata, timeout=30)
        assert refusal.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED)
    assert "mallory" not in federation.call("client", "list").stdout


def test_starting_weights_and_training_without_a_server(federation: Federation, tmp_path: Path) -> None:
    config = str(federation.sites["ada"].config)
    init = tmp_path / "init.safetensors"
    call("fedclient", "init-model", "work", "--config", config, "-o", str(init))
    arrays_equal(load_file(init), {"w": np.zeros(5, np.float32), "b": np.zeros(3, np.float32)})
    run = tmp_path / "run.toml"
    run.write_text('name = "alone"\nworkload = "work"\nmodel = "init"\nrounds = 2\n')
    done = call("fedclient", "train-local", "--config", config, "--settings", str(run), "--model", str(init), "--json")
    assert [v["version"] for v in json.loads(done.stdout)["versions"]] == [0, 1, 2]


def test_a_terminating_server_ends_well_and_its_sites_stay(tmp_path: Path) -> None:
    with Federation(tmp_path) as federation:
        federation.start_server()
        federation.import_model("start", START)
        sites = [add_site(federation, name) for name in SITES]
        sites[0].hold()
        federation.create_run("r", workload="work", model="start", rounds=1)
        sites[0].until_training(1)
        assert federation.server
        assert federation.server.stop() == 0
        assert "Traceback" not in federation.server.text()
        federation.start_server()
        sites[0].release()
        federation.finish("r")
        for site in sites:
            assert site.daemon
            assert site.daemon.stop() == 0


def test_zero_configuration(tmp_path: Path) -> None:
    """Help and version need nothing at all."""
    for name, commands in (("fedserver", ("serve", "run", "round", "model", "client")), ("fedclient", ("start",))):
        said = subprocess.run(
            [program(name), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=True
        ).stdout
        assert all(command in said for command in commands)
        assert call(name, "--version").stdout.startswith(name)
    assert not list(tmp_path.iterdir())
