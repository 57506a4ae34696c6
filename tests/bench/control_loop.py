"""How punctual a control loop is, and what it does while its server is killed: measured, printed as Markdown.

    python -m tests.bench.control_loop [lateness] [poll] [kills] [faults] [steps]

* lateness: how late each step returns after its deadline while no answer comes, beside a bare sleep loop of the same
  period that runs in turn with it; at 50, 100 and 250 Hz, asked in a thread and in a process.
* poll: how long a step takes that does not wait, against a server that answers.
* kills: 300 kills of the server at random moments, at 100 Hz, in a thread.
* faults: eight loops at 100 Hz, 100,000 ticks in all, asked in threads, on a stream and in a process, over connections
  that are cut, half cut and reset at random, of a server that is late one time in ten.
* steps: what a step costs by itself, and memory over a million of them.

Machines differ and are shared: compare within one run. The process is left as a user's would be, but for the garbage
collector, which is told to leave alone what exists (`gc.freeze`).
"""

import argparse
import gc
import os
import platform
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from lom_client import ClientConfig, ControlLoop, Level, LoopConfig, PolicyClient, PolicyProcess, Source, paced_ticks
from lom_client.levels import LoopState, Reply, Tick, advance
from tests.support.control_loops import BOUNDS, circling, hundred_hertz, running_loop
from tests.support.fake_policy_server import FakePolicyServerProcess
from tests.support.fault_proxy import FaultProxy
from tests.support.servers import wait_until

RATES_HZ = (50, 100, 250)
IO = ("thread", "process")
SECONDS = 6.0
ROUNDS = 3
KILLS = 300
FAULT_TICKS = 100_000
STEPS = 1_000_000
QUANTILES = (0.5, 0.99, 0.999, 1.0)


@contextmanager
def loop_of(io: str, target: str, config: LoopConfig) -> Iterator[ControlLoop]:
    """A loop that asks `target`."""
    if io == "process":
        with ControlLoop(PolicyProcess(target=target), config) as loop:
            yield loop
        return
    with PolicyClient(target) as client, ControlLoop(client, config) as loop:
        yield loop


def config_of(rate_hz: float, deadline_s: float | None) -> LoopConfig:
    """As a user's, but for stopping: a stopped loop asks and waits alike."""
    return LoopConfig(
        period_s=1 / rate_hz,
        kinds="position",
        safe_action=[0.0, 0.0],
        action_bounds=BOUNDS,
        slew_per_s=4.0,
        deadline_s=deadline_s,
    )


def row(*cells: object) -> None:
    """One line of a table."""
    print("| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")


def head(*cells: str) -> None:
    """The first lines of a table."""
    print()
    row(*cells)
    row(*["---"] * len(cells))


def milliseconds(values_s: list[float]) -> list[float]:
    """Median, p99, p99.9 and the largest."""
    return [float(value) * 1e3 for value in np.quantile(values_s, QUANTILES)]


def wait_lateness(rate_hz: float, wait: Callable[[int, float], None]) -> list[float]:
    """How late `wait(tick, deadline_s)` returns at this rate."""
    deadline_s = 0.8 / rate_hz
    late_s: list[float] = []
    for tick in paced_ticks(1 / rate_hz):
        if tick.index >= SECONDS * rate_hz / ROUNDS:
            return late_s
        began_at = time.monotonic()
        wait(tick.index, deadline_s)
        late_s.append(time.monotonic() - began_at - deadline_s)
    raise AssertionError


def lateness() -> None:
    """Of steps that get no answer, and of bare sleeps."""
    head("rate Hz", "asked in", "what", "p50 ms", "p99 ms", "p99.9 ms", "max ms")
    with FakePolicyServerProcess("never") as server:
        for rate_hz in RATES_HZ:
            for io in IO:
                bare_s: list[float] = []
                step_s: list[float] = []
                with loop_of(io, server.target, config_of(rate_hz, None)) as loop:
                    wait_until(lambda: loop.counters.ticks > 20 or not loop.step(circling(0)), "the warm-up")
                    for _ in range(ROUNDS):
                        bare_s += wait_lateness(rate_hz, lambda _, deadline_s: time.sleep(deadline_s))
                        step_s += wait_lateness(rate_hz, lambda index, _: void(loop.step(circling(index))))
                    assert loop.counters.fresh == 0
                row(rate_hz, io, "bare sleep", *milliseconds(bare_s))
                row(rate_hz, io, "step", *milliseconds(step_s))


def void(_: object) -> None:
    """Nothing."""


def poll() -> None:
    """Of steps that do not wait, and the share of them that is fresh."""
    head("rate Hz", "asked in", "fresh", "step p50 ms", "p99 ms", "p99.9 ms", "max ms", "CPU p50 ms", "CPU p99 ms")
    with FakePolicyServerProcess() as server:
        for rate_hz in RATES_HZ:
            for io in IO:
                took_s, cpu_s = [], []
                with loop_of(io, server.target, config_of(rate_hz, 0.0)) as loop:
                    wait_until(lambda: loop.step(circling(0)).source is Source.FRESH, "an answer")
                    before = loop.counters
                    for tick in paced_ticks(1 / rate_hz):
                        if tick.index >= SECONDS * rate_hz:
                            break
                        observation = circling(tick.index)
                        cpu, began_at = time.thread_time(), time.perf_counter()
                        loop.step(observation)
                        took_s.append(time.perf_counter() - began_at)
                        cpu_s.append(time.thread_time() - cpu)
                        if loop.level == "safe_stop":
                            loop.rearm()
                    counters = loop.counters
                share = (counters.fresh - before.fresh) / (counters.ticks - before.ticks)
                row(rate_hz, io, f"{share:.1%}", *milliseconds(took_s), *milliseconds(cpu_s)[:2])


