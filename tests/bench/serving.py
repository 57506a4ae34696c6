"""What a whole server holds up to: real `lom-serve` processes on this machine, asked over gRPC by this one.

    python -m tests.bench.serving [swaps] [failed-loads] [overload] [transports]

Prints a Markdown table for each part; without arguments all of them.

* swaps: 25 and 50 robots at 50 Hz, each on a stream of its own; rounds without swaps alternate with rounds in which
  versions are proved, loaded and promoted one after the other, one a second at most.
* failed-loads: 100 loads of a bundle that fails its proof, under traffic; memory before and after.
* overload: a graph that burns about 10 ms of a core, offered 0.8, 2, 10 and 0.8 times its capacity, by calls and on
  streams.
* transports: one caller and sixteen, unary, on streams, and by the Open Inference Protocol.
"""

import argparse
import asyncio
import datetime
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from lom_api.codec import pack_array
from lom_api.v1 import admin_pb2, admin_pb2_grpc, policy_pb2
from lom_server.edges.oip_schema import message_type
from tests.bench.overload import DEADLINE_S, STEPS, Outcome, Submit, capacity, offer
from tests.support.bundles import POLICY, Flaws, write_test_repository
from tests.support.servers import ServerProcess, running_server

ACT = "/lom_api.v1.PolicyService/Act"
ACT_STREAM = "/lom_api.v1.PolicyService/ActStream"
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
OBSERVATION = np.array([[0.1, 0.3, 0.2]], dtype=np.float32)
ROBOTS = (25, 50)
ROBOT_HZ = 50.0
ROUND_S = 10.0
ROUNDS = 3
FAILED_LOADS = 100
OVERLOAD_S = 8.0
TRANSPORT_S = 3.0
TRANSPORT_ROUNDS = 3
# A policy of 512 x 512 layers, as trained ones are.
REALISTIC = Flaws(burn_layers=2)


@contextmanager
def repository_server(versions: Mapping[int, Flaws], *options: str) -> Iterator[tuple[ServerProcess, str]]:
    """A server of `versions` of one policy, and the address of its admin service."""
    with tempfile.TemporaryDirectory() as folder:
        write_test_repository(f"{folder}/models", {POLICY: versions})
        admin = f"unix:{folder}/admin.sock"
        with running_server(f"{folder}/models", "--admin-listen", admin, *options) as server:
            yield server, admin


def request_message(sequence: int = 0, *, budget_s: float = 0.0) -> bytes:
    """One row."""
    return policy_pb2.ActRequest(
        policy=POLICY,
        inputs=[pack_array(OBSERVATION, "observation")],
        sequence=sequence,
        budget_ns=int(budget_s * 1e9),
    ).SerializeToString()


def connection(address: str) -> Any:
    """A connection that nobody else shares; untyped, as it sends raw bytes."""
    return grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])


async def robot(address: str, phase_s: float, seconds: float) -> tuple[list[float], int]:
    """Asks `ROBOT_HZ` times a second on one stream; seconds from each due instant to its answer, and refusals."""
    due_at: dict[int, float] = {}
    latencies: list[float] = []
    refused = 0
    async with connection(address) as channel:
        stream = channel.stream_stream(ACT_STREAM)()

        async def send() -> None:
            start = time.monotonic() + phase_s
            for number in range(1, int(seconds * ROBOT_HZ) + 1):
                due_at[number] = start + number / ROBOT_HZ
                await asyncio.sleep(max(0.0, due_at[number] - time.monotonic()))
                await stream.write(request_message(number))
            await stream.done_writing()

        sending = asyncio.create_task(send())
        async for message in stream:
            reply = policy_pb2.ActStreamReply.FromString(message)
            latencies.append(time.monotonic() - due_at.pop(reply.sequence))
            refused += reply.HasField("refusal")
        await sending
    return latencies, refused + len(due_at)


async def fleet(address: str, seconds: float, robots: int) -> tuple[list[float], int]:
    """Latencies and failures of `robots` robots whose ticks are spread over the period."""
    phases = [number / robots / ROBOT_HZ for number in range(robots)]
    results = await asyncio.gather(*(robot(address, phase_s, seconds) for phase_s in phases))
    return [latency for latencies, _ in results for latency in latencies], sum(failed for _, failed in results)


@asynccontextmanager
async def administrator(admin: str) -> AsyncIterator[Any]:
    """An admin stub."""
    async with grpc.aio.insecure_channel(admin) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


