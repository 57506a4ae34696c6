"""Sixteen robots at 50 Hz on one event loop: `python robot_fleet.py [TARGET] [SECONDS] [ROBOTS]`.

Every robot has a connection and a stream of its own, and a phase of its own, so that the questions arrive spread over
the period. Where no answer comes in time, the command before stays. A robot that can do harm wants a `ControlLoop`,
which also knows when to stop holding.
"""

import asyncio
import sys
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from lom_client import AsyncPolicyClient, ClientConfig, PolicyError, Superseded

PERIOD_S = 0.02
DEADLINE_S = 0.8 * PERIOD_S


@dataclass
class Robot:
    """What became of one robot's ticks."""

    latencies_s: list[float] = field(default_factory=list)
    held: Counter[str] = field(default_factory=Counter)

    @property
    def ticks(self) -> int:
        """Ticks so far."""
        return len(self.latencies_s) + self.held.total()

    def __str__(self) -> str:
        if not self.latencies_s:
            return f"fresh 0.0 %  held {dict(self.held)}"
        p50_ms, p99_ms = np.percentile(self.latencies_s, (50, 99)) * 1e3
        share = len(self.latencies_s) / self.ticks
        return f"fresh {share:.1%}  p50 {p50_ms:.2f} ms  p99 {p99_ms:.2f} ms  held {dict(self.held)}"


async def drive(client: AsyncPolicyClient, first_tick_at: float, ticks: int, seed: int) -> Robot:
    """One robot: an observation that wanders, and a command for each."""
    robot = Robot()
    loop = asyncio.get_running_loop()
    spec = await client.get_spec(deadline_s=5.0)
    rng = np.random.default_rng(seed)
    observation = np.clip(rng.standard_normal(spec.observation.width), spec.observation.low, spec.observation.high)
    command = np.clip(0.0, spec.action.low, spec.action.high)
    left_alone_until = 0.0
    for tick in range(ticks):
        due = first_tick_at + tick * PERIOD_S
        await asyncio.sleep(due - loop.time())
        if loop.time() - due > PERIOD_S:  # what is over is not caught up in a burst
            robot.held["TICK_MISSED"] += 1
            continue
        observation += 0.05 * rng.standard_normal(len(observation))
        observation = np.clip(observation, spec.observation.low, spec.observation.high)
        asked_at = loop.time()
        if asked_at < left_alone_until:
            robot.held["LEFT_ALONE"] += 1
            continue
        try:
            answer = await client.act(observation, deadline_s=DEADLINE_S)
        except PolicyError as error:  # overloaded, unavailable, too late: hold
            if not (error.retryable or isinstance(error, Superseded)):
                raise
            robot.held[error.reason] += 1
            left_alone_until = asked_at + (error.retry_after_s or 0.0)
        else:
            robot.latencies_s.append(loop.time() - asked_at)
            command = answer.actions
        assert np.isfinite(command).all()  # here a robot would move
    return robot


async def drive_all(target: str, seconds: float, robots: int) -> list[Robot]:
    """The fleet; begins once every robot knows the contract."""
    clients = [AsyncPolicyClient(target, config=ClientConfig(use_stream=True)) for _ in range(robots)]
    try:
        specs = await asyncio.gather(*(client.get_spec(deadline_s=5.0) for client in clients))
        print(f"{robots} robots, policy {specs[0].policy}, {seconds:g} s at {1 / PERIOD_S:g} Hz", flush=True)
        begin_at = asyncio.get_running_loop().time() + PERIOD_S
        return await asyncio.gather(
            *(
                drive(client, begin_at + PERIOD_S * number / robots, round(seconds / PERIOD_S), seed=number)
                for number, client in enumerate(clients)
            )
        )
    finally:
        await asyncio.gather(*(client.close() for client in clients))


def main(target: str = "grpc://127.0.0.1:8001", seconds: str = "5", robots: str = "16") -> None:
    """Prints a line for each robot and one for all of them."""
    try:
        fleet = asyncio.run(drive_all(target, float(seconds), int(robots)))
    except PolicyError as error:
        sys.exit(str(error))
    for number, robot in enumerate(fleet):
        print(f"robot {number:2}: {robot}")
    every = Robot(
        latencies_s=[latency for robot in fleet for latency in robot.latencies_s],
        held=sum((robot.held for robot in fleet), Counter()),
    )
    print(f"{len(fleet)} robots, {every.ticks} ticks: {every}")


if __name__ == "__main__":
    main(*sys.argv[1:])
