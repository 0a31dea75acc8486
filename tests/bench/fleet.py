"""Many idle sites in one process: each with a channel of its own, registered, in a long poll for ever.

    python -m tests.bench.fleet ADDRESS FIRST COUNT

Prints a line once all are polling. For each run's name on stdin it waits until every site has been given a task of it,
and prints the times (since the epoch) of the first and the last answer. Ends with stdin.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections import defaultdict
from typing import TYPE_CHECKING

import grpc.aio
from google.protobuf.duration_pb2 import Duration

from fedlink import PROTOCOL_VERSION, rpc
from fedlink.v1 import coordination_service_pb2 as pb
from fedlink.v1.coordination_service_pb2_grpc import CoordinationServiceStub
from tests.bench.helpers import WORKLOAD
from tests.support.peer import SCHEMA

if TYPE_CHECKING:
    from fedlink.v1.coordination_service_pb2_grpc import CoordinationServiceAsyncStub

AT_ONCE = 32
"""Sites that register at the same moment."""
PATIENCE = 120.0


class Fleet:
    """The sites.

    Attributes:
        polling: how many have begun to poll.
        told: by run, when each was given its task.
    """

    def __init__(self, address: str) -> None:
        self.polling = 0
        self.told: defaultdict[str, list[float]] = defaultdict(list)
        self._address = address
        self._registering = asyncio.Semaphore(AT_ONCE)

    async def site(self, name: str) -> None:
        """Be one site, for ever."""
        async with grpc.aio.insecure_channel(self._address, options=rpc.channel_options()) as channel:
            stub: CoordinationServiceAsyncStub = CoordinationServiceStub(channel)
            metadata: rpc.Metadata = ((rpc.META_CLIENT, name),)
            async with self._registering:
                metadata = (*metadata, (rpc.META_SESSION, await self._register(stub, metadata)))
            wait, held = Duration(seconds=30), set[bytes]()
            self.polling += 1
            while True:
                request = pb.PollTaskRequest(held_tokens=held, wait=wait)
                answer = await stub.PollTask(request, metadata=metadata, timeout=PATIENCE)
                now = time.time()
                held -= set(answer.released_tokens)
                if answer.HasField("task"):
                    held.add(answer.task.token)
                    self.told[answer.task.run].append(now)

    async def _register(self, stub: CoordinationServiceAsyncStub, metadata: rpc.Metadata) -> bytes:
        offer = pb.RegisterClientRequest.WorkloadOffer(name=WORKLOAD, settings_schema_json=SCHEMA, abilities=["train"])
        request = pb.RegisterClientRequest(
            instance_id=os.urandom(16), protocol_version=PROTOCOL_VERSION, workloads=[offer]
        )
        while True:
            try:
                answer = await stub.RegisterClient(request, metadata=metadata, timeout=PATIENCE)
            except grpc.RpcError as e:
                if not rpc.from_rpc_error(e).reason.retryable:
                    raise
                await asyncio.sleep(random.uniform(0.1, 0.5))
            else:
                return answer.session


async def main(address: str, first: int, count: int) -> None:
    """Until stdin ends."""
    fleet = Fleet(address)
    async with asyncio.TaskGroup() as group:
        sites = [group.create_task(fleet.site(f"idle-{n:05}")) for n in range(first, first + count)]
        async with asyncio.timeout(PATIENCE):
            while fleet.polling < count:
                await asyncio.sleep(0.05)
        print(json.dumps({"polling": count}), flush=True)
        while run := (await asyncio.to_thread(sys.stdin.readline)).strip():
            async with asyncio.timeout(PATIENCE):
                while len(fleet.told[run]) < count:
                    await asyncio.sleep(0.05)
            print(json.dumps({"first": min(fleet.told[run]), "last": max(fleet.told[run])}), flush=True)
        for site in sites:
            site.cancel()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
