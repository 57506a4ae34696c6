"""What recording costs whoever is recorded: in the path of an answer, and as a share of what a process answers.

    python -m tests.bench.recorder

Prints Markdown tables. Recorded and unrecorded blocks of a fifth of a second follow each other in turn in one process,
so that whatever else the machine does meets both alike; the writing thread runs in both, and idles in one of them.
"""

import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from lom_api.codec import pack_array
from lom_api.reasons import Reason
from lom_api.v1 import policy_pb2
from lom_client import ControlLoop, FlightRecorder, LoopConfig, PolicyClient
from lom_server.batcher import MicroBatcher
from lom_server.config import ServerConfig
from lom_server.edges.listener import Listener, ListenerLimits
from lom_server.edges.policy_edge import PolicyEdge
from lom_server.loading import load_policy
from lom_server.recording import TrafficRecorder
from lom_server.service import ActReply, ActRequest, PolicyService, PolicyVersions
from tests.support.bundles import POLICY, write_test_bundle

ACT = "/lom_api.v1.PolicyService/Act"
CALLS_AT_ONCE = 8
BLOCK_S = 0.2
PAIRS = 60
BAR_US = 20.0


@dataclass(kw_only=True)
class Told:
    """An observer that records where it is switched on, with an eye on the clock."""

    recorder: TrafficRecorder
    is_on: bool = False
    answers: int = 0
    took_ns: list[int] = field(default_factory=list)

    def answered(self, request: ActRequest, reply: ActReply, total_ns: int) -> None:
        """As `Observer`."""
        self.answers += 1
        if self.is_on:
            began_ns = time.perf_counter_ns()
            self.recorder.put(request, reply)
            self.took_ns.append(time.perf_counter_ns() - began_ns)

    def refused(self, policy: str, reason: Reason) -> None:
        """As `Observer`."""
        raise AssertionError(reason)


def main() -> None:
    """Prints the tables; exits with 1 where a median is above what is allowed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_test_bundle(folder / "bundle")
        medians = [asyncio.run(server_cost(folder)), loop_cost(folder)]
    sys.exit(int(max(medians) > BAR_US))


async def server_cost(folder: Path) -> float:
    """A server in this process, with eight one-row calls always under way. Returns the median cost in microseconds."""
    config = ServerConfig(models=folder / "bundle")
    recorder = TrafficRecorder(folder / "server", max_mb=4096, workers=1)
    told = Told(recorder=recorder)
    batcher = MicroBatcher(max_batch_rows=config.max_batch_rows, max_queue_rows=config.max_queue_rows)
    service = PolicyService(batcher=batcher, observer=told)
    policy = load_policy(POLICY, 1, folder / "bundle", config).policy
    versions = PolicyVersions(versions={1: policy}, default_version=1)
    recorder.publish(versions)
    service.publish(POLICY, versions)
    listener = Listener(ListenerLimits.of(config))
    PolicyEdge(service).register(listener)
    address = await listener.listen("127.0.0.1:0")
    message = policy_pb2.ActRequest(
        policy=POLICY, inputs=[pack_array(np.array([[0.1, 0.2, 0.3]], np.float32), "observation")]
    ).SerializeToString()
    rates: dict[bool, list[float]] = {False: [], True: []}
    async with grpc.aio.insecure_channel(address) as channel:
        act: Callable[..., Any] = channel.unary_unary(ACT)

        async def keep_asking() -> None:
            while True:
                await act(message, timeout=10)

        askers = [asyncio.create_task(keep_asking()) for _ in range(CALLS_AT_ONCE)]
        await asyncio.sleep(1)
        for is_on in itertools.chain.from_iterable(itertools.repeat((False, True), PAIRS)):
            told.is_on, before, began_at = is_on, told.answers, time.perf_counter()
            await asyncio.sleep(BLOCK_S)
            rates[is_on].append((told.answers - before) / (time.perf_counter() - began_at))
        for asker in askers:
            asker.cancel()
        await asyncio.gather(*askers, return_exceptions=True)
    await listener.drain(0)
    recorder.close()
    print_table("A server, one-row requests, eight under way", told.took_ns, rates, recorder.dropped)
    return statistics.median(told.took_ns) * 1e-3


def loop_cost(folder: Path) -> float:
    """A control loop that does not wait. Returns the median cost in microseconds."""
    config = LoopConfig(
        period_s=1, kinds="position", safe_action=[0, 0], deadline_s=0, hold_limit=1000, stop_limit=2000
    )
    rates: dict[bool, list[float]] = {False: [], True: []}
    took_ns: list[int] = []
    observation = np.array([0.1, 0.2, 0.3])
    with (
        PolicyClient(f"inproc:{folder / 'bundle'}") as client,
        FlightRecorder(folder / "loop", finishes=False, max_mb=4096) as recorder,
        ControlLoop(client, config, recorder=recorder) as loop,
    ):
        tick = recorder.tick

        def timed(*arguments: object) -> None:
            began_ns = time.perf_counter_ns()
            tick(*arguments)  # type: ignore[arg-type]
            took_ns.append(time.perf_counter_ns() - began_ns)

        recorder.tick = timed  # type: ignore[method-assign,assignment]
        record: Callable[..., None] = loop._record
        for is_on in itertools.chain.from_iterable(itertools.repeat((False, True), PAIRS)):
            loop._record = record if is_on else lambda *_: None  # type: ignore[method-assign]
            steps_s = []
            over_at = time.perf_counter() + BLOCK_S
            while time.perf_counter() < over_at:
                began_at = time.perf_counter()
                loop.step(observation)
                steps_s.append(time.perf_counter() - began_at)
                time.sleep(0.002)
            rates[is_on].append(1 / statistics.median(steps_s))
        dropped = recorder.dropped
    print_table(
        "A control loop, a step every two milliseconds; steps a second if it did nothing else", took_ns, rates, dropped
    )
    return statistics.median(took_ns) * 1e-3


def print_table(title: str, took_ns: Sequence[int], rates: dict[bool, list[float]], dropped: int) -> None:
    """What a call took, and how many answers a second there were without and with it."""
    p50, p99, p999 = np.percentile(took_ns, (50, 99, 99.9)) * 1e-3
    ratios = [on / off for off, on in zip(rates[False], rates[True], strict=True)]
    low, high = _confidence(ratios)
    print(f"\n{title} ({len(took_ns)} recorded, {dropped} dropped)\n")
    print("| in the path p50 / p99 / p99.9 / max, µs | a second without | with | ratio (95 %) |")
    print("| --- | --- | --- | --- |")
    print(
        f"| {p50:.1f} / {p99:.1f} / {p999:.1f} / {max(took_ns) * 1e-3:.0f} "
        f"| {statistics.median(rates[False]):.0f} | {statistics.median(rates[True]):.0f} "
        f"| {statistics.median(ratios):.3f} ({low:.3f} to {high:.3f}) |",
        flush=True,
    )


def _confidence(ratios: Sequence[float]) -> tuple[float, float]:
    """Of the median, by bootstrap."""
    generator = np.random.default_rng(0)
    medians = np.median(generator.choice(np.asarray(ratios), (2000, len(ratios))), axis=1)
    low, high = np.percentile(medians, (2.5, 97.5))
    return float(low), float(high)


if __name__ == "__main__":
    main()
