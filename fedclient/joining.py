"""`fedclient join`: another machine's processes of a training that several machines do together.

This machine's daemon does not run; the first machine's speaks to the server, and its trainer's
first process tells the processes here what to do. They begin anew with it, for ever.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from fedclient.launch import link_packages, trainer_environment, trainer_program
from fedclient.settings import SiteSettings
from fedlink.errors import FedlinkError, Reason

_AGAIN_AFTER = 2.0


def join(site: SiteSettings, workload: str, node: int) -> None:
    """Train along with the first machine, until this process is ended.

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
    # An exception ends the processes here, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    while True:
        # It ends whenever a process of the training does, wherever that was.
        code = subprocess.run(command, cwd=site.directory, env=env, check=False).returncode  # noqa: S603 - our own
        print(f"fedclient: the processes here ended ({code}); they begin anew", file=sys.stderr, flush=True)  # noqa: T201
        time.sleep(_AGAIN_AFTER)
