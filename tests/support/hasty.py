"""`fedclient start` with little patience, so that a test need not wait as long as a site does.

python tests/support/hasty.py site.toml
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from fedclient.cli import _serve
from fedclient.patience import Patience
from fedclient.settings import load_site
from fedlink import log
from fedlink.rpc import Liveness

# The server hangs up on who asks for a sign more often than every 5 s without anything else passing, so a test has it
# answer polls sooner than that.
HASTY = Patience(
    control=Liveness(silence=1.5, answer=1.0, unacknowledged=1.0),
    bulk=Liveness(silence=1.5, answer=3.0, unacknowledged=3.0, unused=1.0),
    call=4.0,
    stall=2.0,
)


if __name__ == "__main__":
    log.setup("info")
    asyncio.run(_serve(load_site(Path(sys.argv[1])), HASTY))
