"""A robot's control loop at a fixed rate, with an environment for a robot.

    python control_loop.py ENV_ID [grpc://HOST:PORT] [TICKS]

The loop gets an action every tick. When the server is late or gone it repeats the last one for a few ticks, then puts
out the safe action (here: no action at all), and recovers by itself.
"""

import sys

import gymnasium
import numpy as np

from lom_client import ControlLoop, PolicyClient, Source

PERIOD_S = 0.05


def main(env_id: str, target: str = "grpc://127.0.0.1:8001", ticks: str = "100") -> None:
    """Runs the loop for so many ticks, and prints what it was made of."""
    env = gymnasium.make(env_id)
    observation, _ = env.reset(seed=0)
    safe_action = np.zeros(env.action_space.shape or ())
    with PolicyClient(target) as client, ControlLoop(client, period_s=PERIOD_S, safe_action=safe_action) as loop:
        for tick in loop.ticks():
            action = loop.step(observation)
            if action.source is not Source.FRESH:
                print(f"tick {tick.index}: {action.source} because {action.reason}")
            observation, _, terminated, truncated, _ = env.step(action.values)
            if terminated or truncated:
                observation, _ = env.reset()
            if loop.counters.ticks >= int(ticks):
                break
        counters = loop.counters
    env.close()
    print(f"{counters.ticks} ticks: {counters.fresh} fresh, {counters.held} held, {counters.safe} safe")


if __name__ == "__main__":
    main(*sys.argv[1:])
