"""Two network namespaces with a long line between them, and a federation with its server at one end."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlink.v1 import admin_service_pb2 as pb
from tests.bench.floor import ended
from tests.bench.place import HERE
from tests.bench.setting import Setting
from tests.bench.table import SkippedRow
from tests.support.federation import Daemon, Federation, alive

ADDRESSES = ("10.254.71.1", "10.254.71.2")
PACKETS = 20_000
"""That each direction holds at most; three times what is under way at 1 Gbit/s and 50 ms."""
BUFFERS = "4096 131072 67108864"
"""tcp_rmem and tcp_wmem at both ends: with the usual 4 MiB not even raw TCP fills such a line."""
_NAME = re.compile(r"fedlink-bench-(\d+)-[ab]")


@dataclass(frozen=True)
class Quality:
    """What a line is like, in each direction.

    Attributes:
        milliseconds: of delay, one way.
        loss: the part of the packets that is lost.
        bits: a second.
    """

    milliseconds: float
    loss: float
    bits: int


class LongLine(contextlib.ExitStack):
    """Two namespaces and the line, for as long as the context.

    By tc's netem over a veth pair where the kernel has it, else by `wire.c` between two tun devices.

    Attributes:
        spaces: names of the namespaces; `ADDRESSES` are theirs.
        by: what makes the line.

    Raises:
        SkippedRow: no root, no `ip`, or neither netem nor a C compiler with /dev/net/tun.
    """

    def __init__(self, quality: Quality) -> None:
        super().__init__()
        self.spaces = tuple(f"fedlink-bench-{os.getpid()}-{end}" for end in "ab")
        self.by = ""
        if os.geteuid() != 0:
            raise SkippedRow("network namespaces need root")
        if not shutil.which("ip") or not shutil.which("tc"):
            raise SkippedRow("ip and tc (iproute2) are needed")
        _remove_stale()
        try:
            self._make(quality)
        except BaseException:
            self.close()
            raise

    def inside(self, end: int) -> tuple[str, ...]:
        """What a command begins with to run at one end."""
        return ("ip", "netns", "exec", self.spaces[end])

    def _make(self, quality: Quality) -> None:
        for space in self.spaces:
            _run("ip", "netns", "add", space)
            self.callback(_run, "ip", "netns", "del", space)
        if not self._netem(quality):
            self._wire(quality)
        for space, address, end in zip(self.spaces, ADDRESSES, (0, 1), strict=True):
            _run("ip", "-n", space, "link", "set", "lo", "up")
            _run("ip", "-n", space, "addr", "add", f"{address}/30", "dev", "line")
            _run("ip", "-n", space, "link", "set", "line", "up", "txqueuelen", str(PACKETS))
            for key in ("rmem", "wmem"):
                _run(*self.inside(end), "sysctl", "-qw", f"net.ipv4.tcp_{key}={BUFFERS}")

    def _netem(self, quality: Quality) -> bool:
        a, b = self.spaces
        _run("ip", "-n", a, "link", "add", "line", "type", "veth", "peer", "name", "line", "netns", b)
        options = ["delay", f"{quality.milliseconds}ms", "loss", f"{100 * quality.loss}%"]
        options += ["rate", f"{quality.bits}bit", "limit", str(PACKETS)]
        try:
            for space in self.spaces:
                # One packet is one packet, as on a line, and not 64 KiB that are lost together.
                _run("ip", "-n", space, "link", "set", "line", "gso_max_segs", "1")
                _run("tc", "-n", space, "qdisc", "add", "dev", "line", "root", "netem", *options)
        except SkippedRow:
            _run("ip", "-n", a, "link", "del", "line")
            return False
        self.by = "netem"
        return True

    def _wire(self, quality: Quality) -> None:
        compiler = shutil.which("gcc") or shutil.which("cc")
        if not compiler or not Path("/dev/net/tun").exists():
            raise SkippedRow("this kernel has no netem, and wire.c in its place needs a C compiler and /dev/net/tun")
        program = Path(self.enter_context(tempfile.TemporaryDirectory())) / "wire"
        _run(compiler, "-std=gnu11", "-O2", "-pthread", "-o", str(program), str(HERE / "wire.c"))
        numbers = (quality.milliseconds, quality.loss, quality.bits, PACKETS)
        wire = self.enter_context(ended([str(program), *self.spaces, "line", *map(str, numbers)]))
        assert wire.stdout is not None
        if wire.stdout.readline() != "ready\n":
            raise SkippedRow("wire.c could not make its devices; what it said is above")
        self.by = "wire.c"


class Apart(Setting):
    """The server at one end of a line, the sites at the other, without TLS."""

    def __init__(self, line: LongLine) -> None:
        self._line = line

    def federation(self, root: Path) -> Federation:
        """One whose processes run at their ends."""
        return _Apart(root, self._line)

    def start_server(self, federation: Federation) -> None:
        """Off loopback, so that sites need tokens."""
        federation.start_server("--insecure", listen=f"{ADDRESSES[0]}:0")

    def site(self, federation: Federation, name: str) -> dict[str, Any]:
        """Its token."""
        with federation.admin() as stub:
            token = stub.AddClient(pb.AddClientRequest(name=name), timeout=60).token
        file = federation.root / f"{name}.token"
        file.touch(0o600)
        file.write_text(token)
        return {"token_file": str(file), "insecure": True}


class _Apart(Federation):
    def __init__(self, root: Path, line: LongLine) -> None:
        super().__init__(root)
        self._line = line

    def _daemon(self, command: list[str], name: str, env: Mapping[str, str] | None = None) -> Daemon:
        return super()._daemon([*self._line.inside(0 if name == "server" else 1), *command], name, env)


def _remove_stale() -> None:
    """Namespaces of a benchmark that was killed."""
    for found in _NAME.finditer(_run("ip", "netns", "list")):
        if not alive(int(found[1])):
            _run("ip", "netns", "del", found[0])


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SkippedRow(f"`{' '.join(command)}` is not possible here: {done.stderr.strip()}")
    return done.stdout
