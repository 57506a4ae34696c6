"""Transitions of one or several files, checked, each paired with the action that was really taken next."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lom.dataset_files import Bounds, Recording, read_recording
from lom.dataset_files import DatasetError as DatasetError
from lom.observation_parts import Parts

_FLAGS = ("terminals", "timeouts")
_NOT_PER_ROW = ("source_names", "observation_parts", "action_low", "action_high", "fingerprint")


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """Rows (s, a, r, s', a') of one or several files, in the files' order. Environment units.

    Attributes:
        observations: float32[N, O].
        actions: float32[N, A], inside the action bounds.
        rewards: float32[N].
        next_observations: float32[N, O].
        next_actions: float32[N, A], the behaviour's action at s'; zero where none is known.
        terminals: bool[N], s' is absorbing: its value is 0.
        has_next_action: bool[N]; a row that is neither terminal nor has one must stay out of the SARSA loss.
        episodes: int32[N], index of the row's episode, increasing.
        sources: int32[N], which file the row came from, an index into `source_names`.
        source_names: the files as they were named, in the order given.
        observation_parts: how dict observations became vectors; empty where they were vectors.
        action_low, action_high: float32[A], the action bounds, environment units.
        fingerprint: sha256 over what is learned from, the arrays down to `episodes`, hexadecimal.
    """

    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    next_observations: NDArray[np.float32]
    next_actions: NDArray[np.float32]
    terminals: NDArray[np.bool_]
    has_next_action: NDArray[np.bool_]
    episodes: NDArray[np.int32]
    sources: NDArray[np.int32]
    source_names: tuple[str, ...]
    observation_parts: Parts
    action_low: NDArray[np.float32]
    action_high: NDArray[np.float32]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.observations)

    @property
    def episode_returns(self) -> NDArray[np.float64]:
        """Undiscounted return of every episode, float64[E]."""
        return np.bincount(self.episodes, weights=self.rewards).astype(np.float64)

    def hold_out(self, share: float, seed: int) -> tuple["Transitions", "Transitions | None"]:
        """Splits whole episodes off: (what to train on, what nothing may be fitted to).

        `share` of the episodes, rounded, and at least one where there are ten or more; None where that gives none.
        Both parts keep the fingerprint of the whole.
        """
        count = int(self.episodes[-1]) + 1
        held_out = max(round(share * count), 1 if share > 0 and count >= 10 else 0)
        if held_out == 0:
            return self, None
        chosen = np.random.default_rng(seed).permutation(count)[:held_out]
        mask = np.isin(self.episodes, chosen)
        return self._rows(~mask), self._rows(mask)

    def _rows(self, mask: NDArray[np.bool_]) -> "Transitions":
        arrays = {name: array[mask] for name, array in vars(self).items() if name not in _NOT_PER_ROW}
        arrays["episodes"] = np.unique(arrays["episodes"], return_inverse=True)[1].astype(np.int32)
        return Transitions(**arrays, **{name: getattr(self, name) for name in _NOT_PER_ROW})


def load_transitions(
    paths: Sequence[Path],
    *,
    names: Sequence[str] = (),
    action_bounds: Bounds | None = None,
    observation_dim: int | None = None,
    observation_keys: Sequence[str] = (),
    strict: bool = False,
    warn: Callable[[str], None] = lambda message: None,
) -> Transitions:
    """Reads, checks, pairs and joins the files.

    Actions outside the bounds are clipped and counted in a warning; `strict` refuses them instead.

    Args:
        names: what the files are called in `Transitions.source_names`; their own names where empty.
        action_bounds: (low, high) float32[A] each, environment units; None takes those that the files state, or
            [-1, 1] in every dimension where none does.
        observation_dim: O where an environment tells it.
        observation_keys: parts of dict observations, in order; empty takes the order of `lom.observation_parts`.
        strict: refuse instead of clipping.
        warn: is told what was clipped or had to be assumed.

    Raises:
        DatasetError: a missing file or key, a wrong shape, a value that is not finite, an empty file, unknown rewards,
            files that do not fit each other or the environment.
    """
    if not paths:
        raise DatasetError("expected at least one dataset file, got none")
    action_dim = None if action_bounds is None else action_bounds[0].size
    fits = "the environment"
    names = tuple(names) or tuple(path.name for path in paths)
    parts: list[dict[str, NDArray[Any]]] = []
    recordings: list[Recording] = []
    for path, name in zip(paths, names, strict=True):
        recording = read_recording(path, observation_keys)
        arrays = _checked(path, recording.arrays, action_dim, observation_dim, fits)
        recording.arrays.clear()  # a million rows should not be held twice
        if not {"timeouts", "next_observations"} & arrays.keys():
            warn(f"{name}: no timeouts and no next_observations: episodes are taken to end at terminals only")
        part = _pair(path, arrays)
        if observation_dim is None or action_dim is None:
            observation_dim, action_dim, fits = part["observations"].shape[1], part["actions"].shape[1], str(path)
        parts.append(part)
        recordings.append(recording)
    if action_bounds is None:
        action_bounds = _common_bounds(paths, recordings)
    if action_bounds is None:
        warn("neither an environment nor the files state action bounds: actions are taken to lie in [-1, 1]")
        action_bounds = -np.ones(action_dim or 0, np.float32), np.ones(action_dim or 0, np.float32)
    for name, part in zip(names, parts, strict=True):
        _move_inside(name, part, action_bounds, strict, warn)
    episodes_before = np.cumsum([0] + [int(part["episodes"][-1]) + 1 for part in parts[:-1]])
    for source, (part, offset) in enumerate(zip(parts, episodes_before, strict=True)):
        part["episodes"] = (part["episodes"] + offset).astype(np.int32)
        part["sources"] = np.full(len(part["rewards"]), source, np.int32)
    joined = parts[0] if len(parts) == 1 else {key: np.concatenate([p.pop(key) for p in parts]) for key in [*parts[0]]}
    return Transitions(
        **joined,
        source_names=names,
        observation_parts=_common_parts(paths, recordings),
        action_low=action_bounds[0],
        action_high=action_bounds[1],
        fingerprint=_fingerprint(joined),
    )


def _common_parts(paths: Sequence[Path], recordings: Sequence[Recording]) -> Parts:
    """Files with dict observations must agree; files with vectors are taken to hold the same order."""
    stated = [(path, r.observation_parts) for path, r in zip(paths, recordings, strict=True) if r.observation_parts]
    for path, parts in stated:
        if parts != stated[0][1]:
            raise DatasetError(
                f"{path}: observations: expected the parts {stated[0][1]} as in {stated[0][0]}, got {parts}"
            )
    return stated[0][1] if stated else ()


def _common_bounds(paths: Sequence[Path], recordings: Sequence[Recording]) -> Bounds | None:
    stated = [(path, r.action_bounds) for path, r in zip(paths, recordings, strict=True) if r.action_bounds is not None]
    for path, bounds in stated:
        if not np.array_equal(bounds, stated[0][1]):
            raise DatasetError(
                f"{path}: action_space: expected the bounds of {stated[0][0]}, got {bounds[0].tolist()} to "
                f"{bounds[1].tolist()}; --env states which ones hold"
            )
    return stated[0][1] if stated else None


def _move_inside(
    name: str, part: dict[str, NDArray[Any]], bounds: Bounds, strict: bool, warn: Callable[[str], None]
) -> None:
    low, high = bounds
    outside = (part["actions"] < low) | (part["actions"] > high)
    if outside.any():
        count = f"{int(outside.sum())} of {outside.size} action entries ({outside.mean():.1%})"
        if strict:
            raise DatasetError(f"{name}: actions: {count} lie outside the action space; refused because of --strict")
        warn(f"{name}: actions: {count} lie outside the action space and were clipped")
    for key in ("actions", "next_actions"):
        part[key] = np.clip(part[key], low, high)


def _fingerprint(arrays: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for key in sorted(arrays.keys() - {"sources"}):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(arrays[key]).data)
    return digest.hexdigest()


def _checked(
    path: Path,
    arrays: dict[str, NDArray[Any]],
    action_dim: int | None,
    observation_dim: int | None,
    fits: str,
) -> dict[str, NDArray[Any]]:
    """Arrays as float32 and bool, of shapes that fit each other and `fits`, which states the dimensions."""
    rows = len(arrays["observations"]) if arrays["observations"].ndim else 0
    if rows == 0:
        raise DatasetError(f"{path}: expected at least one transition, got none")
    checked: dict[str, NDArray[Any]] = {}
    for key, array in arrays.items():
        shape: tuple[int, ...] = (rows,)
        if key.endswith(("observations", "actions")):
            if array.ndim != 2 or array.shape[1] == 0:
                raise DatasetError(f"{path}: {key}: expected shape [{rows}, dimensions], got {list(array.shape)}")
            known = observation_dim if key.endswith("observations") else action_dim
            shape = (rows, known or arrays[key.removeprefix("next_")].shape[1])
        elif array.shape == (rows, 1):
            array = array[:, 0]  # some files keep scalars as columns
        if array.shape != shape:
            source = f" as of {fits}" if len(shape) == 2 and len(array) == rows else ""
            raise DatasetError(f"{path}: {key}: expected shape {list(shape)}{source}, got {list(array.shape)}")
        if array.dtype.kind not in "fiub":
            raise DatasetError(f"{path}: {key}: expected numbers, got dtype {array.dtype}")
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is named below
            converted = array.astype(np.float32, copy=False)
        finite = np.isfinite(converted)
        if not finite.all():
            bad_rows = np.flatnonzero(~finite.reshape(rows, -1).all(axis=1))
            raise DatasetError(
                f"{path}: {key}: expected finite float32 values, got NaN or infinite ones in {len(bad_rows)} of "
                f"{rows} rows, the first is row {bad_rows[0]}"
            )
        checked[key] = _flags(path, key, converted) if key in _FLAGS else converted
    return checked


def _flags(path: Path, key: str, values: NDArray[np.float32]) -> NDArray[np.bool_]:
    flags = values.astype(np.bool_)
    if (flags != values).any():
        raise DatasetError(f"{path}: {key}: expected 0 or 1, got {values[flags != values][0]:g}")
    return flags


def _pair(path: Path, arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Adds a' from the raw arrays, so that it never comes from another episode (LOM's first trap).

    Without `next_observations` (raw D4RL), s' is the next row's observation; the last row of an episode that did not
    end in a terminal state has no s' and is dropped, after its action has served as a' of the row before.
    """
    observations, actions = arrays["observations"], arrays["actions"]
    rows = len(observations)
    terminals = arrays["terminals"]
    timeouts = arrays.get("timeouts", np.zeros(rows, np.bool_))
    follows = np.zeros(rows, np.bool_)  # the next row is the next step of the same episode
    follows[:-1] = ~(terminals | timeouts)[:-1]
    if "next_observations" in arrays:
        next_observations = arrays["next_observations"]
        if "timeouts" not in arrays:  # such a file still shows its seams: s' of a row is not s of the next one
            follows[:-1] &= (next_observations[:-1] == observations[1:]).all(axis=1)
        keep: slice | NDArray[np.bool_] = slice(None)
    else:
        next_observations = np.roll(observations, -1, axis=0)
        next_observations[~follows] = observations[~follows]
        keep = follows | terminals
    if "next_actions" in arrays:
        next_actions, has_next_action = arrays["next_actions"].copy(), np.ones(rows, np.bool_)
    else:
        next_actions, has_next_action = np.roll(actions, -1, axis=0), follows.copy()
    next_actions[~has_next_action] = 0.0
    episodes = np.concatenate([[0], np.cumsum(~follows)[:-1]]).astype(np.int32)
    if len(episodes[keep]) == 0:
        raise DatasetError(f"{path}: expected at least one transition with a next observation, got none")
    kept_episodes = np.unique(episodes[keep], return_inverse=True)[1].astype(np.int32)
    return {
        "observations": observations[keep],
        "actions": actions[keep],
        "rewards": arrays["rewards"][keep],
        "next_observations": next_observations[keep],
        "next_actions": next_actions[keep],
        "terminals": terminals[keep],
        "has_next_action": has_next_action[keep],
        "episodes": kept_episodes,
    }
