"""What a server gives when more is asked of it than it can do, and what the batcher costs when nothing is.

    python -m tests.bench.overload

Prints Markdown tables: the capacity of an engine that burns about 10 ms of one core a run; then 0.8, 2, 10 and 0.8
times that, each request with 50 ms to live, with admission by deadline and without; then the price of `submit` over a
bare run, and of a refusal. In this process alone, without a transport: `offer` takes whatever answers a request. Wants
a machine with nothing else to do; the load average is printed.
"""

import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from lom_api.reasons import Reason
from lom_server.batcher import Lane, MicroBatcher, Rows
from lom_server.costs import RunCost
from lom_server.errors import PolicyError
from tests.support.engines import SteadyEngine

DEADLINE_S = 0.05
STEP_S = 4.0
STEPS = (0.8, 2.0, 10.0, 0.8)
CLIENTS = 16
FAR_NS = 3600 * 10**9


class Outcome(Enum):
    """What became of a request."""

    ANSWERED = "answered"
    REFUSED = "refused"
    """At once, because of the load."""
    EXPIRED = "expired"
    """It waited in vain."""


Submit = Callable[[int, int], Awaitable[Outcome]]
"""Sends request number n, which is of use until an instant of `time.monotonic_ns`, and waits for the outcome."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What was offered and what came of it.

    Attributes:
        answered_s, refused_s, expired_s: seconds from the moment a request was due until its outcome, one for each;
            an answer after its deadline counts as expired.
    """

    seconds: float
    answered_s: Sequence[float]
    refused_s: Sequence[float]
    expired_s: Sequence[float]

    @property
    def goodput(self) -> float:
        """Answers in time, per second."""
        return len(self.answered_s) / self.seconds


async def offer(submit: Submit, *, per_second: float, seconds: float, deadline_s: float) -> Load:
    """Sends requests at an even pace, whatever becomes of the earlier ones, and waits for the last outcome.

    Times count from the moment that a request was due, so that a sender held up by the server hides nothing.
    """
    times: dict[Outcome, list[float]] = {outcome: [] for outcome in Outcome}

    async def send(number: int, due_ns: int) -> None:
        deadline_ns = due_ns + int(deadline_s * 1e9)
        outcome = await submit(number, deadline_ns)
        ended_ns = time.monotonic_ns()
        if outcome is Outcome.ANSWERED and ended_ns > deadline_ns:
            outcome = Outcome.EXPIRED
        times[outcome].append((ended_ns - due_ns) * 1e-9)

    start_ns = time.monotonic_ns()
    async with asyncio.TaskGroup() as group:
        for number in range(round(per_second * seconds)):
            due_ns = start_ns + int(number / per_second * 1e9)
            wait_ns = due_ns - time.monotonic_ns()
            if wait_ns > 0:
                await asyncio.sleep(wait_ns * 1e-9)
            group.create_task(send(number, due_ns))
    return Load(
        seconds=seconds,
        answered_s=times[Outcome.ANSWERED],
        refused_s=times[Outcome.REFUSED],
        expired_s=times[Outcome.EXPIRED],
    )


async def capacity(submit: Submit, *, at_once: int, seconds: float) -> float:
    """Answers per second while `at_once` requests are always under way."""
    answers = 0
    start_ns = time.monotonic_ns()
    end_ns = start_ns + int(seconds * 1e9)
    numbers = itertools.count()

    async def keep_asking() -> None:
        nonlocal answers
        while time.monotonic_ns() < end_ns:
            if await submit(next(numbers), end_ns + FAR_NS) is Outcome.ANSWERED:
                answers += 1

    await asyncio.gather(*(keep_asking() for _ in range(at_once)))
    return answers / (time.monotonic_ns() - start_ns) * 1e9


def into_batcher(batcher: MicroBatcher, lane: Lane) -> Submit:
    """One row a request, from `CLIENTS` clients in turn."""
    rows: Rows = {"observation": np.ones((1, 8), np.float32)}

    async def submit(number: int, deadline_ns: int) -> Outcome:
        try:
            await batcher.submit(lane, rows, deadline_ns, client=f"robot-{number % CLIENTS}")
        except PolicyError as error:
            return Outcome.EXPIRED if error.reason is Reason.DEADLINE_EXCEEDED else Outcome.REFUSED
        return Outcome.ANSWERED

    return submit


def lane_of(engine: SteadyEngine, max_batch_rows: int, *, has_admission: bool = True) -> Lane:
    """A lane whose batches run in the engine thread. Without admission no deadline is infeasible."""
    sizes = [rows for rows in (1, 2, 4, 8) if rows <= max_batch_rows]
    cost = RunCost({rows: engine.cost_ns(rows) for rows in sizes} if has_admission else {})
    return Lane(engine=engine, graph="actor", outputs=("action",), inline_rows=0, cost=cost)


