"""Bandit-4: one state, four far-apart actions, one of them best.

A random mode scores 2.375, the best one 5, the mean of all four 0.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

CORNERS = np.array([[-0.8, 0.8], [-0.8, -0.8], [0.8, 0.8], [0.8, -0.8]], dtype=np.float32)
CORNER_REWARDS = np.array([3.0, 0.0, 1.5, 5.0], dtype=np.float32)
ACTION_STD = 0.05
REWARD_STD = 0.5
REWARD_WIDTH = 0.2


class Bandit4Env(gymnasium.Env[Array, Array]):
    """One step; reward Σ_k r_k exp(-|a - c_k|² / (2·0.2²)) over the four corners c_k = (±0.8, ±0.8)."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        squared_distance = np.square(CORNERS - action).sum(axis=1)
        reward = float(CORNER_REWARDS @ np.exp(-squared_distance / (2 * REWARD_WIDTH**2)))
        return np.zeros(1, np.float32), reward, True, False, {}


def bandit_demonstrations(
    *, rows: int = 10_000, seed: int = 0, weights: Sequence[float] = (0.25, 0.25, 0.25, 0.25)
) -> dict[str, NDArray[Any]]:
    """Draws a corner by `weights`, an action N(corner, 0.05²) and a reward N(r_k, 0.5²); keys of D4RL."""
    rng = np.random.default_rng(seed)
    corner = rng.choice(len(CORNERS), size=rows, p=np.asarray(weights))
    zeros = np.zeros((rows, 1), np.float32)
    actions = CORNERS[corner] + ACTION_STD * rng.standard_normal((rows, 2))
    return {
        "observations": zeros,
        "actions": np.clip(actions, -1.0, 1.0).astype(np.float32),
        "rewards": (CORNER_REWARDS[corner] + REWARD_STD * rng.standard_normal(rows)).astype(np.float32),
        "next_observations": zeros,
        "terminals": np.ones(rows, np.bool_),
        "timeouts": np.zeros(rows, np.bool_),
    }
