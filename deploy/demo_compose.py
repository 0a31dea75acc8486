"""The demo in containers: four hospitals, each with a network, a volume and a certificate of its own.

    python demo_compose.py DIRECTORY [--kill]

Builds both images, makes certificates, fills each container's volume with its own files and no
others, admits the sites, and then does what examples/heart/demo.py does, down to the last line,
`result {json}`. With --kill, a site's container and then the server's are killed with SIGKILL while
a round is open, and come back. At the end everything but the images is removed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

DEPLOY = Path(__file__).resolve().parent
HEART = DEPLOY.parent / "examples" / "heart"
sys.path[:0] = [str(DEPLOY.parent)]

from engine import Engine, EngineError, find, unpack  # noqa: E402 - beside the demo's own data and report

from examples.heart import data  # noqa: E402
from examples.heart.demo import report  # noqa: E402

RUN = "heart"
RUN_FILE = HEART / "run.toml"
HOSPITALS = [data.slug(name) for name in data.HOSPITALS]
SERVER_IMAGE, CLIENT_IMAGE = "fedlink-server", "fedlink-client"
START_SECONDS = 120.0
TABLES = 20
STEP_SECONDS = 0.3
VICTIM = HOSPITALS[0]
WORKLOAD = """
[workload.heart]
trainer = "heart:HeartDisease"

[workload.heart.data]
train = {train}
test = {test}
statistics = "statistics.json"
"""
SITE = """\
name = "{name}"
server = "server:8470"
state_dir = "/var/lib/fedclient"

[tls]
ca = "ca.crt"
certificate = "site.crt"
key = "site.key"
"""


def main(root: Path, *, kill: bool) -> None:
    """Run the demo; `root` keeps the data, the authority, the model and the plot."""
    engine = find()
    print(f"with {engine.name} and {' '.join(engine.compose)}")
    data.prepare(root / "data")
    shutil.rmtree(root / "model", ignore_errors=True)
    certify(root / "authority")
    for image, kind in ((SERVER_IMAGE, "server"), (CLIENT_IMAGE, "client")):
        engine.build(DEPLOY / f"Dockerfile.{kind}", image)
    started = time.monotonic()
    # What an interrupted demo left behind.
    engine.down()
    try:
        bring_up(engine, root)
        init = make_init(engine, root)
        versions = federate(engine, root, init, kill=kill)
    except BaseException:
        show_logs(engine)
        raise
    finally:
        engine.down()
    local = {name: train_alone(engine, root, name, [name], init) for name in HOSPITALS}
    pooled = train_alone(engine, root, "pooled", HOSPITALS, init)
    report(root, versions, local, pooled, time.monotonic() - started)


def certify(authority: Path) -> None:
    """Make an authority, and certificates for the server, under its name in compose.yaml, and every site."""
    shutil.rmtree(authority, ignore_errors=True)
    for arguments in (["authority", "{}"], ["server", "{}", "server"], ["site", "{}", *HOSPITALS]):
        command = ["fedserver", "certificate", *(a.format(authority) for a in arguments)]
        print(f"$ {' '.join(command)}", flush=True)
        program = [str(Path(sys.executable).parent / command[0]), *command[1:]]
        done = subprocess.run(program, check=False, capture_output=True, text=True)
        if done.returncode:
            raise EngineError(done.stderr.strip())


def bring_up(engine: Engine, root: Path) -> None:
    """Give every container its own files, start the server, admit the sites and start them."""
    engine.up(start=False)
    authority = root / "authority"
    own = {name: authority / name for name in ("ca.crt", "server.crt", "server.key", "revoked.crl")}
    engine.fill("server", "/etc/fedserver", SERVER_IMAGE, {"fedserver.toml": DEPLOY / "fedserver.toml", **own})
    for name in HOSPITALS:
        certificate = authority / "sites" / name
        credentials = {
            "ca.crt": authority / "ca.crt",
            "site.crt": certificate.with_name(f"{name}.crt"),
            "site.key": certificate.with_name(f"{name}.key"),
        }
        engine.fill(name, "/site", CLIENT_IMAGE, site_files(root, name, [name], [name], server=True) | credentials)
    engine.up("server")
    wait_healthy(engine, "server")
    for name in HOSPITALS:
        said = operate(engine, ["client", "add", name])
        print(said.decode().strip())
    engine.up()
    for name in HOSPITALS:
        wait_healthy(engine, name)
    print("server and four sites are healthy", flush=True)


def site_files(
    root: Path, name: str, train: Sequence[str], test: Sequence[str], *, server: bool
) -> dict[str, bytes | Path]:
    """What a site has: its site.toml, the workload's class, and these hospitals' rows."""
    rows = {"train": [f"{n}-train.csv" for n in train], "test": [f"{n}-test.csv" for n in test]}
    head = SITE.format(name=name) if server else f'name = "{name}"\n'
    text = head + WORKLOAD.format(train=json.dumps(rows["train"]), test=json.dumps(rows["test"]))
    files: dict[str, bytes | Path] = {"site.toml": text.encode(), "heart.py": HEART / "heart.py"}
    for file in (*rows["train"], *rows["test"], data.STATISTICS):
        files[file] = root / "data" / file
    return files


def wait_healthy(engine: Engine, service: str) -> None:
    """Wait until the health check of a service is content.

    Raises:
        EngineError: it is not within START_SECONDS.
    """
    deadline = time.monotonic() + START_SECONDS
    while not (engine.running(service) and engine.healthy(service)):
        if time.monotonic() > deadline:
            raise EngineError(f"{service} was not healthy within {START_SECONDS:g} s")
        time.sleep(STEP_SECONDS)


def make_init(engine: Engine, root: Path) -> bytes:
    """The weights that every training starts from, built in a container."""
    name = HOSPITALS[0]
    script = f"cd /tmp; tar -x; fedclient init-model {RUN} --seed 42 -o init.safetensors >&2; cat init.safetensors"
    return engine.once(CLIENT_IMAGE, script, site_files(root, name, [name], [name], server=False))


def federate(engine: Engine, root: Path, init: bytes, *, kill: bool) -> list[dict[str, Any]]:
    """Train with all sites; returns what every version measured."""
    put(engine, "/tmp/heart-init.safetensors", init)  # noqa: S108 - a path in the container
    put(engine, "/tmp/run.toml", RUN_FILE.read_bytes())  # noqa: S108
    operate(engine, ["model", "import", "/tmp/heart-init.safetensors"])  # noqa: S108
    command = ["run", "create", "/tmp/run.toml", "--follow"]  # noqa: S108
    tables = TABLES
    with killing(engine) if kill else contextlib.nullcontext():
        while show(engine, command):
            # The table's own process ends with the server's container; another one shows the run from its start.
            tables -= 1
            if not tables:
                raise EngineError(f"the table of run {RUN} ended {TABLES} times although the server is healthy")
            wait_healthy(engine, "server")
            state = json.loads(operate(engine, ["run", "show", RUN, "--json"], quiet=True))
            if state["state"] in ("failed", "stopped"):
                raise EngineError(f"run {RUN} {state['state']}: {state['reason']}")
            command = ["run", "watch", RUN]
    events = operate(engine, ["run", "watch", RUN, "--json"]).decode().splitlines()
    operate(engine, ["model", "export", RUN, "/tmp/model"])  # noqa: S108
    unpack(engine.ask("server", "tar", "-C", "/tmp/model", "-c", "."), root / "model")  # noqa: S108
    return [e["data"] for e in map(json.loads, events) if e["kind"] == "version_evaluated"]


@contextlib.contextmanager
def killing(engine: Engine) -> Iterator[None]:
    """Kill a site and the server in the middle of whatever the context does.

    Raises:
        EngineError: it did not come to that, so nothing is proven.
    """
    with ThreadPoolExecutor(1) as thread:
        struck = thread.submit(strike, engine)
        yield
        struck.result()


def strike(engine: Engine) -> None:
    """Kill a site and then the server while a round is open, and see that both come back.

    Raises:
        EngineError: there was no open round.
    """
    deadline = time.monotonic() + START_SECONDS
    while not rounds(engine, "committed"):
        if time.monotonic() > deadline:
            raise EngineError(f"no round was committed within {START_SECONDS:g} s")
        time.sleep(STEP_SECONDS)
    engine.kill(VICTIM)
    try:
        # Every site is needed for a round, so this one cannot end before the site is back.
        found = rounds(engine, "collect")
        if not found:
            raise EngineError("the run was over before anything could be killed")
        engine.kill("server")
        print(f"killed the containers of {VICTIM} and the server in round {found[0]}", flush=True)
    finally:
        for service in ("server", VICTIM):
            print(f"{service} runs again, started {engine.back(service)}", flush=True)


def rounds(engine: Engine, phase: str) -> list[int]:
    """The numbers of the run's rounds in a phase; none as long as there is no run."""
    try:
        listed = json.loads(operate(engine, ["round", "list", RUN, "--json"], quiet=True))
    except EngineError:
        return []
    return [r["number"] for r in listed if r["phase"] == phase]


