"""Fetch-4: a robot arm with four targets around the start, each of another worth, and demonstrators for all of them.

From the start four far-apart actions are right, and their mean reaches nothing. Needs `gymnasium_robotics`.
"""

from collections.abc import Callable
from typing import Any, Literal

import gymnasium
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Kind = Literal["Reach", "Push", "PickAndPlace"]

TARGET_REWARDS = np.array([1.0, 0.75, 0.5, 0.25])
TARGET_OFFSETS = np.array([[0.1, -0.1, 0.0], [0.1, 0.1, 0.0], [-0.1, 0.1, 0.0], [-0.1, -0.1, 0.0]])
TARGET_RADIUS = 0.05
MAX_STEPS = 50

_LIFT = np.array([0.0, 0.0, 0.1])
_CLEARANCE = np.array([0.0, 0.0, 0.06])
_GAIN = 10.0
_OPEN, _CLOSED = 1.0, -1.0

# Observations of Fetch: the gripper's position, then the object's, where there is one; metres.
_GRIPPER, _OBJECT, _FINGERS = slice(0, 3), slice(3, 6), slice(9, 11)


class Fetch4Env(gymnasium.Env[Array, Array]):
    """One of three tasks of Fetch: bring the gripper (Reach) or the object (Push, PickAndPlace) to a target.

    The targets lie 0.14 m around where that began, 0.1 m above it for PickAndPlace. Observation: Fetch's own, then that
    beginning, float32[13 or 28], metres. Action: the gripper's move and its fingers, [-1, 1]^4. Reward: 1, 0.75, 0.5 or
    0.25 in every step within 5 cm of that target, else 0. `info` tells `is_success`: at the best target now.
    """

    def __init__(self, kind: Kind = "Reach") -> None:
        import gymnasium_robotics  # loads slowly

        gymnasium.register_envs(gymnasium_robotics)
        self._fetch: gymnasium.Env[Any, Any] = gymnasium.make(f"Fetch{kind}-v4").unwrapped
        self._moved = _GRIPPER if kind == "Reach" else _OBJECT
        self._lift = _LIFT if kind == "PickAndPlace" else 0.0 * _LIFT
        self._start = np.zeros(3)
        size = self._fetch.observation_space["observation"].shape[0] + 3  # type: ignore[index]
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)

    @property
    def targets(self) -> NDArray[np.float64]:
        """float64[4, 3], metres; the best one first."""
        return np.asarray(self._start + self._lift + TARGET_OFFSETS)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        observation = self._fetch.reset(seed=int(self.np_random.integers(2**31)))[0]["observation"]
        self._start = observation[self._moved].copy()
        return self._with_start(observation), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        observation = self._fetch.step(np.clip(action, -1.0, 1.0))[0]["observation"]
        at = np.linalg.norm(self.targets - observation[self._moved], axis=1) < TARGET_RADIUS
        reward = float(TARGET_REWARDS @ at)
        return self._with_start(observation), reward, False, False, {"is_success": bool(at[0])}

    def close(self) -> None:
        self._fetch.close()

    def _with_start(self, observation: NDArray[np.float64]) -> Array:
        return np.concatenate([observation, self._start]).astype(np.float32)


def reach_action(observation: Array, target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Straight to the target: float[O], float64[3] -> float64[4]."""
    return np.array([*(_GAIN * (target - observation[_GRIPPER])), 0.0])


def push_action(observation: Array, target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the object to behind it, down, and towards the target: float[O], float64[3] -> float64[4]."""
    gripper, pushed = observation[_GRIPPER].astype(np.float64), observation[_OBJECT].astype(np.float64)
    way = target[:2] - pushed[:2]
    distance = float(np.linalg.norm(way))
    if distance < 0.03:
        return np.zeros(4)
    forward = way / distance
    offset = gripper[:2] - pushed[:2]
    sideways = offset - (offset @ forward) * forward
    behind = pushed[:2] - 0.075 * forward
    down, above = 0.425, 0.5
    if gripper[2] < 0.45 and offset @ forward < -0.03 and np.linalg.norm(sideways) < 0.015:
        move = 0.6 * (np.array([*(target[:2] - 0.048 * forward), down]) - gripper)
        move[:2] -= 0.5 * sideways
    elif gripper[2] < 0.45:
        move = np.array([0.0, 0.0, above - gripper[2]])
    elif np.linalg.norm(gripper[:2] - behind) < 0.02:
        move = np.array([*behind, down]) - gripper
    else:
        move = np.array([*behind, above]) - gripper
    return np.array([*(_GAIN * move), 0.0])


def pick_action(observation: Array, target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the object, down, close, and to the target: float[O], float64[3] -> float64[4]."""
    gripper, held = observation[_GRIPPER].astype(np.float64), observation[_OBJECT].astype(np.float64)
    offset = held - gripper
    if np.linalg.norm(offset[:2]) >= 0.012:
        return np.array([*(_GAIN * (offset + _CLEARANCE)), _OPEN])
    if abs(offset[2]) >= 0.012:
        return np.array([*(_GAIN * offset), _OPEN])
    if observation[_FINGERS].sum() > 0.055:
        return np.array([0.0, 0.0, 0.0, _CLOSED])
    return np.array([*(_GAIN * (target - gripper)), _CLOSED])


DEMONSTRATORS: dict[Kind, Callable[[Array, NDArray[np.float64]], NDArray[np.float64]]] = {
    "Reach": reach_action,
    "Push": push_action,
    "PickAndPlace": pick_action,
}


def fetch4_demonstrations(
    kind: Kind, *, episodes: int = 400, seed: int = 0, noise_std: float = 0.15
) -> dict[str, NDArray[Any]]:
    """Rolls the demonstrator out; each episode draws its target, all equally often.

    Returns:
        Arrays with the keys of D4RL, and `next_actions`: what the demonstrator would have done at the next state, which
        also exists at the time limit.
    """
    rng = np.random.default_rng(seed)
    env = Fetch4Env(kind)
    rows: dict[str, list[Any]] = {
        key: [] for key in ("observations", "actions", "rewards", "next_observations", "next_actions")
    }

    def act(observation: Array, target: NDArray[np.float64]) -> Array:
        noisy = DEMONSTRATORS[kind](observation, target) + noise_std * rng.standard_normal(4)
        return np.clip(noisy, -1.0, 1.0).astype(np.float32)

    for episode in range(episodes):
        observation, _ = env.reset(seed=seed * 1_000_003 + episode)
        target = env.targets[rng.integers(len(TARGET_REWARDS))]
        action = act(observation, target)
        for _ in range(MAX_STEPS):
            next_observation, reward, _, _, _ = env.step(action)
            next_action = act(next_observation, target)
            row = (observation, action, reward, next_observation, next_action)
            for column, value in zip(rows.values(), row, strict=True):
                column.append(value)
            observation, action = next_observation, next_action
    env.close()
    length = episodes * MAX_STEPS
    return {key: np.asarray(column, np.float32) for key, column in rows.items()} | {
        "terminals": np.zeros(length, np.bool_),
        "timeouts": np.arange(length) % MAX_STEPS == MAX_STEPS - 1,
    }
