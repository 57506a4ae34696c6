"""A robot's control loop at 50 Hz, with an environment for a robot: MuJoCo's InvertedPendulum-v5, for example.

    python control_loop.py ENV_ID [grpc://HOST:PORT] [TICKS]

The loop gets an action every tick. When the server is late or gone, the last action is held for an instant; then a
fallback of our own takes over; after 0.4 s the robot is stopped, until somebody rearms it. What changes is told.
"""

import sys
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from lom_client import ControlLoop, LevelChanged, LoopConfig, LoopEvent, PolicyClient, Source

PERIOD_S = 0.02


def ease_off(command: NDArray[np.float64], measured: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Our fallback: a tenth less each tick, until nothing is left."""
    return 0.9 * command


def tell(event: LoopEvent) -> None:
    """Called in a thread of its own."""
    if isinstance(event, LevelChanged):
        print(f"tick {event.tick}: {event.before} -> {event.after}" + (event.reason and f" because {event.reason}"))


def main(env_id: str, target: str = "grpc://127.0.0.1:8001", ticks: str = "100") -> None:
    """Runs the loop for so many ticks, and prints what it was made of."""
    env: gymnasium.Env[Any, Any] = gymnasium.make(env_id)
    observation, _ = env.reset(seed=0)
    config = LoopConfig(
        period_s=PERIOD_S,
        kinds="torque",  # what is neither a position nor a velocity
        safe_action=np.zeros(env.action_space.shape or ()),
        slew_per_s=50.0,
        fallback=ease_off,
    )
    episodes = 0
    with PolicyClient(target) as client, ControlLoop(client, config, on_event=tell) as loop:
        for _ in loop.ticks():
            action = loop.step(observation)
            observation, _, terminated, truncated, _ = env.step(action.values)
            if terminated or truncated:
                observation, _ = env.reset()
                episodes += 1
            if loop.counters.ticks >= int(ticks):
                break
        sources = loop.counters.sources
    env.close()
    fresh, held, by_fallback, stopped = (sources.get(source, 0) for source in Source)
    print(f"{ticks} ticks: {fresh} fresh, {held} held, {by_fallback} by the fallback, {stopped} stopped")
    print(f"{episodes} episodes over")


if __name__ == "__main__":
    main(*sys.argv[1:])
