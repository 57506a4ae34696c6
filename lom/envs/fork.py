"""The fork: a point must pass an obstacle on one of two sides; the mean of both ways hits it.

Half of the demonstrators go above the obstacle, half below. All of them first walk straight towards it, so that
one state has two good actions and their average is the worst action there is. The upper route costs a toll: the
lower one is the better mode.
"""

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

START = np.array([-1.0, 0.0], dtype=np.float32)
GOAL = np.array([1.0, 0.0], dtype=np.float32)
START_STD = 0.03
STEP_LENGTH = 0.15
OBSTACLE_RADIUS = 0.35
GOAL_RADIUS = 0.2
ARENA = 1.5
MAX_STEPS = 50
STEP_COST = 0.1
TOLL = 0.2
TOLL_ABOVE_Y = 0.2
END_REWARD = 5.0


class ForkEnv(gymnasium.Env[Array, Array]):
    """Observation (x, y), action a velocity in [-1, 1]²; see the constants of this module for the geometry.

    Reward: -0.1 a step, another -0.2 (`toll`) where y > 0.2; -5 and the end on hitting the obstacle, +5 and the end
    within 0.2 of the goal. `info` of the last step tells `is_success` and, where the route shows, `better_route`.
    """

    def __init__(self, *, toll: float = TOLL) -> None:
        self.observation_space = gymnasium.spaces.Box(-ARENA, ARENA, (2,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._toll = toll
        self._position = START.copy()
        self._widest_y = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        offset = START_STD * self.np_random.standard_normal(2)
        self._position = (START + offset).astype(np.float32)
        self._widest_y = 0.0
        return self._position.copy(), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        before = self._position
        move = STEP_LENGTH * np.clip(np.asarray(action, dtype=np.float32), -1.0, 1.0)
        after = np.clip(before + move, -ARENA, ARENA).astype(np.float32)
        self._position = after
        if abs(after[1]) > abs(self._widest_y):
            self._widest_y = float(after[1])
        hit = min(np.linalg.norm(after), np.linalg.norm((before + after) / 2)) < OBSTACLE_RADIUS
        arrived = not hit and bool(np.linalg.norm(after - GOAL) < GOAL_RADIUS)
        reward = -STEP_COST - (self._toll if after[1] > TOLL_ABOVE_Y else 0.0)
        reward += END_REWARD * (arrived - int(hit))
        info = {"is_success": arrived, "better_route": self._widest_y < 0.0}
        return after.copy(), float(reward), bool(hit or arrived), False, info


def demonstrator_action(position: Array, *, below: bool, rng: np.random.Generator, noise_std: float = 0.2) -> Array:
    """The scripted demonstrator: straight on, then around the obstacle on its side, then to the goal.

    Shapes: position float32[2] -> float32[2] in [-1, 1].
    """
    x = position[0]
    if x < -0.6:
        target = np.array([x + 1.0, 0.0])
    elif x < -0.1:
        target = np.array([0.0, -0.7 if below else 0.7])
    else:
        target = GOAL.astype(np.float64)
    direction = target - position
    direction = direction / max(float(np.linalg.norm(direction)), STEP_LENGTH)
    return np.clip(direction + noise_std * rng.standard_normal(2), -1.0, 1.0).astype(np.float32)


def fork_demonstrations(
    *, episodes: int = 400, seed: int = 0, below_probability: float = 0.5, toll: float = TOLL
) -> dict[str, NDArray[Any]]:
    """Rolls the demonstrators out; each episode draws its side.

    Returns:
        Arrays with the keys of D4RL, and `next_actions`: the demonstrator's action at the next state, which also
        exists where the time limit cut an episode.
    """
    rng = np.random.default_rng(seed)
    env = ForkEnv(toll=toll)
    rows: dict[str, list[Any]] = {
        key: []
        for key in (
            "observations",
            "actions",
            "rewards",
            "next_observations",
            "next_actions",
            "terminals",
            "timeouts",
        )
    }
    for episode in range(episodes):
        below = bool(rng.random() < below_probability)
        observation, _ = env.reset(seed=seed * 1_000_003 + episode)
        action = demonstrator_action(observation, below=below, rng=rng)
        for step in range(1, MAX_STEPS + 1):
            next_observation, reward, terminal, _, _ = env.step(action)
            next_action = demonstrator_action(next_observation, below=below, rng=rng)
            timeout = step == MAX_STEPS and not terminal
            for key, value in zip(
                rows, (observation, action, reward, next_observation, next_action, terminal, timeout), strict=True
            ):
                rows[key].append(value)
            if terminal or timeout:
                break
            observation, action = next_observation, next_action
    booleans = {"terminals", "timeouts"}
    return {key: np.asarray(column, dtype=np.bool_ if key in booleans else np.float32) for key, column in rows.items()}
