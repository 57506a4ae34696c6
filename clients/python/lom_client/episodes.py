"""Whole episodes of a gymnasium environment, acted by a served policy."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lom_client.client import PolicyClient
from lom_client.errors import ContractMismatch
from lom_client.spec import PolicySpec, Space

try:
    import gymnasium
    from gymnasium import spaces
except ImportError as error:
    raise ImportError("playing episodes needs gymnasium: pip install 'lom[client,envs]'") from error

# A goal environment's policy sees what is and what is wanted, in this order.
_GOAL_KEYS = ("observation", "desired_goal")


@dataclass(frozen=True, eq=False)
class EpisodeReport:
    """What `episodes` episodes of one bundle's policy were like.

    Attributes:
        returns: sum of rewards of each episode.
        lengths: steps of each episode.
        successes: whether each episode ended in success; None where the environment does not say.
        latencies_s: float64[steps], seconds from asking to holding the checked action, for each step.
        mode_counts: how often each mode was chosen; empty for a variant that chooses none.
        warning_counts: by score, on how many steps it was worth a warning.
        variant: the variant that ran.
        policy: the policy that ran.
        bundle_digest: the bundle that ran, the same for every step.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    successes: tuple[bool, ...] | None
    latencies_s: NDArray[np.float64]
    mode_counts: Mapping[int, int]
    warning_counts: Mapping[str, int]
    variant: str
    policy: str
    bundle_digest: str

    @property
    def success_rate(self) -> float | None:
        """Share of the episodes that ended in success; None where the environment does not say."""
        return None if self.successes is None else float(np.mean(self.successes))

    @property
    def warning_share(self) -> dict[str, float]:
        """By score, the share of the steps that it warned at."""
        return {name: count / len(self.latencies_s) for name, count in sorted(self.warning_counts.items())}

    @property
    def mode_share(self) -> dict[int, float]:
        """Share of the steps that chose each mode, in order of the modes."""
        total = sum(self.mode_counts.values())
        return {mode: count / total for mode, count in sorted(self.mode_counts.items())}


def play_episodes(
    env: gymnasium.Env[Any, Any],
    client: PolicyClient,
    *,
    episodes: int,
    seed: int = 0,
    variant: str | None = None,
    deadline_s: float = 1.0,
    on_episode: Callable[[int, float], None] | None = None,
) -> EpisodeReport:
    """Plays `episodes` episodes, one action query a step. A step without an answer ends the evaluation.

    Args:
        env: a Box action space, and a Box observation space or a goal environment's Dict.
        client: asks the policy.
        episodes: how many, 1 or more.
        seed: episode i resets with `seed + i`, so that each one can be played again alone.
        variant: as for `PolicyClient.act`.
        deadline_s: for each call, as for `PolicyClient.act`.
        on_episode: told the index and the return of each finished episode.

    Raises:
        ValueError: `episodes` is below 1, or `deadline_s` out of range.
        ContractMismatch: the environment's spaces are not the policy's, or the bundle changed while episodes were
            played (the report would belong to neither).
        PolicyError: a call failed.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be 1 or more, got {episodes}")
    spec = client.get_spec(deadline_s=deadline_s)
    require_matching_spaces(env, spec)

    returns: list[float] = []
    lengths: list[int] = []
    successes: list[bool] = []
    latencies_s: list[float] = []
    mode_counts: Counter[int] = Counter()
    warning_counts: Counter[str] = Counter()
    bundles: set[str] = set()
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        episode_return, length, over = 0.0, 0, False
        info: dict[str, Any] = {}
        while not over:
            asked_at = time.monotonic()
            answer = client.act(_flat(observation), deadline_s=deadline_s, variant=variant)
            latencies_s.append(time.monotonic() - asked_at)
            bundles.add(answer.bundle_digest)
            if len(bundles) > 1:
                raise ContractMismatch("BUNDLE_CHANGED", "the server changed the bundle while episodes were played")
            if answer.mode is not None:
                mode_counts[int(answer.mode)] += 1
            for name, score in answer.scores.items():
                warning_counts[name] += int(score.warns)
            observation, reward, terminated, truncated, info = env.step(answer.actions.astype(env.action_space.dtype))
            episode_return += float(reward)
            length += 1
            over = terminated or truncated
        returns.append(episode_return)
        lengths.append(length)
        success = info.get("is_success", info.get("success"))
        if success is not None:
            successes.append(bool(success))
        if on_episode is not None:
            on_episode(episode, episode_return)
    return EpisodeReport(
        returns=tuple(returns),
        lengths=tuple(lengths),
        # Said for some episodes only, it would be a rate over episodes of the environment's choice.
        successes=tuple(successes) if len(successes) == episodes else None,
        latencies_s=np.array(latencies_s),
        mode_counts=mode_counts,
        warning_counts=warning_counts,
        variant=spec.default_variant if variant is None else variant,
        policy=spec.policy,
        bundle_digest=bundles.pop(),
    )


def require_matching_spaces(env: gymnasium.Env[Any, Any], spec: PolicySpec) -> None:
    """Passes if the policy can act in this environment.

    Widths must be equal, and so must the bounds of the action: a policy scaled to another range would move the robot
    differently from what it learned. Bounds of the observation are not compared; many environments state none.

    Raises:
        ContractMismatch: SPACE_MISMATCH, with both sides.
    """
    width = _observation_width(env.observation_space)
    if width != spec.observation.width:
        raise _mismatch(f"observation: the policy expects width {spec.observation.width}, the environment has {width}")
    _require_matching_action(env.action_space, spec.action)


def _require_matching_action(space: spaces.Space[Any], expected: Space) -> None:
    if not isinstance(space, spaces.Box) or space.shape != (expected.width,):
        raise _mismatch(f"action: the policy gives Box({expected.width},), the environment takes {space}")
    for name, ours, theirs in (("low", expected.low, space.low), ("high", expected.high, space.high)):
        if not np.allclose(ours, theirs, rtol=1e-5, atol=1e-6):
            raise _mismatch(f"action: the policy's {name} is {ours.tolist()}, the environment's is {theirs.tolist()}")


def _observation_width(space: spaces.Space[Any]) -> int:
    parts = [space]
    if isinstance(space, spaces.Dict):
        missing = [key for key in _GOAL_KEYS if key not in space.spaces]
        if missing:
            raise _mismatch(f"observation: a Dict needs {' and '.join(_GOAL_KEYS)}, the environment has {list(space)}")
        parts = [space.spaces[key] for key in _GOAL_KEYS]
    if not all(isinstance(part, spaces.Box) and len(part.shape) == 1 for part in parts):
        raise _mismatch(f"observation: expected one vector, the environment has {space}")
    return sum(part.shape[0] for part in parts if part.shape is not None)


def _flat(observation: Any) -> NDArray[Any]:
    if isinstance(observation, Mapping):
        return np.concatenate([observation[key] for key in _GOAL_KEYS])
    return np.asarray(observation)


def _mismatch(detail: str) -> ContractMismatch:
    return ContractMismatch("SPACE_MISMATCH", detail)