async def swap_every_second(admin: str, seconds: float) -> list[float]:
    """Proves, loads and promotes the version that does not serve, once a second; how long each swap took."""
    took_s = []
    async with administrator(admin) as stub:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            start = time.monotonic()
            state = await stub.ListPolicies(admin_pb2.ListPoliciesRequest())
            serving = state.policies[0].default_version
            other = 3 - serving
            if any(v.version == other and v.state == admin_pb2.LOAD_STATE_READY for v in state.policies[0].versions):
                await stub.UnloadPolicy(admin_pb2.UnloadPolicyRequest(policy=POLICY, version=other))
            await stub.LoadPolicy(admin_pb2.LoadPolicyRequest(policy=POLICY, version=other, promote=True))
            took_s.append(time.monotonic() - start)
            await asyncio.sleep(max(0.0, 1.0 - took_s[-1]))
    return took_s


def swaps() -> None:
    """Robots at 50 Hz, with and without swaps."""
    print(f"\nRobots at {ROBOT_HZ:g} Hz, {ROUNDS} rounds of {ROUND_S:g} s each way, interleaved\n")
    print(
        "| robots | swaps | requests | failed | p50 ms | p99 ms | p99.9 ms | max ms | p99.9 with / without | a swap |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for robots in ROBOTS:
        swaps_under(robots)


def swaps_under(robots: int) -> None:
    """Two lines of the table."""
    versions = {1: REALISTIC, 2: Flaws(burn_layers=2, action_offset=0.125)}
    latencies: dict[bool, list[float]] = {False: [], True: []}
    failures = {False: 0, True: 0}
    swap_s: list[float] = []

    async def measure(address: str, admin: str) -> None:
        await fleet(address, 2.0, robots)
        for has_swaps in (False, True) * ROUNDS:
            swapping = asyncio.create_task(swap_every_second(admin, ROUND_S)) if has_swaps else None
            found, failed = await fleet(address, ROUND_S, robots)
            latencies[has_swaps] += found
            failures[has_swaps] += failed
            if swapping is not None:
                swap_s.extend(await swapping)

    with repository_server(versions) as (server, admin):
        asyncio.run(measure(server.address, admin))
    ratio = np.quantile(latencies[True], 0.999) / np.quantile(latencies[False], 0.999)
    for has_swaps in (False, True):
        p50, p99, p999, most = np.quantile(latencies[has_swaps], (0.5, 0.99, 0.999, 1)) * 1e3
        print(
            f"| {robots} | {len(swap_s) if has_swaps else 0} | {len(latencies[has_swaps])} | {failures[has_swaps]} "
            f"| {p50:.2f} | {p99:.2f} | {p999:.2f} | {most:.2f} "
            + (f"| {ratio:.2f} | {statistics.median(swap_s):.2f} s |" if has_swaps else "| | |")
        )


def resident_kib(pid: int) -> int:
    """Of a process."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1])


def processes_of(server: ServerProcess) -> list[int]:
    """The supervisor and its workers."""
    supervisor = server.process.pid
    tasks = Path(f"/proc/{supervisor}/task").iterdir()
    return [supervisor, *(int(child) for task in tasks for child in (task / "children").read_text().split())]


def failed_loads() -> None:
    """100 loads that fail, under traffic."""

    async def measure(server: ServerProcess, admin: str) -> None:
        async with administrator(admin) as stub:

            async def fail() -> None:
                call = stub.LoadPolicy(admin_pb2.LoadPolicyRequest(policy=POLICY, version=2, promote=True))
                assert (await call.details()).startswith("SELF_TEST_FAILED"), await call.details()

            for _ in range(5):  # what is allocated once
                await asyncio.gather(fail(), fleet(server.address, 0.2, robots=5))
            before = [resident_kib(pid) for pid in processes_of(server)]
            answers = failures = 0
            start = time.monotonic()
            for _ in range(FAILED_LOADS):
                (latencies, failed), _ = await asyncio.gather(fleet(server.address, 0.2, robots=5), fail())
                answers += len(latencies)
                failures += failed
            took_s = time.monotonic() - start
            after = [resident_kib(pid) for pid in processes_of(server)]
        print(f"\n{FAILED_LOADS} failed loads in {took_s:.0f} s, 5 robots at {ROBOT_HZ:g} Hz meanwhile\n")
        print("| process | RSS before MiB | after MiB | growth |\n| --- | --- | --- | --- |")
        for name, first, last in zip(("supervisor", "worker"), before, after, strict=True):
            print(f"| {name} | {first / 1024:.1f} | {last / 1024:.1f} | {last / first - 1:+.2%} |")
        print(f"\nrequests answered by the version that served: {answers}, failed: {failures}")

    with repository_server({1: REALISTIC, 2: Flaws(wrong_golden=True)}, "--pin", f"{POLICY}=1") as (server, admin):
        asyncio.run(measure(server, admin))


def unary_submit(channels: Sequence[Any]) -> Submit:
    """One row a request, with the instant as its deadline."""
    calls = [channel.unary_unary(ACT) for channel in channels]
    message = request_message()

    async def submit(number: int, deadline_ns: int) -> Outcome:
        left_s = (deadline_ns - time.monotonic_ns()) * 1e-9
        if left_s <= 0:
            return Outcome.EXPIRED
        try:
            await calls[number % len(calls)](message, timeout=min(left_s, 10.0))
        except grpc.aio.AioRpcError as error:
            return Outcome.REFUSED if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED else Outcome.EXPIRED
        return Outcome.ANSWERED

    return submit


@asynccontextmanager
async def stream_submit(channels: Sequence[Any]) -> AsyncIterator[Submit]:
    """The same on a stream of each channel."""
    waiting: dict[int, asyncio.Future[Outcome]] = {}
    sequences = itertools.count(1)
    streams = [(channel.stream_stream(ACT_STREAM)(), asyncio.Lock()) for channel in channels]

    async def submit(number: int, deadline_ns: int) -> Outcome:
        stream, one_writer = streams[number % len(streams)]
        async with one_writer:
            left_s = (deadline_ns - time.monotonic_ns()) * 1e-9
            if left_s <= 0:
                return Outcome.EXPIRED
            sequence = next(sequences)
            outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
            waiting[sequence] = outcome
            await stream.write(request_message(sequence, budget_s=min(left_s, 10.0)))
        return await outcome

    async def read(stream: Any) -> None:
        async for message in stream:
            answer = policy_pb2.ActStreamReply.FromString(message)
            refusal = answer.refusal.code if answer.HasField("refusal") else 0
            is_overload = refusal == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            waiting.pop(answer.sequence).set_result(
                Outcome.REFUSED if is_overload else Outcome.EXPIRED if refusal else Outcome.ANSWERED
            )

    async with asyncio.TaskGroup() as readers:
        for stream, _ in streams:
            readers.create_task(read(stream))
        yield submit
        for stream, _ in streams:
            await stream.done_writing()


HEALTH_PROBE = """
import sys, time
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
address, end, took = sys.argv[1], time.monotonic() + float(sys.argv[2]), []
with grpc.insecure_channel(address) as channel:
    stub = health_pb2_grpc.HealthStub(channel)
    while time.monotonic() < end:
        start = time.monotonic()
        stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        took.append(time.monotonic() - start)
        time.sleep(0.02)
took.sort()
print(f"{took[len(took) // 2] * 1e3:.2f} / {took[len(took) * 99 // 100] * 1e3:.2f}")
"""


async def health_of(address: str, seconds: float) -> str:
    """p50 / p99 in milliseconds of health checks from a process of their own, which the load does not hold up."""
    probe = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HEALTH_PROBE, address, str(seconds)), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await probe.communicate()
    return output.decode().strip()


def overload() -> None:
    """Far more than the graph can do."""

    async def measure(address: str) -> None:
        print("\nA row burns about 10 ms of a core, one row a run; 50 ms to live. Answered, refused, health: p50 / p99")
        print("in ms, the first two from the moment that each request was due.\n")
        print("| way | load | offered/s | goodput/s | of capacity | answered | refused | expired | health |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        async with AsyncExitStack() as stack:
            channels = [await stack.enter_async_context(connection(address)) for _ in range(16)]
            await offer_steps("calls", address, unary_submit(channels))
        async with AsyncExitStack() as stack:
            channels = [await stack.enter_async_context(connection(address)) for _ in range(16)]
            await offer_steps("streams", address, await stack.enter_async_context(stream_submit(channels)))

    async def offer_steps(way: str, address: str, submit: Submit) -> None:
        await capacity(submit, at_once=4, seconds=1.0)
        most = await capacity(submit, at_once=4, seconds=4.0)
        for step in STEPS:
            load, health_ms = await asyncio.gather(
                offer(submit, per_second=step * most, seconds=OVERLOAD_S, deadline_s=DEADLINE_S),
                health_of(address, OVERLOAD_S),
            )
            print(
                f"| {way} | {step:g}x | {step * most:.0f} | {load.goodput:.0f} "
                f"| {load.goodput / (min(1.0, step) * most):.0%} | {quantiles(load.answered_s)} "
                f"| {quantiles(load.refused_s)} | {len(load.expired_s)} | {health_ms} |"
            )

    with repository_server({1: Flaws(burn_layers=640)}, "--max-batch-rows", "1", "--inference", "thread") as (
        server,
        _,
    ):
        asyncio.run(measure(server.address))


async def asked_in_turn(ask: Callable[[], Awaitable[Any]], seconds: float) -> list[float]:
    """Seconds of each of as many calls as fit."""
    took_s = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.monotonic()
        await ask()
        took_s.append(time.monotonic() - start)
    return took_s


def transports() -> None:
    """Unary, streams and the Open Inference Protocol."""

    async def unary(address: str, stack: AsyncExitStack) -> Callable[[], Awaitable[Any]]:
        call = (await stack.enter_async_context(connection(address))).unary_unary(ACT)
        message = request_message()
        return lambda: call(message)

    async def stream(address: str, stack: AsyncExitStack) -> Callable[[], Awaitable[Any]]:
        channel = await stack.enter_async_context(connection(address))
        exchange = channel.stream_stream(ACT_STREAM)()
        numbers = itertools.count(1)

        async def ask() -> None:
            await exchange.write(request_message(next(numbers)))
            await exchange.read()

        return ask

    async def open_inference(address: str, stack: AsyncExitStack) -> Callable[[], Awaitable[Any]]:
        call = (await stack.enter_async_context(connection(address))).unary_unary(MODEL_INFER)
        request = message_type("ModelInferRequest")(model_name=POLICY, raw_input_contents=[OBSERVATION.tobytes()])
        request.inputs.add(name="observation", datatype="FP32", shape=OBSERVATION.shape)
        message = request.SerializeToString()
        return lambda: call(message)

    ways = {"unary": unary, "stream": stream, "open inference, unary": open_inference}
    results: dict[tuple[str, int], list[list[float]]] = {(name, n): [] for name in ways for n in (1, 16)}

    async def measure(address: str) -> None:
        for _ in range(TRANSPORT_ROUNDS):
            for name, clients in results:
                async with AsyncExitStack() as stack:
                    asks = [await ways[name](address, stack) for _ in range(clients)]
                    found = await asyncio.gather(*(asked_in_turn(ask, TRANSPORT_S) for ask in asks))
                results[name, clients].append([latency for latencies in found for latency in latencies])

    with repository_server({1: REALISTIC}) as (server, _):
        asyncio.run(measure(server.address))
    print(
        f"\nClosed loop, one row, {TRANSPORT_ROUNDS} interleaved rounds of {TRANSPORT_S:g} s; medians over the rounds\n"
    )
    print("| way | clients | p50 µs | p99 µs | requests/s |\n| --- | --- | --- | --- | --- |")
    for (name, clients), rounds in results.items():
        p50 = statistics.median(float(np.quantile(latencies, 0.5)) for latencies in rounds) * 1e6
        p99 = statistics.median(float(np.quantile(latencies, 0.99)) for latencies in rounds) * 1e6
        rate = statistics.median(len(latencies) for latencies in rounds) / TRANSPORT_S
        print(f"| {name} | {clients} | {p50:.0f} | {p99:.0f} | {rate:.0f} |")


def quantiles(seconds: Sequence[float]) -> str:
    """p50 / p99 in milliseconds."""
    if not seconds:
        return ""
    middle, high = np.quantile(seconds, (0.5, 0.99)) * 1e3
    return f"{middle:.2f} / {high:.2f}"


PARTS: Mapping[str, Callable[[], None]] = {
    "swaps": swaps,
    "failed-loads": failed_loads,
    "overload": overload,
    "transports": transports,
}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description="Benchmarks of a whole server.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which; all by default")
    chosen = parser.parse_args().parts or list(PARTS)
    today = datetime.datetime.now(datetime.UTC).date()
    print(f"{today}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for name in chosen:
        PARTS[name]()


if __name__ == "__main__":
    main()
