"""One case: a federation of real processes, faults at named moments, and what is left of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc

from fedlink import failpoints, rpc
from fedlink.v1 import admin_service_pb2 as pb
from fedlink.v1 import admin_service_pb2_grpc as pb_grpc
from fedserver.settings import admin_socket
from tests.fault.start import MODEL, ROUNDS, ROWS, SHARDS, SITES, TENSORS, Arrays
from tests.fault.verify import Findings, examine
from tests.support.federation import Daemon, Federation
from tests.support.line import Line

RUN = "r"
PATIENCE = 240.0
"""Seconds after which a run counts as hung."""
LOOK = 0.2
"""Seconds between two questions to the server; each costs it a few milliseconds of processor time."""
KILLED = -9


@dataclass(frozen=True)
class Kill:
    """SIGKILL of a process at the n-th passage of a failpoint, counted from its start."""

    who: str
    """"server", or the site whose daemon or trainer it is."""
    point: str
    passage: int = 1

    def __str__(self) -> str:
        return f"{self.who}:{self.point}@{self.passage}"


@dataclass(frozen=True)
class Sever:
    """Something that happens to one connection of a site after so many bytes in one direction."""

    who: str
    kind: Literal["cut", "stall"]
    towards: Literal["server", "client"]
    after_bytes: int

    def __str__(self) -> str:
        return f"{self.who}:{self.kind}-{self.towards}@{self.after_bytes}"


Fault = Kill | Sever


def parse_fault(text: str) -> Fault:
    """The fault that `str` has written."""
    who, _, rest = text.partition(":")
    what, _, count = rest.partition("@")
    kind, dash, towards = what.partition("-")
    if dash and kind in ("cut", "stall"):
        return Sever(who, kind, towards, int(count))  # type: ignore[arg-type]
    return Kill(who, what, int(count))


@dataclass(frozen=True)
class Case:
    """Faults to survive.

    Attributes:
        name: of the case.
        faults: all are to happen.
        settings: tables of the run file over those below.
        torch: the site that trains with torch; the others take numpy.
        checkpoint_every: seconds between two checkpoints of a trainer; 0 for none.
        evaluated: whether the sites evaluate every version.
    """

    name: str
    faults: tuple[Fault, ...]
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    torch: str = ""
    checkpoint_every: float = 0.0
    evaluated: bool = True


@dataclass
class Outcome:
    """What a case came to."""

    fired: Counter[str]
    findings: Findings
    state: str
    """In which the run ended."""
    resumed: int
    """Times that a training went on from a checkpoint."""
    seconds: float


def unmet(case: Case, fired: Counter[str]) -> list[str]:
    """The faults of a case that have not happened."""
    planned = Counter(str(f) if isinstance(f, Kill) else f"{f.who}:{f.kind}" for f in case.faults)
    return [f"{fault} never happened" for fault in (planned - fired)]


def run_case(case: Case, root: Path, prepared: Path, whole: Sequence[Arrays]) -> Outcome:
    """Carry a case out in an empty directory, which is to be removed afterwards.

    Raises:
        AssertionError: a process ended by itself, or the run hung.
    """
    began = time.monotonic()
    with Federation(root) as federation, contextlib.ExitStack() as lines:
        shutil.copytree(prepared, federation.data_dir, copy_function=_link_blobs, symlinks=True)
        stage = _Stage(case, federation)
        stage.start_server()
        severed = {f.who: lines.enter_context(Line(federation.address, strict=False)) for f in stage.severs}
        for fault in stage.severs:
            getattr(severed[fault.who], fault.kind)(
                after_bytes=fault.after_bytes,
                towards=fault.towards,
                **({"seconds": 0.5} if fault.kind == "stall" else {}),
            )
        for name in SITES:
            stage.add_site(name, severed[name].address if name in severed else "")
        state, seen = stage.watch()
        stage.leave()
        fired = stage.fired() + Counter(
            f"{who}:{happened.kind}" for who, line in severed.items() for happened in line.fired
        )
        findings = examine(
            federation.data_dir, RUN, acknowledged=stage.acknowledged(), seen=seen, whole=whole, sites=SITES
        )
    return Outcome(fired, findings, state, stage.resumed(), time.monotonic() - began)


class _Stage:
    """The processes of a case, started again whenever a fault has ended one."""

    def __init__(self, case: Case, federation: Federation) -> None:
        self._case = case
        self._federation = federation
        self._request = os.urandom(16)
        self.severs = [f for f in case.faults if isinstance(f, Sever)]

    def plan(self, who: str) -> dict[str, str]:
        """The environment of a process."""
        kills = [f"{f.point}@{f.passage}" for f in self._case.faults if isinstance(f, Kill) and f.who == who]
        log = {failpoints.LOG_VARIABLE: str(self._federation.root / f"{who}.fired")}
        # A BLAS that nothing uses would start a thread for each core in each trainer.
        quick = {"OPENBLAS_NUM_THREADS": "1"}
        return {**os.environ, **quick, **({failpoints.VARIABLE: ",".join(kills), **log} if kills else {})}

    def start_server(self) -> None:
        """Start the server, again and again if it is to end before it serves."""
        while True:
            try:
                self._federation.start_server(env=self.plan("server"))
            except AssertionError:
                assert self._federation.server is not None
                self._ended(self._federation.server, "server")
            else:
                return

    def add_site(self, name: str, server: str) -> None:
        """Start a site."""
        number, examples = SITES[name]
        data = {"rows": ROWS, "tensors": SHARDS * TENSORS, "number": number, "examples": examples}
        classes = Path(__file__).parents[1] / "support" / "classes"
        module = "tide_torch" if name == self._case.torch else "tide"
        site = self._federation.site(name, f"{module}:Tide", data=data, server=server, start=False)
        shutil.copy(classes / "tide.py", site.directory / "tide.py")
        if self._case.checkpoint_every:
            text = site.config.read_text().replace("[workload.work]\n", "[workload.work]\ncheckpoint_every = EVERY\n")
            site.config.write_text(text.replace("EVERY", str(self._case.checkpoint_every)))
        site.start(env=self.plan(name))

    def watch(self) -> tuple[str, int]:
        """See the run to its end; how it ended, and the newest version that was shown."""
        deadline, seen, run = time.monotonic() + PATIENCE, 0, None
        while run is None or not run.HasField("ended"):
            assert time.monotonic() < deadline, self._hung(run)
            self._revive()
            with contextlib.suppress(grpc.RpcError), self._admin() as admin:
                if run is None:
                    self._create(admin)
                asked = 0.0
                while run is None or not run.HasField("ended"):
                    if time.monotonic() >= asked + LOOK:
                        asked = time.monotonic()
                        run = admin.GetRun(pb.GetRunRequest(run=RUN), timeout=5).run
                        assert run.version >= seen, f"version {seen} was shown, now it is {run.version}"
                        seen = run.version
                    if self._revive() or time.monotonic() > deadline:
                        break
                    time.sleep(0.03)
        return pb.RunState.Name(run.state).removeprefix("RUN_STATE_").lower(), seen

    def leave(self) -> None:
        """Stop everything in good order, once every planned end has come."""
        deadline = time.monotonic() + PATIENCE / 8
        while self.fired() != self._planned() and time.monotonic() < deadline:
            # What follows the run's end (old versions that go) may still be under way.
            self._revive()
            time.sleep(0.03)
        for site in self._federation.sites.values():
            assert site.daemon is not None
            site.daemon.kill()
        assert self._federation.server is not None
        self._revive()
        assert self._federation.server.stop() == 0

    def fired(self) -> Counter[str]:
        """The kills that have happened."""
        happened: Counter[str] = Counter()
        for path in self._federation.root.glob("*.fired"):
            happened.update(f"{path.stem}:{line}" for line in path.read_text().splitlines())
        return happened

    def acknowledged(self) -> list[str]:
        """The training tasks whose acceptance a daemon was told of."""
        return [json.loads(line)["task"] for line in self._said('"accepted"') if '"train"' in line]

    def resumed(self) -> int:
        """How often a training went on from a checkpoint."""
        return len(self._said('"resumed from a local checkpoint"'))

    def _said(self, words: str) -> list[str]:
        """What all daemons have logged of something."""
        logs = [(self._federation.root / f"{name}.log").read_text() for name in SITES]
        return [line for log in logs for line in log.splitlines() if words in line]

    def _planned(self) -> Counter[str]:
        return Counter(str(f) for f in self._case.faults if isinstance(f, Kill))

    def _revive(self) -> bool:
        """Start again what a fault has ended; whether that was the server."""
        server = self._federation.server
        assert server is not None
        for name, site in self._federation.sites.items():
            assert site.daemon is not None
            if self._ended(site.daemon, name):
                site.start(env=self.plan(name))
        if self._ended(server, "server"):
            self.start_server()
            return True
        return False

    def _ended(self, daemon: Daemon, who: str) -> bool:
        if daemon.running:
            return False
        assert daemon.process.poll() == KILLED, f"{who} ended by itself: {daemon.text()[-2000:]}"
        return True

    def _create(self, admin: pb_grpc.AdminServiceStub) -> None:
        spec: dict[str, Any] = {
            "name": RUN,
            "workload": "work",
            "model": MODEL,
            "rounds": ROUNDS,
            "cohort": {"min_clients": len(SITES)},
            "retention": {"keep_versions": 100, "keep_updates": True},
            "evaluation": {"enabled": self._case.evaluated},
        }
        for table, keys in self._case.settings.items():
            spec[table] = {**spec.get(table, {}), **keys}
        request = pb.CreateRunRequest(spec_json=json.dumps(spec), request_id=self._request)
        admin.CreateRun(request, timeout=10)

    @contextlib.contextmanager
    def _admin(self) -> Iterator[pb_grpc.AdminServiceStub]:
        address = f"unix:{admin_socket(self._federation.data_dir)}"
        with grpc.insecure_channel(address, options=rpc.channel_options()) as channel:
            yield pb_grpc.AdminServiceStub(channel)

    def _hung(self, run: pb.Run | None) -> str:
        state = f"{run.version} of {run.rounds} rounds; {run.waiting}" if run else "not even created"
        return f"the run did not end within {PATIENCE:.0f} s: {state}; fired {dict(self.fired())}"


def _link_blobs(source: str, target: str) -> None:
    if "/blobs/" in source:
        os.link(source, target)
    else:
        shutil.copy2(source, target)