def kills() -> None:
    """300, at random moments; judged as the tests judge them."""
    rng = random.Random(0)
    noticed_ms, recovered_ms, wrong, unanswered = [], [], 0, 0
    server = FakePolicyServerProcess()
    with PolicyClient(server.target) as client, running_loop(client, hundred_hertz(recovery_ticks=1)) as running:
        for _ in range(KILLS):
            time.sleep(rng.uniform(0.03, 0.05))
            server.kill()
            killed_at, killed_tick = time.monotonic(), len(running.actions)
            wait_until(lambda: running.actions[-1].source is not Source.FRESH, "the kill to be noticed")
            noticed_ms.append((time.monotonic() - killed_at) * 1e3)
            server.__exit__()
            wrong += sum(action.source is Source.FRESH for action in running.actions[killed_tick + 2 :])
            server = FakePolicyServerProcess(port=server.port)
            ready_at = time.monotonic()
            running.rearm()
            recovered_ms.append((time.monotonic() - ready_at) * 1e3)
        ticks = running.loop.counters.ticks
        unanswered = ticks - len(running.actions)
    server.__exit__()
    head(
        "kills", "ticks", "ticks without an action", "wrong actions", "noticed p50 / max ms", "fresh again p50 / max ms"
    )
    row(
        KILLS,
        ticks,
        max(0, unanswered - 1),  # the one under way when they were counted
        wrong,
        f"{np.median(noticed_ms):.1f} / {max(noticed_ms):.1f}",
        f"{np.median(recovered_ms):.0f} / {max(recovered_ms):.0f}",
    )


def faults() -> None:
    """Random ones; `running_loop` fails where an action was stale, reordered, used twice, unsound or missing."""
    rng = random.Random(0)
    ways = ("thread, waits", "thread, takes", "stream, takes", "process, takes") * 2
    suffered: Counter[str] = Counter()
    with FakePolicyServerProcess("erratic") as server, ExitStack() as stack:
        loops = []
        proxies = []
        for way in ways:
            proxy = stack.enter_context(FaultProxy(server.port))
            client_config = ClientConfig(use_stream=way.startswith("stream"))
            policy: PolicyClient | PolicyProcess = PolicyProcess(target=proxy.target, config=client_config)
            if not way.startswith("process"):
                policy = stack.enter_context(PolicyClient(proxy.target, config=client_config))
            config = hundred_hertz(deadline_s=None if "waits" in way else 0.0)
            loops.append(stack.enter_context(running_loop(policy, config)))
            proxies.append(proxy)
        while sum(len(loop.actions) for loop in loops) < FAULT_TICKS:
            proxy = rng.choice(proxies)
            fault = rng.choice(["cut", "cut_replies", "reset"])
            suffered[fault] += 1
            getattr(proxy, fault)()
            time.sleep(rng.uniform(0.001, 0.03))
            proxy.heal()
            time.sleep(rng.uniform(0.3, 0.8))
            for running in loops:
                if running.loop.level is Level.SAFE_STOP:
                    running.loop.rearm()
        counters = [running.loop.counters for running in loops]
    head("asked in", "ticks", "fresh", "rejected, by reason", "wrong actions")
    for way, counted in zip(ways, counters, strict=True):
        rejected = ", ".join(f"{reason} {number}" for reason, number in sorted(counted.rejected.items()))
        row(way, counted.ticks, f"{counted.fresh_share:.0%}", rejected, 0)
    print(f"\nFaults: {', '.join(f'{fault} {number}' for fault, number in sorted(suffered.items()))}.")


def steps() -> None:
    """Without a server: the levels alone, and memory over a million ticks of them."""
    rules = hundred_hertz(deadline_s=0.0, acceleration_per_s2=1000.0).rules(*BOUNDS)
    state = LoopState()
    resident_kib, took_s = [], []
    for number in range(1, STEPS + 1):
        now_ns = number * rules.period_ns
        reply = Reply(
            sequence=number - 1 or 1,
            observed_ns=now_ns - rules.period_ns,
            generation=0,
            action=(0.5, -0.5) if number % 100 < 50 else (-0.5, 0.5),
            bundle_digest="b",
            contract_hash="c",
        )
        began_at = time.perf_counter()
        if number % 10:
            state, _ = advance(rules, state, reply, now_ns)
        state, _ = advance(rules, state, Tick(), now_ns)
        if number % 100 == 0:
            took_s.append(time.perf_counter() - began_at)
        if number % (STEPS // 10) == 0:
            status = Path("/proc/self/status").read_text().splitlines()
            resident_kib.append(next(int(line.split()[1]) for line in status if line.startswith("VmRSS")))
    head("ticks of the levels", "p50 ms", "p99 ms", "resident after a tenth, MiB", "at the end, MiB")
    p50, p99, *_ = milliseconds(took_s)
    row(STEPS, p50, p99, resident_kib[0] / 1024, resident_kib[-1] / 1024)


PARTS = {"lateness": lateness, "poll": poll, "kills": kills, "faults": faults, "steps": steps}


def main() -> None:
    """Prints a table for each part asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    chosen = parser.parse_args().parts or list(PARTS)
    gc.collect()
    gc.freeze()
    load = os.getloadavg()[0]
    print(
        f"Python {platform.python_version()}, {os.cpu_count()} cores, load {load:.1f} at the start, {SECONDS:g} s a row"
    )
    for part in chosen:
        PARTS[part]()


if __name__ == "__main__":
    main()
