"""Whole episodes of a gymnasium environment, acted by a served policy."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lom_client.client import PolicyClient
from lom_client.control_loop import ControlLoop
from lom_client.errors import ContractMismatch
from lom_client.flight_recorder import FlightRecorder
from lom_client.levels import Flag, Source
from lom_client.loop_config import LoopConfig
from lom_client.observations import GOAL_KEYS, goal_as_vector
from lom_client.spec import PolicySpec, Space

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
except ImportError as error:
    raise ImportError("playing episodes needs gymnasium: pip install 'lom[client,envs]'") from error

AnyEnv: TypeAlias = "gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any]"

ANY_SCORE = "any score"
"""What warnings are counted under where the policy acts through a control loop, which does not name the score."""


@dataclass(frozen=True, eq=False)
class EpisodeReport:
    """What the episodes of one bundle's policy were like.

    Attributes:
        returns: sum of rewards of each episode, in the order of the episodes.
        lengths: steps of each episode.
        successes: whether each episode ended in success; None where the environment does not say.
        latencies_s: float64[calls], seconds from asking to holding the checked action: one call answers one step of
            every environment that plays.
        sources: steps by where their action came from; all `FRESH` unless a control loop was in between.
        mode_counts: how often each mode was chosen; empty for a variant that chooses none.
        first_episode_modes: the mode of each step of the first episode; -1 where no mode acted.
        warning_counts: by score, on how many steps it was worth a warning.
        skipped_periods: periods of a real-time run that were lost because a step took longer than one.
        elapsed_s: seconds that all of it took.
        variant: the variant that ran.
        policy: the policy that ran.
        bundle_digest: the bundle that ran, the same for every step.
    """

    returns: tuple[float, ...]
    lengths: tuple[int, ...]
    successes: tuple[bool, ...] | None
    latencies_s: NDArray[np.float64]
    sources: Mapping[Source, int]
    mode_counts: Mapping[int, int]
    first_episode_modes: tuple[int, ...]
    warning_counts: Mapping[str, int]
    skipped_periods: int
    elapsed_s: float
    variant: str
    policy: str
    bundle_digest: str

    @property
    def steps(self) -> int:
        """Steps of all episodes."""
        return sum(self.lengths)

    @property
    def fresh_share(self) -> float:
        """Share of the steps that were acted by the policy's answer to their own observation."""
        return self.sources.get(Source.FRESH, 0) / self.steps

    @property
    def success_rate(self) -> float | None:
        """Share of the episodes that ended in success; None where the environment does not say."""
        return None if self.successes is None else float(np.mean(self.successes))

    @property
    def warning_share(self) -> dict[str, float]:
        """By score, the share of the steps that it warned at."""
        return {name: count / self.steps for name, count in sorted(self.warning_counts.items())}

    @property
    def mode_share(self) -> dict[int, float]:
        """Share of the steps that chose each mode, in order of the modes."""
        total = sum(self.mode_counts.values())
        return {mode: count / total for mode, count in sorted(self.mode_counts.items())}


