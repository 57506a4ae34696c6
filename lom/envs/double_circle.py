"""The double circle: points on two rings; the state is x, the action y, so that a state has up to four branches.

The paper's motivating example. Half of the branches are good; their mean is good or bad by chance.
"""

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

INNER_SHARE = 0.25
RADII = (0.3, 1.0)
WIDTH = 0.2
UNIT = 1.2
"""Lengths are divided by this, so that every action lies in [-1, 1]."""


def _points(rows: int, rng: np.random.Generator) -> NDArray[np.float64]:
    radius = np.where(rng.random(rows) < INNER_SHARE, *RADII) + rng.uniform(-WIDTH / 2, WIDTH / 2, rows)
    angle = rng.uniform(0, 2 * np.pi, rows)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * (radius / UNIT)[:, None]


class DoubleCircleEnv(gymnasium.Env[Array, Array]):
    """One step; the observation is the x of a point of the data, the reward 1 where x and the action y agree in sign.

    A random branch scores 0.5, the better ones 1.
    """

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._x = np.zeros(1, np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        self._x = _points(1, self.np_random)[0, :1].astype(np.float32)
        return self._x.copy(), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        return self._x.copy(), float(self._x[0] * action[0] > 0), True, False, {}


def double_circle_demonstrations(*, rows: int = 5_000, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Points of radius 0.3 (a quarter of them) and 1, each ring 0.2 wide; keys of D4RL."""
    points = _points(rows, np.random.default_rng(seed)).astype(np.float32)
    return {
        "observations": points[:, :1],
        "actions": points[:, 1:],
        "rewards": (points[:, 0] * points[:, 1] > 0).astype(np.float32),
        "next_observations": points[:, :1],
        "terminals": np.ones(rows, np.bool_),
        "timeouts": np.zeros(rows, np.bool_),
    }
