"""What counting costs an answer: by itself, and as a share of what a server does for it.

    python -m tests.bench.observability

Prints Markdown tables. A server in this process answers one-row requests for the smallest of policies, so that the
share is the largest there can be, to a process that always has eight under way. Now it counts, now it does not, a fifth
of a second each in turn, so that whatever else the machine does meets both alike.
"""

import asyncio
import functools
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from lom_api.codec import pack_array
from lom_api.reasons import Reason
from lom_api.v1 import policy_pb2
from lom_server.batcher import MicroBatcher
from lom_server.config import ServerConfig
from lom_server.edges.listener import Listener, ListenerLimits
from lom_server.edges.policy_edge import PolicyEdge
from lom_server.loading import load_policy
from lom_server.metrics import RequestMetrics, Totals, expose
from lom_server.service import ActReply, ActRequest, Observer, PolicyService, PolicyVersions, Score, ServedPolicy
from tests.support.bundles import ACTION_DIM, OBSERVATION_DIM, POLICY, write_test_bundle

ACT = "/lom_api.v1.PolicyService/Act"
CALLS_AT_ONCE = 8
BLOCK_S = 0.2
PAIRS = 200
BAR = 0.02


@dataclass(kw_only=True)
class Tally:
    """Counts answers for the benchmark itself, and tells `observer`, where there is one, with an eye on the clock."""

    observer: Observer | None = None
    answers: int = 0
    told_ns: list[int] = field(default_factory=list)

    def answered(self, request: ActRequest, reply: ActReply, total_ns: int) -> None:
        """As `Observer`."""
        self.answers += 1
        if self.observer is not None:
            started_ns = time.perf_counter_ns()
            self.observer.answered(request, reply, total_ns)
            self.told_ns.append(time.perf_counter_ns() - started_ns)

    def refused(self, policy: str, reason: Reason) -> None:
        """As `Observer`."""
        raise AssertionError(f"expected sound requests for {policy}, got {reason}")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Answers per second, and seconds of this process' processor for each."""

    per_second: float
    processor_s: float