def play_episodes(
    env: AnyEnv,
    client: PolicyClient,
    *,
    episodes: int,
    seed: int = 0,
    variant: str | None = None,
    deadline_s: float = 1.0,
    on_episode: Callable[[int, float], None] | None = None,
    recorder: FlightRecorder | None = None,
) -> EpisodeReport:
    """Plays `episodes` episodes, one action query a step. A step without an answer ends the evaluation.

    Of N environments, number k plays the episodes k, k + N, k + 2N, ...: which ones count is settled before the first
    step, so that short episodes are not preferred. Each step asks once, for all environments that still play.

    Args:
        env: one environment or a vector of them, in any autoreset mode, with a Box action space, and a Box observation
            space or a goal environment's Dict.
        client: asks the policy.
        episodes: how many, 1 or more.
        seed: episode i begins with a reset to `seed + i`, so that each one can be played again alone. A vector
            environment that resets by itself (`NEXT_STEP`, `SAME_STEP`) lets nobody seed but its first resets: there it
            holds for the first N episodes, and the others follow from them.
        variant: as for `PolicyClient.act`.
        deadline_s: for each call, as for `PolicyClient.act`.
        on_episode: told the index and the return of each finished episode.
        recorder: records every step; the caller's, and not closed here.

    Raises:
        ValueError: `episodes` is below 1, `deadline_s` out of range, or a vector environment does not state its
            autoreset mode.
        ContractMismatch: the environment's spaces are not the policy's, or the bundle changed while episodes were
            played (the report would belong to neither).
        PolicyError: a call failed.
    """
    spec = client.get_spec(deadline_s=deadline_s)
    tally = _Tally(spec, variant, episodes, on_episode)
    require_matching_spaces(env, spec)
    envs: Any = env  # gymnasium's types know no seed for each environment
    if not isinstance(env, VectorEnv):
        envs = SyncVectorEnv([lambda: env], autoreset_mode=AutoresetMode.DISABLED)
    autoreset = _autoreset_mode(envs)
    resting = _resting_actions(envs)

    episode_of = np.arange(envs.num_envs)
    observations, _ = envs.reset(seed=seed)  # number k by seed + k
    over = np.zeros(envs.num_envs, dtype=np.bool_)
    while (episode_of < episodes).any():
        acting = episode_of < episodes
        if autoreset is AutoresetMode.DISABLED and over.any():
            observations, _ = envs.reset(seed=(seed + episode_of).tolist(), options={"reset_mask": over})
        elif autoreset is AutoresetMode.NEXT_STEP:
            acting &= ~over  # the coming step is their reset, whatever the action
        rows = np.flatnonzero(acting)
        actions = resting.copy()
        modes = np.full(envs.num_envs, -1)
        if len(rows):
            asked_at = time.monotonic()
            asked = goal_as_vector(observations)[rows]
            answer = client.act(asked, deadline_s=deadline_s, variant=variant)
            tally.called(time.monotonic() - asked_at, answer.bundle_digest)
            actions[rows] = answer.actions
            if answer.mode is not None:
                modes[rows] = answer.mode
            for name, score in answer.scores.items():
                tally.warned(name, int(score.warns.sum()))
        observations, rewards, terminated, truncated, infos = envs.step(actions)
        over = terminated | truncated
        if recorder is not None and len(rows):
            recorder.steps(
                spec,
                asked,
                answer,
                actions=actions[rows],
                rewards=rewards[rows],
                terminated=terminated[rows],
                truncated=truncated[rows],
                next_observations=_observed_after(observations, infos, over, autoreset)[rows],
                episodes=episode_of[rows].tolist(),
            )
        for row in rows:
            tally.stepped(int(episode_of[row]), float(rewards[row]), int(modes[row]), Source.FRESH)
            if over[row]:
                final = infos["final_info"] if autoreset is AutoresetMode.SAME_STEP else infos
                tally.ended(int(episode_of[row]), _success(final, int(row)))
                episode_of[row] += envs.num_envs
    return tally.report()


