"""`fedclient join`: another machine's processes of a training that several machines do together.

This machine's daemon does not run; the first machine's speaks to the server, and its trainer's
first process tells the processes here what to do. They begin anew with it, for ever.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedclient.launch import link_packages, trainer_environment, trainer_program
from fedclient.settings import SiteSettings
from fedclient.trainer.descent import kill_descendants
from fedlink.errors import FedlinkError, Reason

_AGAIN_AFTER = 2.0


def join(site: SiteSettings, workload: str, node: int) -> None:
    """Train along with the first machine, until a signal.

    The first SIGTERM or SIGINT lets the processes here go on until the first machine's end, so that it can hand its
    work back; if there are none, or at the second, it ends at once.

    Args:
        site: the site's settings, the same as at the first machine.
        workload: a name in `site.workload`.
        node: this machine's number, from 1.

    Raises:
        FedlinkError: BAD_CONFIG: the workload is not one of several machines, or has no such number of them.
    """
    offer = site.workload.get(workload)
    several = offer.distributed if offer else None
    if offer is None or several is None or several.nodes == 1:
        text = f"site.toml has no [workload.{workload}.distributed] with nodes and rendezvous: nothing is to be joined"
        raise FedlinkError(Reason.BAD_CONFIG, text)
    if not 1 <= node < several.nodes:
        text = f"--node is to be 1 to {several.nodes - 1}: node 0 is where `fedclient start` runs"
        raise FedlinkError(Reason.BAD_CONFIG, text)
    home = site.state_dir / f"node-{node}"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    python = site.interpreter(workload)
    command = [str(python), *trainer_program(offer, workload, site.devices[0], home, node=node)]
    env = trainer_environment(os.environ, python, link_packages(home / "python"))
    until = _Signals()
    while True:
        # It ends whenever a process of the training does, wherever that was.
        code = _launched(command, env, site.directory, until)
        if until.asked:
            return
        _say(f"the processes here ended ({code}); they begin anew")
        time.sleep(_AGAIN_AFTER)


class _Signals:
    """What the signals that end this process do.

    Attributes:
        asked: whether there was one.
        launcher: the pipe to the launcher, which says by a byte that its processes are there.
    """

    def __init__(self) -> None:
        self.asked = False
        self.launcher: socket.socket | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.asked:
            sys.exit(128 + number)
        self.asked = True
        if not self._trains():
            sys.exit(0)
        _say("the processes here go on until the first machine ends them; a second signal ends them at once")

    def _trains(self) -> bool:
        try:
            return self.launcher is not None and bool(self.launcher.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK))
        except BlockingIOError:
            return False


def _launched(command: Sequence[str], env: Mapping[str, str], directory: Path, until: _Signals) -> int:
    ours, theirs = socket.socketpair()
    fd = theirs.fileno()
    # A session of its own: the terminal's Ctrl-C is for this process.
    process = subprocess.Popen(  # noqa: S603 - our own
        [*command, str(fd)], cwd=directory, env=env, pass_fds=[fd], start_new_session=True
    )
    theirs.close()
    try:
        until.launcher = ours
        return process.wait()
    finally:
        until.launcher = None
        if process.returncode is None:
            kill_descendants(process.pid, also=[process.pid])
            process.wait()
        ours.close()


def _say(text: str) -> None:
    print(f"fedclient: {text}", file=sys.stderr, flush=True)  # noqa: T201