def main() -> None:
    """Prints the tables."""
    if len(sys.argv) > 1:
        asyncio.run(_ask_for_ever(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle"
        write_test_bundle(path)
        config = ServerConfig(models=path, provider="cpu")
        policy = load_policy(POLICY, 1, path, config).policy
        _print_parts(policy)
        asyncio.run(_print_share(policy, config))


def _print_parts(policy: ServedPolicy) -> None:
    """What each part costs by itself, over and over."""
    metrics = _metrics(policy)
    request = ActRequest(policy=POLICY, inputs=())
    costs_s = {
        f"an answer of {rows} rows": _cost_s(functools.partial(metrics.answered, request, _reply(rows), 300_000))
        for rows in (1, 64, 1024)
    }
    costs_s["a refusal"] = _cost_s(functools.partial(metrics.refused, POLICY, Reason.QUEUE_FULL))
    totals = Totals()
    for worker in range(4):
        totals.update(worker, metrics.snapshot())
    costs_s["a worker's snapshot"] = _cost_s(metrics.snapshot)
    costs_s["the sum of four"] = _cost_s(totals.total)
    costs_s["the metric families of it"] = _cost_s(lambda: list(expose(totals.total())))
    print("| part | µs |\n| --- | --- |")
    for part, cost_s in costs_s.items():
        print(f"| {part} | {cost_s * 1e6:.2f} |")


async def _print_share(policy: ServedPolicy, config: ServerConfig) -> None:
    tally = Tally()
    batcher = MicroBatcher(max_batch_rows=config.max_batch_rows, max_queue_rows=config.max_queue_rows)
    service = PolicyService(batcher=batcher, observer=tally)
    versions = PolicyVersions(versions={1: policy}, default_version=1)
    service.publish(POLICY, versions)
    listener = Listener(ListenerLimits.of(config))
    PolicyEdge(service).register(listener)
    address = await listener.listen("127.0.0.1:0")
    asker = subprocess.Popen([sys.executable, "-m", "tests.bench.observability", address])
    try:
        while tally.answers < 1000:
            assert asker.poll() is None, "expected the asking process to ask, but it ended"
            await asyncio.sleep(BLOCK_S)
        metrics = _metrics(policy)
        without: list[Block] = []
        counting: list[Block] = []
        for pair in range(PAIRS):
            # First one, then the other: whatever drifts meets both alike.
            for counts in (pair % 2 == 0, pair % 2 == 1):
                tally.observer = metrics if counts else None
                (counting if counts else without).append(await _block(tally))
    finally:
        asker.kill()
        asker.wait()
        await listener.drain(1.0)
        batcher.close()
    print(f"\n| one-row calls, {CALLS_AT_ONCE} at once, {PAIRS} pairs | median | quartiles |\n| --- | --- | --- |")
    pairs = list(zip(without, counting, strict=True))
    _print_quartiles("throughput lost", "%", [100 * (1 - b.per_second / a.per_second) for a, b in pairs])
    _print_quartiles("processor more per answer", " µs", [1e6 * (b.processor_s - a.processor_s) for a, b in pairs])
    answer_us = statistics.median(tally.told_ns) / 1e3
    processor_us = statistics.median(block.processor_s for block in without) * 1e6
    share = answer_us / processor_us
    print(f"\nWithout: {statistics.median(block.per_second for block in without):.0f} answers per second.")
    print(
        f"Counting, between everything else: {answer_us:.1f} of the server's {processor_us:.0f} µs per answer, "
        f"{share:.2%}, {'within' if share < BAR else 'ABOVE'} the bar of {BAR:.0%}."
    )


def _print_quartiles(name: str, unit: str, values: Sequence[float]) -> None:
    low, middle, high = statistics.quantiles(values, n=4)
    print(f"| {name} | {middle:.2f}{unit} | {low:.2f} to {high:.2f} |")


async def _block(tally: Tally) -> Block:
    answers, started_s, processor_s = tally.answers, time.perf_counter(), time.process_time()
    await asyncio.sleep(BLOCK_S)
    answers = tally.answers - answers
    return Block(
        per_second=answers / (time.perf_counter() - started_s),
        processor_s=(time.process_time() - processor_s) / answers,
    )


async def _ask_for_ever(address: str) -> None:
    observation = np.zeros((1, OBSERVATION_DIM), dtype=np.float32)
    message = policy_pb2.ActRequest(policy=POLICY, inputs=[pack_array(observation, "observation")]).SerializeToString()
    async with grpc.aio.insecure_channel(address) as channel:
        act: Any = channel.unary_unary(ACT)

        async def ask() -> None:
            for _ in itertools.count():
                await act(message)

        await asyncio.gather(*(ask() for _ in range(CALLS_AT_ONCE)))


def _metrics(policy: ServedPolicy) -> RequestMetrics:
    metrics = RequestMetrics()
    metrics.publish(POLICY, PolicyVersions(versions={1: policy}, default_version=1))
    return metrics


def _reply(rows: int) -> ActReply:
    values = np.zeros(rows, dtype=np.float32)
    return ActReply(
        action=np.zeros((rows, ACTION_DIM), dtype=np.float32),
        mode=np.zeros(rows, dtype=np.int32),
        margin=values + np.float32(0.2),
        scores={"state_score": Score(values=values, threshold=1.0, warns=values > 1)},
        explanation={},
        is_clamped=False,
        policy=POLICY,
        version=1,
        variant="greedy_mode",
        bundle_digest="",
        queue_ns=20_000,
        inference_ns=30_000,
        batch_rows=rows,
    )


def _cost_s(call: Callable[[], object]) -> float:
    """Seconds of one call: the quickest of several runs, since whatever else runs only adds."""
    timer = timeit.Timer(call)
    number, _ = timer.autorange()
    return min(timer.repeat(5, number)) / number


if __name__ == "__main__":
    main()