def play_episodes_in_real_time(
    env: "gymnasium.Env[Any, Any]",
    client: PolicyClient,
    *,
    episodes: int,
    rate_hz: float,
    kinds: str | Sequence[str] = "torque",
    seed: int = 0,
    variant: str | None = None,
    deadline_s: float = 1.0,
    on_episode: Callable[[int, float], None] | None = None,
    recorder: FlightRecorder | None = None,
) -> EpisodeReport:
    """Plays `episodes` episodes as a robot would live them: `rate_hz` steps a second through a `ControlLoop`.

    An answer that does not come in time is bridged as the loop's levels say. Each episode has a loop of its own, as if
    the robot were started anew: one that ended in SAFE_STOP does not spoil the next.

    Args:
        env: one environment, as for `play_episodes`.
        client: asks the policy.
        episodes: how many, 1 or more.
        rate_hz: steps a second.
        kinds: as for `LoopConfig`: how an action is held.
        seed: as for `play_episodes`.
        variant: as for `PolicyClient.act`.
        deadline_s: for the contract, as for `PolicyClient.get_spec`; an action has 80 % of the period.
        on_episode: as for `play_episodes`.
        recorder: as for `play_episodes`.

    Raises:
        ValueError: `episodes` is below 1, or `rate_hz` or `kinds` not what `LoopConfig` takes.
        ContractMismatch: as for `play_episodes`.
        PolicyError: the server did not give its contract.
    """
    spec = client.get_spec(deadline_s=deadline_s)
    tally = _Tally(spec, variant, episodes, on_episode)
    require_matching_spaces(env, spec)
    config = LoopConfig(
        period_s=1 / rate_hz,
        kinds=kinds,
        safe_action=np.clip(0.0, spec.action.low, spec.action.high),
        variant=variant,
    )
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        with ControlLoop(client, config, recorder=recorder) as loop:
            for tick in loop.ticks():
                tally.skipped_periods += tick.skipped
                asked_at = time.monotonic()
                action = loop.step(goal_as_vector(observation))
                tally.called(time.monotonic() - asked_at, action.bundle_digest)
                if action.flags & Flag.OUT_OF_DISTRIBUTION:
                    tally.warned(ANY_SCORE, 1)
                observation, reward, terminated, truncated, info = env.step(
                    action.values.astype(env.action_space.dtype)
                )
                tally.stepped(episode, float(reward), -1 if action.mode is None else action.mode, action.source)
                over = bool(terminated or truncated)
                if recorder is not None:
                    recorder.outcome(
                        reward=float(reward),
                        terminated=bool(terminated),
                        truncated=bool(truncated),
                        final_observation=goal_as_vector(observation) if over else None,
                    )
                if over:
                    tally.ended(episode, _said(info.get("is_success", info.get("success"))))
                    break
    return tally.report()


def _observed_after(
    observations: Any, infos: dict[str, Any], over: NDArray[np.bool_], autoreset: AutoresetMode
) -> NDArray[Any]:
    """What the steps led to; an environment that resets at once says the end of its episode elsewhere."""
    after = np.array(goal_as_vector(observations))
    if autoreset is AutoresetMode.SAME_STEP:
        for row in np.flatnonzero(over):
            after[row] = goal_as_vector(infos["final_obs"][row])
    return after


class _Tally:
    """What is counted while episodes are played."""

    def __init__(
        self, spec: PolicySpec, variant: str | None, episodes: int, on_episode: Callable[[int, float], None] | None
    ) -> None:
        if episodes < 1:
            raise ValueError(f"episodes must be 1 or more, got {episodes}")
        self.skipped_periods = 0
        self._spec = spec
        self._variant = spec.default_variant if variant is None else variant
        self._on_episode = on_episode
        self._began_at = time.monotonic()
        self._returns = [0.0] * episodes
        self._lengths = [0] * episodes
        self._successes: dict[int, bool] = {}
        self._latencies_s: list[float] = []
        self._sources: Counter[Source] = Counter()
        self._mode_counts: Counter[int] = Counter()
        self._first_episode_modes: list[int] = []
        self._warning_counts: Counter[str] = Counter()
        self._bundle_digest = ""

    def called(self, latency_s: float, bundle_digest: str) -> None:
        """`bundle_digest` is empty where nobody answered."""
        self._latencies_s.append(latency_s)
        if self._bundle_digest and bundle_digest not in ("", self._bundle_digest):
            raise ContractMismatch("BUNDLE_CHANGED", "the server changed the bundle while episodes were played")
        self._bundle_digest = bundle_digest or self._bundle_digest

    def warned(self, score: str, rows: int) -> None:
        self._warning_counts[score] += rows

    def stepped(self, episode: int, reward: float, mode: int, source: Source) -> None:
        self._returns[episode] += reward
        self._lengths[episode] += 1
        self._sources[source] += 1
        if mode >= 0:
            self._mode_counts[mode] += 1
        if episode == 0:
            self._first_episode_modes.append(mode)

    def ended(self, episode: int, success: bool | None) -> None:
        if success is not None:
            self._successes[episode] = success
        if self._on_episode is not None:
            self._on_episode(episode, self._returns[episode])

    def report(self) -> EpisodeReport:
        # Said for some episodes only, it would be a rate over episodes of the environment's choice.
        says_success = len(self._successes) == len(self._returns)
        return EpisodeReport(
            returns=tuple(self._returns),
            lengths=tuple(self._lengths),
            successes=tuple(success for _, success in sorted(self._successes.items())) if says_success else None,
            latencies_s=np.array(self._latencies_s),
            sources=self._sources,
            mode_counts=self._mode_counts,
            first_episode_modes=tuple(self._first_episode_modes),
            warning_counts=self._warning_counts,
            skipped_periods=self.skipped_periods,
            elapsed_s=time.monotonic() - self._began_at,
            variant=self._variant,
            policy=self._spec.policy,
            bundle_digest=self._bundle_digest or self._spec.bundle_digest,
        )


