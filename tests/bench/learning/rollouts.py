"""Datasets rolled out from given policies: `FOLDER/policies/*.npz`, numbers only.

Such a file is a mixture of finished policies. It is neither a replay buffer nor a file of D4RL.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from numpy.typing import NDArray

from lom.evaluation import make_env

Array = NDArray[np.float64]
Arrays = Mapping[str, NDArray[Any]]
Mixing = Literal["rows", "episodes"]

RANDOM = "random"
"""The policy that draws every action uniformly between the bounds."""

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "lrelu": lambda x: np.where(x > 0.0, x, 0.01 * x),
    "tanh": np.tanh,
}


@dataclass(frozen=True, kw_only=True)
class GivenPolicy:
    """A multi-layer perceptron with one of five heads; weights as in its file, float64."""

    env: str
    head: Literal["tanh_gaussian", "tanh", "clip_gaussian", "clip", "none"]
    weights: Mapping[str, NDArray[Any]]

    @classmethod
    def load(cls, path: Path) -> "GivenPolicy":
        """Reads one file; pickled objects are refused."""
        with np.load(path, allow_pickle=False) as archive:
            values = {name: archive[name] for name in archive.files}
        numbers = {name: a.astype(np.float64) for name, a in values.items() if a.dtype.kind == "f"}
        return cls(
            env=str(values["env"]),
            head=str(values["head"]),  # type: ignore[arg-type]
            weights={**numbers, "act": values["act"], "n_hidden": values["n_hidden"]},
        )

    def act(self, observation: Array, rng: np.random.Generator | None) -> Array:
        """float64[O] -> float64[A] in [-1, 1]; sampled where the policy has noise and `rng` is given."""
        w = self.weights
        clipped = np.clip(observation, -w["in_clip"], w["in_clip"])
        hidden = np.clip((clipped - w["obs_mean"]) * w["obs_inv"], -w["obs_clip"], w["obs_clip"])
        activation = _ACTIVATIONS[str(w["act"])]
        for layer in range(int(w["n_hidden"])):
            hidden = activation(w[f"W{layer}"] @ hidden + w[f"b{layer}"])
        action = w["Wm"] @ hidden + w["bm"]
        if rng is not None and "Ws" in w:
            log_std = np.clip(w["Ws"] @ hidden + w["bs"], *w["ls_clip"])
            action = action + np.exp(log_std) * rng.standard_normal(len(action))
        elif rng is not None and "std" in w:
            action = action + w["std"] * rng.standard_normal(len(action))
        # What the head `none` leaves outside, the simulator would clip.
        bounded: Array = np.tanh(action) if self.head.startswith("tanh") else np.clip(action, -1.0, 1.0)
        return bounded


Act = Callable[[Array], Array]


def play_episode(env: gymnasium.Env[Any, Any], act: Act, *, seed: int, max_rows: int) -> dict[str, list[Any]]:
    """One episode, or its first `max_rows` steps; a' of every row is what the policy did next, or would have done.

    Actions are float32 before they are taken, so that the rows say exactly what happened.
    """
    rows: dict[str, list[Any]] = {
        key: []
        for key in ("observations", "actions", "rewards", "next_observations", "next_actions", "terminals", "timeouts")
    }
    observation, _ = env.reset(seed=seed)
    action = act(observation).astype(np.float32)
    ended = False
    while not ended:
        next_observation, reward, terminal, truncated, _ = env.step(action)
        next_action = act(next_observation).astype(np.float32)
        ended = terminal or truncated or len(rows["rewards"]) + 1 == max_rows
        row = (observation, action, reward, next_observation, next_action, terminal, ended and not terminal)
        for column, value in zip(rows.values(), row, strict=True):
            column.append(value)
        observation, action = next_observation, next_action
    return rows


@dataclass(kw_only=True)
class _Columns:
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, rows: Mapping[str, Iterable[Any]]) -> None:
        for key, values in rows.items():
            self.columns.setdefault(key, []).extend(values)

    def arrays(self) -> dict[str, NDArray[Any]]:
        kinds: dict[str, Any] = {"terminals": np.bool_, "timeouts": np.bool_, "sources": np.int32}
        return {key: np.asarray(values, kinds.get(key, np.float32)) for key, values in self.columns.items()}


def roll_out(
    env_id: str,
    policies: Sequence[str],
    folder: Path,
    *,
    rows: int,
    mixing: Mixing = "rows",
    sampled: bool = True,
    seed: int = 0,
    on_rows: Callable[[int], None] = lambda count: None,
) -> dict[str, NDArray[Any]]:
    """Plays the policies in turn.

    Args:
        policies: names of files of `folder` without their suffix, or `RANDOM`.
        mixing: every policy gives equally many `rows`, or (but for the last one) equally many `episodes`.
        sampled: draw actions where a policy has noise.
        on_rows: is told of every new episode's length.

    Returns:
        Arrays with the keys of D4RL, `next_actions`, `sources` int32[N] (index into `policies`) and `source_names`.
    """
    env = make_env(env_id)
    rng = np.random.default_rng(seed)
    low, high = env.action_space.low, env.action_space.high  # type: ignore[attr-defined]
    acts = [_act_of(name, folder, low, high, rng, sampled) for name in policies]
    shares = [rows // len(policies) + (index < rows % len(policies)) for index in range(len(policies))]
    done = [0] * len(policies)
    collected = _Columns()
    episode = 0
    while sum(done) < rows:
        if mixing == "episodes":
            source, left = episode % len(policies), rows - sum(done)
        else:
            source = next(index for index, share in enumerate(shares) if done[index] < share)
            left = shares[source] - done[source]
        # Far from the seeds of evaluation, which start at 100,000.
        played = play_episode(env, acts[source], seed=1_000_000 * (seed + 1) + episode, max_rows=left)
        length = len(played["rewards"])
        collected.add({**played, "sources": [source] * length})
        done[source] += length
        episode += 1
        on_rows(length)
    env.close()
    return {**collected.arrays(), "source_names": np.array(policies)}


def _act_of(name: str, folder: Path, low: Array, high: Array, rng: np.random.Generator, sampled: bool) -> Act:
    if name == RANDOM:
        return lambda observation: rng.uniform(low, high)
    policy = GivenPolicy.load(folder / f"{name}.npz")
    return lambda observation: policy.act(np.asarray(observation, np.float64), rng if sampled else None)
