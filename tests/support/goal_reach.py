"""A goal environment: a point on a line that is told where to go."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from tests.support.datasets import Tree

ENV_ID = "test/GoalReach-v0"
STEPS = 5

GoalObservation = dict[str, Any]


class GoalReachEnv(gymnasium.Env[GoalObservation, Any]):
    """The reward is minus the distance to the goal, the observation tells position and speed."""

    observation_space = spaces.Dict(
        {
            "achieved_goal": spaces.Box(-np.inf, np.inf, (1,)),
            "desired_goal": spaces.Box(-2.0, 2.0, (1,)),
            "observation": spaces.Box(-np.inf, np.inf, (2,)),
        }
    )
    action_space = spaces.Box(-0.5, 0.5, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[GoalObservation, dict[str, Any]]:
        super().reset(seed=seed)
        self._position, self._speed = 0.0, 0.0
        self._goal = self.np_random.uniform(-2, 2)
        return self._observe(), {}

    def step(self, action: Any) -> tuple[GoalObservation, float, bool, bool, dict[str, Any]]:
        self._speed = float(action[0])
        self._position += self._speed
        return self._observe(), -abs(self._goal - self._position), False, False, {}

    def _observe(self) -> GoalObservation:
        return {
            "achieved_goal": np.array([self._position], np.float32),
            "desired_goal": np.array([self._goal], np.float32),
            "observation": np.array([self._position, self._speed], np.float32),
        }


def register() -> None:
    """Makes `ENV_ID` known; harmless when called again."""
    if ENV_ID not in gymnasium.registry:
        gymnasium.register(ENV_ID, entry_point=GoalReachEnv, max_episode_steps=STEPS)  # type: ignore[arg-type]


def episodes(count: int) -> list[Tree]:
    """Episodes of random actions, as Minari keeps them."""
    recorded = []
    env = GoalReachEnv()
    rng = np.random.default_rng(0)
    for seed in range(count):
        observations, rewards = [env.reset(seed=seed)[0]], []
        actions = rng.uniform(-0.5, 0.5, (STEPS, 1)).astype(np.float32)
        for action in actions:
            observation, reward, *_ = env.step(action)
            observations.append(observation)
            rewards.append(reward)
        recorded.append(
            {
                "observations": {key: np.stack([o[key] for o in observations]) for key in observations[0]},
                "actions": actions,
                "rewards": np.array(rewards),
                "terminations": np.zeros(STEPS, np.bool_),
                "truncations": np.arange(STEPS) == STEPS - 1,
            }
        )
    return recorded