async def overload(max_batch_rows: int, engine: SteadyEngine, *, has_admission: bool) -> None:
    """Prints a table, a line for each step."""
    batcher = MicroBatcher(max_batch_rows=max_batch_rows, max_queue_rows=4096)
    submit = into_batcher(batcher, lane_of(engine, max_batch_rows, has_admission=has_admission))
    most = await capacity(submit, at_once=2 * max_batch_rows, seconds=2.0)
    print(f"\nBatches of up to {max_batch_rows}, capacity {most:.0f}/s, admission by deadline: {has_admission}.")
    print(f"Load average {os.getloadavg()[0]:.1f}.\n")
    print("| load | offered/s | goodput/s | of capacity | answered p50 / p99 ms | refused p50 / p99 ms | expired |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for step in STEPS:
        load = await offer(submit, per_second=step * most, seconds=STEP_S, deadline_s=DEADLINE_S)
        possible = min(1.0, step) * most
        print(
            f"| {step:g}x | {step * most:.0f} | {load.goodput:.0f} | {load.goodput / possible:.0%} "
            f"| {_quantiles(load.answered_s)} | {_quantiles(load.refused_s)} | {len(load.expired_s)} |"
        )
    batcher.close()


async def price_of_submit() -> None:
    """Prints what one caller at a time pays for the batcher, over a bare run of the same engine."""
    engine = SteadyEngine(run_ns=50_000)
    cost = RunCost({rows: engine.cost_ns(rows) for rows in (1, 2, 4, 8)})
    lane = Lane(engine=engine, graph="actor", outputs=("action",), inline_rows=8, cost=cost)
    batcher = MicroBatcher(max_batch_rows=8, max_queue_rows=4096)
    rows: Rows = {"observation": np.ones((1, 8), np.float32)}
    bare_ns, submitted_ns = [], []
    for _ in range(5000):
        start_ns = time.perf_counter_ns()
        engine.run("actor", ("action",), rows)
        middle_ns = time.perf_counter_ns()
        await batcher.submit(lane, rows, time.monotonic_ns() + FAR_NS, client="robot")
        bare_ns.append(middle_ns - start_ns)
        submitted_ns.append(time.perf_counter_ns() - middle_ns)
    batcher.close()
    extra_us = (statistics.median(submitted_ns) - statistics.median(bare_ns)) / 1000
    print("\n| bare run µs | through the batcher µs | the batcher's part µs |\n| --- | --- | --- |")
    print(f"| {statistics.median(bare_ns) / 1e3:.1f} | {statistics.median(submitted_ns) / 1e3:.1f} | {extra_us:.1f} |")


async def price_of_refusal() -> None:
    """Prints what it takes to refuse a deadline, with few and with many clients waiting."""
    print("\n| clients | rows waiting | refusal µs |\n| --- | --- | --- |")
    for clients, each in ((1, 128), (16, 16), (256, 16)):
        engine = SteadyEngine(run_ns=300_000_000)
        lane = Lane(
            engine=engine, graph="actor", outputs=("action",), inline_rows=0, cost=RunCost({1: engine.cost_ns(1)})
        )
        batcher = MicroBatcher(max_batch_rows=64, max_queue_rows=4096)
        rows: Rows = {"observation": np.ones((1, 8), np.float32)}
        waiting = [
            asyncio.create_task(batcher.submit(lane, rows, time.monotonic_ns() + FAR_NS, client=f"robot-{number}"))
            for number in [*range(clients)] * each
        ]
        await asyncio.sleep(0.01)
        refusals_ns = []
        for _ in range(1000):
            start_ns = time.perf_counter_ns()
            try:
                await batcher.submit(lane, rows, time.monotonic_ns() + 10_000_000, client="robot-0")
            except PolicyError:
                refusals_ns.append(time.perf_counter_ns() - start_ns)
        print(f"| {clients} | {batcher.waiting_rows} | {statistics.median(refusals_ns) / 1e3:.1f} |")
        batcher.close()
        await asyncio.gather(*waiting, return_exceptions=True)


def _quantiles(seconds: Sequence[float]) -> str:
    if not seconds:
        return ""
    middle, high = np.quantile(seconds, (0.5, 0.99)) * 1e3
    return f"{middle:.2f} / {high:.2f}"


def main() -> None:
    """Prints the tables."""
    for has_admission in (True, False):
        asyncio.run(overload(1, SteadyEngine(run_ns=10_000_000), has_admission=has_admission))
        engine = SteadyEngine(run_ns=6_000_000, row_ns=500_000)
        asyncio.run(overload(8, engine, has_admission=has_admission))
    asyncio.run(price_of_submit())
    asyncio.run(price_of_refusal())


if __name__ == "__main__":
    main()
