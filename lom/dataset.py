"""Reads transitions and pairs every one with the action that was really taken next.

Formats: `.npz` and HDF5 (`.hdf5`, `.h5`) with the keys of D4RL: observations, actions, rewards, terminals, and where
they exist next_observations, timeouts, next_actions. No pickle is ever read.
"""

import difflib
import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_REQUIRED = ("observations", "actions", "rewards", "terminals")
_OPTIONAL = ("next_observations", "timeouts", "next_actions")


class DatasetError(ValueError):
    """A dataset that cannot be trained on; the message names file, field, expected and got."""


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
        fingerprint: sha256 over all of these arrays, hexadecimal.
    """

    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    next_observations: NDArray[np.float32]
    next_actions: NDArray[np.float32]
    terminals: NDArray[np.bool_]
    has_next_action: NDArray[np.bool_]
    episodes: NDArray[np.int32]
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
        arrays = {name: array[mask] for name, array in vars(self).items() if name != "fingerprint"}
        arrays["episodes"] = np.unique(arrays["episodes"], return_inverse=True)[1].astype(np.int32)
        return Transitions(**arrays, fingerprint=self.fingerprint)


def load_transitions(
    paths: Sequence[Path],
    *,
    action_bounds: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    observation_dim: int | None = None,
    strict: bool = False,
    warn: Callable[[str], None] = lambda message: None,
) -> Transitions:
    """Reads, checks, pairs and joins the files.

    Actions outside the bounds are clipped and counted in a warning; `strict` refuses them instead.

    Args:
        action_bounds: (low, high) float32[A] each, environment units; None means [-1, 1] in every dimension.
        observation_dim: O where an environment tells it.
        strict: refuse instead of clipping.
        warn: is told what was clipped.

    Raises:
        DatasetError: a missing file or key, a wrong shape, a non-finite value, an empty file, files that do not fit
            each other or the environment.
    """
    if not paths:
        raise DatasetError("expected at least one dataset file, got none")
    parts = []
    for path in paths:
        arrays = _read_file(path)
        if action_bounds is None:
            action_dim = arrays["actions"].shape[-1] if arrays["actions"].ndim == 2 else 1
            action_bounds = (-np.ones(action_dim, np.float32), np.ones(action_dim, np.float32))
        action_low, action_high = action_bounds
        part = _pair(path, _checked(path, arrays, action_low.size, observation_dim))
        outside = (part["actions"] < action_low) | (part["actions"] > action_high)
        if outside.any():
            count = f"{int(outside.sum())} of {outside.size} action entries ({outside.mean():.1%})"
            if strict:
                raise DatasetError(
                    f"{path}: actions: {count} lie outside the action space; refused because of --strict"
                )
            warn(f"{path}: actions: {count} lie outside the action space and were clipped")
        for key in ("actions", "next_actions"):
            part[key] = np.clip(part[key], action_low, action_high)
        parts.append(part)
        observation_dim = part["observations"].shape[1]
    first_episode = np.cumsum([0] + [int(part["episodes"][-1]) + 1 for part in parts[:-1]])
    for part, offset in zip(parts, first_episode, strict=True):
        part["episodes"] = (part["episodes"] + offset).astype(np.int32)
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    digest = hashlib.sha256()
    for key in sorted(joined):
        digest.update(key.encode() + np.ascontiguousarray(joined[key]).tobytes())
    return Transitions(**joined, fingerprint=digest.hexdigest())


def _read_file(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise DatasetError(f"{path}: expected a file, found none")
    keys = (*_REQUIRED, *_OPTIONAL)
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as archive:
                _require_keys(path, list(archive.files))
                return {key: archive[key] for key in keys if key in archive.files}
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise DatasetError(f"{path}: expected an .npz archive, it cannot be read as one") from error
        except ValueError as error:
            if isinstance(error, DatasetError):
                raise
            raise DatasetError(f"{path}: expected plain arrays, got pickled objects, which are never loaded") from error
    if path.suffix in (".hdf5", ".h5"):
        import h5py  # only where it is asked for: it loads slowly

        try:
            with h5py.File(path, "r") as file:
                _require_keys(path, list(file.keys()))
                return {key: np.asarray(file[key]) for key in keys if key in file}
        except OSError as error:
            raise DatasetError(f"{path}: expected an HDF5 file, it cannot be read as one") from error
    raise DatasetError(f"{path}: expected a file named .npz, .hdf5 or .h5")


def _require_keys(path: Path, present: list[str]) -> None:
    for key in _REQUIRED:
        if key not in present:
            close = difflib.get_close_matches(key, present, n=1)
            hint = f"; is {close[0]!r} meant to be it?" if close else ""
            raise DatasetError(f"{path}: expected a key {key!r}, got {sorted(present)}{hint}")


def _checked(
    path: Path, arrays: dict[str, NDArray[Any]], action_dim: int, observation_dim: int | None
) -> dict[str, NDArray[Any]]:
    rows = len(arrays["observations"]) if arrays["observations"].ndim else 0
    if rows == 0:
        raise DatasetError(f"{path}: expected at least one transition, got none")
    width = observation_dim or (arrays["observations"].shape[-1] if arrays["observations"].ndim == 2 else -1)
    expected_shapes = {
        "observations": (rows, width),
        "next_observations": (rows, width),
        "actions": (rows, action_dim),
        "next_actions": (rows, action_dim),
        "rewards": (rows,),
        "terminals": (rows,),
        "timeouts": (rows,),
    }
    checked = {}
    for key, array in arrays.items():
        if array.ndim == 2 and array.shape == (rows, 1) and expected_shapes[key] == (rows,):
            array = array[:, 0]  # some files keep scalars as columns
        if array.shape != expected_shapes[key]:
            expected = "[rows, observation dim]" if width < 0 else list(expected_shapes[key])
            raise DatasetError(f"{path}: {key}: expected shape {expected}, got {list(array.shape)}")
        if not (np.issubdtype(array.dtype, np.number) or array.dtype == np.bool_):
            raise DatasetError(f"{path}: {key}: expected numbers, got dtype {array.dtype}")
        flag = key in ("terminals", "timeouts")
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is named below
            converted = array.astype(np.bool_ if flag else np.float32)
        if not flag and not np.isfinite(converted).all():
            row = int(np.argwhere(~np.isfinite(converted))[0, 0])
            raise DatasetError(f"{path}: {key}: expected finite float32 values, row {row} is not")
        checked[key] = converted
    return checked


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
        keep = np.ones(rows, np.bool_)
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
    if not keep.any():
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
