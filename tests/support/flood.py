"""Asks a policy more than it can answer, from a process of its own.

    python -m tests.support.flood ADDRESS REQUESTS_PER_SECOND

One row a request, over 32 connections in turn, with 50 ms to live; until it is ended.
"""

import asyncio
import sys
import time
from contextlib import suppress
from typing import Any

import grpc
import numpy as np

from lom_api.codec import pack_array
from lom_api.v1 import policy_pb2
from tests.support.bundles import POLICY

CONNECTIONS = 32
DEADLINE_S = 0.05


async def flood(address: str, per_second: float) -> None:
    """Sends at an even pace, whatever becomes of it."""
    channels: list[Any] = [
        grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(CONNECTIONS)
    ]
    calls = [channel.unary_unary("/lom_api.v1.PolicyService/Act") for channel in channels]
    observation = pack_array(np.zeros((1, 3), dtype=np.float32), "observation")
    message = policy_pb2.ActRequest(policy=POLICY, inputs=[observation]).SerializeToString()
    under_way: set[asyncio.Task[None]] = set()

    async def ask(call: Any) -> None:
        with suppress(grpc.aio.AioRpcError):
            await call(message, timeout=DEADLINE_S)

    number, start = 0, time.monotonic()
    while True:
        task = asyncio.create_task(ask(calls[number % CONNECTIONS]))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        number += 1
        await asyncio.sleep(max(0.0, start + number / per_second - time.monotonic()))


if __name__ == "__main__":
    asyncio.run(flood(sys.argv[1], float(sys.argv[2])))
