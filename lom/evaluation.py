"""Plays a policy in a gymnasium environment, several episodes at a time, and says which variant to act by."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, NamedTuple, cast

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, flatdim
from numpy.typing import NDArray
from rich.console import Console

from lom.observation_parts import Parts, choose_keys, flatten_observation, leaves
from lom.policy import LomPolicy

Array = NDArray[np.float32]
Env = gymnasium.Env[Any, Any]

EVALUATION_SEED = 100_000
"""Seed of the first evaluation episode; far from the seeds that demonstrations and training use."""

_PARALLEL_EPISODES = 20
_RESAMPLES = 2_000


class UnsuitableEnvError(ValueError):
    """An environment that does not exist, or whose spaces a LOM policy cannot act in."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Returns of whole episodes.

    Attributes:
        returns: float64[E], in the order of the episodes' seeds.
        success_rate: share of episodes whose last `info` said `is_success`; None where the environment never says.
    """

    returns: NDArray[np.float64]
    success_rate: float | None

    def to_json(self) -> dict[str, Any]:
        """Mean and its 95 % interval, standard deviation (population) and success rate."""
        return {
            "return_mean": float(self.returns.mean()),
            "return_interval": bootstrap_interval(self.returns),
            "return_std": float(self.returns.std()),
            "success_rate": self.success_rate,
        }


def bootstrap_interval(results: NDArray[np.float64], *, level: float = 0.95) -> tuple[float, float]:
    """Bounds of the mean: percentiles over 2,000 resamples, the same for the same results.

    Too narrow below about ten results: what was never drawn cannot be resampled.

    Args:
        results: float64[E], one of each episode; or float64[K, E], by each of K estimators, and both are resampled.
    """
    rng, table = np.random.default_rng(0), np.atleast_2d(results)
    estimators, episodes = table.shape
    means = [
        # Averaged over the drawn estimators first: K + E additions of rows instead of K x E.
        table[rng.integers(estimators, size=estimators)].mean(axis=0)[rng.integers(episodes, size=episodes)].mean()
        for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """Which variant to act by.

    Attributes:
        variant: `actor` or `greedy_mode`.
        reason: a sentence with the numbers.
        warning: another where behaviour cloning is better than `variant`; else None.
    """

    variant: str
    reason: str
    warning: str | None

    def show(self, console: Console) -> None:
        """One line, and another where there is a warning."""
        console.print(f"recommended: {self.variant} ({self.reason})", markup=False, soft_wrap=True)
        if self.warning:
            console.print(f"warning: {self.warning}", style="bold yellow", markup=False, soft_wrap=True)


def recommend(results: Mapping[str, NDArray[np.float64]]) -> Recommendation:
    """The actor where it is better than the greedy mode beyond chance, else the greedy mode.

    Better beyond chance: the 95 % interval of the difference, episode by episode, lies above 0. In doubt the greedy
    mode, which needs no actor to have converged.

    Args:
        results: of `greedy_mode` and `actor`, and of `bc` where it is to be warned of; on the same episodes (from the
            same seeds): float64[E], or float64[K, E] by K estimators.
    """

    def difference(variant: str, other: str) -> tuple[str, bool]:
        gain = results[variant] - results[other]
        low, high = bootstrap_interval(gain)
        return f"{variant} - {other}: {gain.mean():.4g}, 95 % interval {low:.4g} to {high:.4g}", low > 0

    compared, actor_is_better = difference("actor", "greedy_mode")
    cloned = [difference("bc", variant) for variant in ("actor", "greedy_mode") if "bc" in results]
    warning = None
    if cloned and all(is_better for _, is_better in cloned):
        margins = "; ".join(margin for margin, _ in cloned)
        warning = (
            f"behaviour cloning is better than both ({margins}): there was little to select in this data, or training "
            "was too short to value it; lom-export --with-bc exports it too"
        )
    return Recommendation(variant="actor" if actor_is_better else "greedy_mode", reason=compared, warning=warning)


class EnvSpaces(NamedTuple):
    """Bounds in environment units: observations float64[O] (±inf where unbounded), actions float32[A].

    `observation_parts` says how dict observations become vectors; empty where they are vectors.
    """

    observation_low: NDArray[np.float64]
    observation_high: NDArray[np.float64]
    action_low: Array
    action_high: Array
    observation_parts: Parts = ()


def make_env(env_id: str, observation_keys: Sequence[str] = ()) -> Env:
    """Makes an environment by its gymnasium id; dict observations become vectors.

    Finds ids of every installed package with a `gymnasium.envs` entry point, and gymnasium's `module:id` form.

    Args:
        observation_keys: parts of dict observations, in order; empty takes the order of `lom.observation_parts`.

    Raises:
        UnsuitableEnvError: there is no such environment, or it cannot be made here.
    """
    for plugin in entry_points(group="gymnasium.envs"):
        plugin.load()()
    try:
        with warnings.catch_warnings():
            # "-v4 is out of date": measured returns of MuJoCo tasks belong to exactly the version that was asked for.
            warnings.simplefilter("ignore", DeprecationWarning)
            env = gymnasium.make(env_id)
    except (gymnasium.error.Error, ImportError, ValueError) as error:
        raise UnsuitableEnvError(f"environment {env_id!r}: {error}") from error
    if not isinstance(env.observation_space, Dict):
        return env
    try:
        return _VectorObservations(env, observation_keys)
    except ValueError as error:
        env.close()
        raise UnsuitableEnvError(f"environment {env_id!r}: observation space: {error}") from error


class _VectorObservations(gymnasium.ObservationWrapper[Array, Any, Any]):
    """Dict observations as vectors; `parts` says in which order."""

    def __init__(self, env: Env, observation_keys: Sequence[str]) -> None:
        super().__init__(env)
        spaces = leaves(cast(Dict, env.observation_space))
        self._keys = choose_keys(list(spaces), observation_keys)
        for key in self._keys:
            if not isinstance(spaces[key], Box):
                raise ValueError(f"{key}: expected a Box, got {spaces[key]}")
        self.parts: Parts = tuple((key, flatdim(spaces[key])) for key in self._keys)
        low, high = (np.concatenate([getattr(spaces[key], s).ravel() for key in self._keys]) for s in ("low", "high"))
        self.observation_space = Box(low.astype(np.float32), high.astype(np.float32))

    def observation(self, observation: Mapping[str, Any]) -> Array:
        return flatten_observation(observation, self._keys)


def env_spaces(env_id: str, observation_keys: Sequence[str] = ()) -> EnvSpaces:
    """The bounds of an environment with Box observations, or a Dict of them, and bounded Box actions.

    Raises:
        UnsuitableEnvError: it names what was expected of the environment and what it has.
    """
    env = make_env(env_id, observation_keys)
    observation, action = env.observation_space, env.action_space
    parts = env.parts if isinstance(env, _VectorObservations) else ()
    env.close()
    for name, space in (("observation", observation), ("action", action)):
        if not isinstance(space, Box) or len(space.shape) != 1:
            raise UnsuitableEnvError(f"environment {env_id!r}: {name} space: expected a flat Box, got {space}")
    assert isinstance(observation, Box)
    assert isinstance(action, Box)
    if not np.isfinite([action.low, action.high]).all() or (action.low >= action.high).any():
        raise UnsuitableEnvError(f"environment {env_id!r}: action space: expected finite bounds, got {action}")
    low, high = action.low.astype(np.float32), action.high.astype(np.float32)
    return EnvSpaces(observation.low.astype(np.float64), observation.high.astype(np.float64), low, high, parts)


def evaluate(
    act: Callable[[Array], Array],
    env_id: str,
    *,
    episodes: int,
    seed: int,
    discount: float = 1.0,
    observation_keys: Sequence[str] = (),
    on_episode: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Plays `episodes` episodes; episode k is reset with seed + k, whatever runs beside it.

    Args:
        act: observations float32[B, O] -> actions float32[B, A].
        discount: γ of the returns; rewards count in full if not given.
        observation_keys: as for `make_env`.
    """
    waiting = list(reversed(range(episodes)))
    envs = [make_env(env_id, observation_keys) for _ in range(min(episodes, _PARALLEL_EPISODES))]
    returns, weights = np.zeros(episodes), np.ones(episodes)
    successes: list[bool] = []
    running: dict[int, tuple[Env, Array]] = {}
    idle = list(envs)
    while running or waiting:
        while idle and waiting:
            episode, env = waiting.pop(), idle.pop()
            running[episode] = (env, env.reset(seed=seed + episode)[0])
        actions = act(np.stack([observation for _, observation in running.values()]).astype(np.float32))
        for (episode, (env, _)), action in zip(list(running.items()), actions, strict=True):
            observation, reward, terminated, truncated, info = env.step(action)
            returns[episode] += weights[episode] * float(reward)
            weights[episode] *= discount
            running[episode] = (env, observation)
            if terminated or truncated:
                if "is_success" in info:
                    successes.append(bool(info["is_success"]))
                idle.append(running.pop(episode)[0])
                on_episode()
    for env in envs:
        env.close()
    return Evaluation(returns=returns, success_rate=float(np.mean(successes)) if successes else None)


def policy_act(policy: LomPolicy, variant: str) -> Callable[[Array], Array]:
    """The policy's variant as a function of arrays: observations float32[B, O] -> actions float32[B, A]."""
    device = policy.action_scaler.low.device

    @torch.no_grad()
    def act(observations: Array) -> Array:
        actions: Array = policy(torch.from_numpy(observations).to(device), variant)["action"].cpu().numpy()
        return actions

    return act
