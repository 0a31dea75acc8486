"""A site that uploads as fast as it can, and times its heartbeats meanwhile.

    python -m tests.bench.uploads ADDRESS NAME TASKS BYTES DIRECTORY

Takes so many tasks and prints a line; at a line on stdin uploads a file of so many bytes for each, and prints the
seconds of every ExtendLease that was answered meanwhile, and those of all uploads.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from pathlib import Path

from fedclient.patience import Patience
from fedclient.session import Offer, Session
from fedclient.settings import SiteSettings
from fedlink import bulk, log, rpc
from fedlink.transfer import TaskPurpose
from tests.bench.helpers import WORKLOAD
from tests.support.peer import SCHEMA

EVERY = 0.02
"""Seconds between two heartbeats."""


async def beat(session: Session, token: bytes, latencies: list[float]) -> None:
    """Extend a lease again and again."""
    while True:
        began = time.perf_counter()
        await session.extend(token, "uploading", 0, 1)
        latencies.append(time.perf_counter() - began)
        await asyncio.sleep(EVERY)


async def main(address: str, name: str, tasks: int, nbytes: int, directory: Path) -> None:
    """One site's life."""
    rpc.tune_malloc()
    log.setup("warning")
    workload = {WORKLOAD: {"trainer": "none:None"}}
    site = SiteSettings.model_validate({"name": name, "server": address, "workload": workload})
    offer = Offer(WORKLOAD, SCHEMA, ("train",), ("*",))
    async with Session(site, [offer], [], rng=random.Random(name), patience=Patience()) as session:
        await session.open()
        files, tokens = [], list[bytes]()
        block = os.urandom(1 << 20)
        for number in range(tasks):
            path = directory / f"{name}-{number}"
            # No two files are the same, or the second would not have to be sent.
            path.write_bytes((os.urandom(16) + block * (1 + nbytes // len(block)))[:nbytes])
            files.append((path, *bulk.hash_file(path)))
        while len(tokens) < tasks:
            if order := (await session.poll(tokens, 5.0)).order:
                tokens.append(order.token)
        print(json.dumps({"tasks": tasks}), flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        latencies: list[float] = []
        began = time.perf_counter()
        for token, (path, ref, digests) in zip(tokens, files, strict=True):
            beating = asyncio.create_task(beat(session, token, latencies))
            await bulk.upload_file(session.bulk, path, ref, digests, TaskPurpose(token), metadata=session.metadata)
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
        print(json.dumps({"latencies": latencies, "seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5])))
