"""Many simulated robots, one question a step: `python vectorised_simulation.py ENV_ID [TARGET] [ENVS] [STEPS]`.

A batch costs the server little more than one row, and the way there and back only once.
"""

import sys
import time
from typing import Any

import gymnasium
import numpy as np

from lom_client import PolicyClient


def main(env_id: str, target: str = "grpc://127.0.0.1:8001", num_envs: str = "16", steps: str = "200") -> None:
    """Steps all environments so often, and prints how quickly that went."""
    envs: gymnasium.vector.VectorEnv[Any, Any, Any] = gymnasium.make_vec(
        env_id, num_envs=int(num_envs), vectorization_mode="sync"
    )
    latencies_s = []
    stepped = episodes = 0
    with PolicyClient(target) as client:
        client.get_spec(deadline_s=5.0)
        observations, _ = envs.reset(seed=0)
        over = np.zeros(envs.num_envs, dtype=np.bool_)
        began_at = time.monotonic()
        for _ in range(int(steps)):
            answer = client.act(observations, deadline_s=1.0)
            latencies_s.append(answer.timings.round_trip_s)
            stepped += int((~over).sum())  # what was over is reset by this step, and does not move
            observations, _, terminated, truncated, _ = envs.step(answer.actions)
            over = terminated | truncated
            episodes += int(over.sum())
        elapsed_s = time.monotonic() - began_at
    envs.close()
    p50_us, p99_us = np.percentile(latencies_s, (50, 99)) * 1e6
    print(
        f"{num_envs} environments: {stepped} steps in {elapsed_s:.2f} s, {stepped / elapsed_s:.0f} steps/s, "
        f"{episodes} episodes; {len(latencies_s)} calls, p50 {p50_us:.0f} µs, p99 {p99_us:.0f} µs"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