def train_alone(engine: Engine, root: Path, name: str, train: Sequence[str], init: bytes) -> list[float]:
    """Accuracy of every version of a model trained without a server, on all hospitals' test rows."""
    files = site_files(root, f"alone-{name}", train, HOSPITALS, server=False)
    files |= {"init.safetensors": init, "run.toml": RUN_FILE}
    script = "cd /tmp; tar -x; exec fedclient train-local --settings run.toml --model init.safetensors --json"
    run = json.loads(engine.once(CLIENT_IMAGE, script, files))
    return [version["evaluation"]["accuracy"] for version in run["versions"]]


def operate(engine: Engine, arguments: Sequence[str], *, quiet: bool = False) -> bytes:
    """Run a `fedserver` command in the server's container; returns what it prints."""
    if not quiet:
        print(f"$ fedserver {' '.join(arguments)}", flush=True)
    return engine.ask("server", "fedserver", *arguments)


def show(engine: Engine, arguments: Sequence[str]) -> int:
    """Run a `fedserver` command in the server's container for all to see; returns its exit status."""
    print(f"$ fedserver {' '.join(arguments)}", flush=True)
    return engine.show("server", "fedserver", *arguments)


def put(engine: Engine, path: str, content: bytes) -> None:
    """Write a file in the server's container."""
    engine.ask("server", "sh", "-c", f"cat > {path}", data=content)


def show_logs(engine: Engine) -> None:
    """The ends of all logs, for whoever looks for what went wrong."""
    for service in ("server", *HOSPITALS):
        with contextlib.suppress(EngineError):
            print(f"--- {service}\n{engine.logs(service, 15)}", file=sys.stderr)


def interrupted(*_: object) -> NoReturn:
    """Let `finally` clean up on SIGTERM, too."""
    sys.exit("told to stop; the containers are removed")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupted)
    places = [a for a in sys.argv[1:] if not a.startswith("-")]
    try:
        main(Path(places[0] if places else ".demo/compose").resolve(), kill="--kill" in sys.argv)
    except KeyboardInterrupt:
        sys.exit("interrupted; the containers are removed")
    except (EngineError, RuntimeError) as e:
        sys.exit(f"demo: {e}")