def require_matching_spaces(env: AnyEnv, spec: PolicySpec) -> None:
    """Passes if the policy can act in this environment, or in each one of a vector.

    Widths must be equal, and so must the bounds of the action: a policy scaled to another range would move the robot
    differently from what it learned. Bounds of the observation are not compared; many environments state none.

    Raises:
        ContractMismatch: SPACE_MISMATCH, with both sides.
    """
    observation, action = (
        (env.single_observation_space, env.single_action_space)
        if isinstance(env, VectorEnv)
        else (env.observation_space, env.action_space)
    )
    width = _observation_width(observation)
    if width != spec.observation.width:
        raise _mismatch(f"observation: the policy expects width {spec.observation.width}, the environment has {width}")
    _require_matching_action(action, spec.action)


def _require_matching_action(space: spaces.Space[Any], expected: Space) -> None:
    if not isinstance(space, spaces.Box) or space.shape != (expected.width,):
        raise _mismatch(f"action: the policy gives Box({expected.width},), the environment takes {space}")
    for name, ours, theirs in (("low", expected.low, space.low), ("high", expected.high, space.high)):
        if not np.allclose(ours, theirs, rtol=1e-5, atol=1e-6):
            raise _mismatch(f"action: the policy's {name} is {ours.tolist()}, the environment's is {theirs.tolist()}")


def _observation_width(space: spaces.Space[Any]) -> int:
    parts = [space]
    if isinstance(space, spaces.Dict):
        missing = [key for key in GOAL_KEYS if key not in space.spaces]
        if missing:
            raise _mismatch(f"observation: a Dict needs {' and '.join(GOAL_KEYS)}, the environment has {list(space)}")
        parts = [space.spaces[key] for key in GOAL_KEYS]
    if not all(isinstance(part, spaces.Box) and len(part.shape) == 1 for part in parts):
        raise _mismatch(f"observation: expected one vector, the environment has {space}")
    return sum(part.shape[0] for part in parts if part.shape is not None)


def _autoreset_mode(envs: "VectorEnv[Any, Any, Any]") -> AutoresetMode:
    try:
        return AutoresetMode(envs.metadata["autoreset_mode"])
    except (KeyError, ValueError):
        known = ", ".join(str(mode) for mode in AutoresetMode)
        raise ValueError(f"a vector environment must state metadata['autoreset_mode'], one of {known}") from None


def _resting_actions(envs: "VectorEnv[Any, Any, Any]") -> NDArray[Any]:
    """What environments get that have no episode left, or whose step is a reset: `[N, A]`."""
    space = envs.single_action_space
    assert isinstance(space, spaces.Box)
    row = np.clip(0, space.low, space.high).astype(space.dtype)
    return np.tile(row, (envs.num_envs, 1))


def _success(infos: Mapping[str, Any], row: int) -> bool | None:
    """What a vector's `infos` say of one environment."""
    for key in ("is_success", "success"):
        if key in infos and (f"_{key}" not in infos or infos[f"_{key}"][row]):
            return _said(infos[key][row])
    return None


def _said(success: Any) -> bool | None:
    return None if success is None else bool(success)


def _mismatch(detail: str) -> ContractMismatch:
    return ContractMismatch("SPACE_MISMATCH", detail)
