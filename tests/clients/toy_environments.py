"""Small environments for the toy policy of the tests: observation in R^3, action in [-1, 1]^2, four steps."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

STEPS = 4
_UNBOUNDED = spaces.Box(-np.inf, np.inf, (3,), np.float64)


class ToyEnv(gymnasium.Env[Any, NDArray[np.float32]]):
    """The reward is the action's first number; the episode succeeds if `succeeds`, and does not say so if None."""

    def __init__(self, succeeds: bool | None = True, action_high: float = 1.0, observation_width: int = 3) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (observation_width,), np.float64)
        self.action_space = spaces.Box(-action_high, action_high, (2,), np.float32)
        self.succeeds = succeeds
        self.seeds: list[int | None] = []
        self.actions: list[NDArray[np.float32]] = []
        self.step_count = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.step_count = 0
        return self._observe(), {}

    def step(self, action: NDArray[np.float32]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.actions.append(action)
        self.step_count += 1
        over = self.step_count == STEPS
        info = {"is_success": self.succeeds} if over and self.succeeds is not None else {}
        return self._observe(), float(action[0]), over, False, info

    def _observe(self) -> Any:
        return self.np_random.uniform(-1, 1, self.observation_space.shape)


class ToyGoalEnv(ToyEnv):
    """Says its observation in two parts: width 1 and a goal of width 2."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Dict(
            achieved_goal=spaces.Box(-1, 1, (2,)),
            desired_goal=spaces.Box(-1, 1, (2,)),
            observation=spaces.Box(-1, 1, (1,)),
        )

    def _observe(self) -> Any:
        return {"achieved_goal": np.full(2, 9.0), "desired_goal": np.array([0.2, 0.3]), "observation": np.array([0.1])}


class ToyWalkEnv(ToyEnv):
    """Its episodes take 1 to 9 steps, and succeed where they take an even number of them."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        first = super().reset(seed=seed, options=options)
        self.length = int(self.np_random.integers(1, 10))
        return first

    def step(self, action: NDArray[np.float32]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, _, _, _ = super().step(action)
        over = self.step_count == self.length
        return observation, reward, over, False, {"is_success": self.length % 2 == 0} if over else {}


class ToyFilmEnv(ToyEnv):
    """Draws a line where it is: 24 × 32 pixels, 50 steps a second."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012  so does gymnasium

    def __init__(self, render_mode: str | None = None, breaks: bool = False) -> None:
        super().__init__()
        self.render_mode = render_mode
        self.breaks = breaks

    def render(self) -> Any:
        if self.breaks:
            raise RuntimeError("no display\nand a second line")
        frame = np.zeros((24, 32, 3), np.uint8)
        frame[:, 4 * self.step_count] = 255
        return frame


gymnasium.register("Toy-v0", entry_point="tests.clients.toy_environments:ToyEnv")
gymnasium.register("ToyWide-v0", entry_point="tests.clients.toy_environments:ToyEnv", kwargs={"observation_width": 4})
gymnasium.register("ToyWalk-v0", entry_point="tests.clients.toy_environments:ToyWalkEnv")
gymnasium.register("ToyFilm-v0", entry_point="tests.clients.toy_environments:ToyFilmEnv")
gymnasium.register("ToyNoFilm-v0", entry_point="tests.clients.toy_environments:ToyFilmEnv", kwargs={"breaks": True})
