"""Reads one file of transitions as it is: `.npz`, HDF5 with the keys of D4RL, or a Minari dataset. No pickle is read.

Minari's HDF5 format is read with h5py alone; the package `minari` is not needed.
"""

import difflib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lom.observation_parts import Parts, choose_keys

REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("next_observations", "timeouts", "next_actions")

_MINARI_FILE = "main_data.hdf5"
_MINARI_EPISODE = "episode_"

Array = NDArray[Any]
Bounds = tuple[NDArray[np.float32], NDArray[np.float32]]


class DatasetError(ValueError):
    """A dataset that cannot be trained on; the message names file, field, expected and got."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What one file says, not checked yet.

    Attributes:
        arrays: by key of `REQUIRED` and `OPTIONAL`; dict observations are one vector already.
        observation_parts: of which parts, empty where the file holds vectors.
        action_bounds: (low, high) where the file states them.
    """

    arrays: dict[str, Array]
    observation_parts: Parts = ()
    action_bounds: Bounds | None = None


def find_dataset(name: Path, minari_root: Path) -> Path:
    """The file or folder that was meant: a path, or the id of a dataset under Minari's root folder."""
    try:
        below_root = minari_root / name
        return below_root if not name.exists() and below_root.is_dir() else name
    except OSError:  # a folder on the way may not be looked into: reading it says so
        return name


def read_recording(path: Path, observation_keys: Sequence[str] = ()) -> Recording:
    """Reads one `.npz`, `.hdf5` or `.h5` file, or the folder of a Minari dataset.

    Args:
        observation_keys: which parts of dict observations, in order; see `lom.observation_parts`.

    Raises:
        DatasetError: it cannot be read as what its name says, a key is missing, observations cannot be flattened, or
            it says of itself that its rewards are unknown.
    """
    try:
        if path.is_dir():
            path = _minari_file(path)
        with path.open("rb"):
            pass
    except FileNotFoundError:
        raise DatasetError(
            f"{path}: expected a file, found none, nor a Minari dataset of that name under MINARI_DATASETS_PATH"
        ) from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from error
    if path.suffix == ".npz":
        with _refusals(path, "an .npz archive"):
            return _read_npz(path, observation_keys)
    if path.suffix in (".hdf5", ".h5"):
        with _refusals(path, "an HDF5 file"):
            return _read_hdf5(path, observation_keys)
    raise DatasetError(f"{path}: expected a file named .npz, .hdf5 or .h5, or the folder of a Minari dataset")


@contextmanager
def _refusals(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except DatasetError:
        raise
    except MemoryError as error:
        raise DatasetError(f"{path}: its arrays are larger than this machine's memory") from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise DatasetError(
            f"{path}: expected {kind}, it cannot be read as one (damaged, cut off or foreign)"
        ) from error


# -------------------------------------------------------------------- npz and D4RL's HDF5


def _read_npz(path: Path, observation_keys: Sequence[str]) -> Recording:
    loaded = np.load(path, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise DatasetError(f"{path}: expected an .npz archive, got a single array")
    with loaded as archive:

        def read(name: str) -> Array:
            try:
                array = archive[name]
            except ValueError as error:
                if "allow_pickle" in str(error):
                    raise DatasetError(
                        f"{path}: {name}: expected a plain array, got pickled objects, which are never loaded"
                    ) from error
                raise
            if not isinstance(array, np.ndarray):
                raise DatasetError(f"{path}: {name}: expected an array, got something else")
            return array

        return _recording(path, list(archive.files), read, observation_keys)


def _read_hdf5(path: Path, observation_keys: Sequence[str]) -> Recording:
    import h5py  # only where it is asked for: it loads slowly

    with h5py.File(path, "r") as file:
        if any(name.startswith(_MINARI_EPISODE) for name in file):
            return _read_minari(path, file, observation_keys)
        _require_known_rewards(path, file.attrs)
        return _recording(path, _dataset_names(file), lambda name: np.asarray(file[name]), observation_keys)


def _dataset_names(group: Any) -> list[str]:
    """Paths of all datasets below an HDF5 group."""
    names: list[str] = []
    group.visititems(lambda name, item: names.append(name) if hasattr(item, "dtype") else None)
    return names


def _recording(
    path: Path, names: Sequence[str], read: Callable[[str], Array], observation_keys: Sequence[str]
) -> Recording:
    """From a file with D4RL's keys at its top; dict observations are `observations/KEY`."""
    top = {name.split("/")[0] for name in names}
    for key in REQUIRED:
        if key not in top:
            present = sorted(top)
            close = difflib.get_close_matches(key, present, n=1)
            hint = f"; is {close[0]!r} meant to be it?" if close else ""
            raise DatasetError(f"{path}: expected a key {key!r}, got {present}{hint}")
    arrays: dict[str, Array] = {}
    parts: Parts = ()
    for key in (*REQUIRED, *OPTIONAL):
        if key in names:
            arrays[key] = read(key)
        elif key in top and key.endswith("observations"):
            inside = {name.removeprefix(f"{key}/"): name for name in names if name.startswith(f"{key}/")}
            chosen = _chosen(path, list(inside), observation_keys)
            arrays[key], found = _joined(path, key, {part: read(inside[part]) for part in chosen})
            if parts and found != parts:
                raise DatasetError(f"{path}: {key}: expected the parts {_shown(parts)}, got {_shown(found)}")
            parts = found
        elif key in top:
            raise DatasetError(f"{path}: {key}: expected an array, got a group")
    return Recording(arrays=arrays, observation_parts=parts)


def _chosen(path: Path, present: Sequence[str], observation_keys: Sequence[str]) -> tuple[str, ...]:
    try:
        return choose_keys(present, observation_keys)
    except ValueError as error:
        raise DatasetError(f"{path}: {error}") from error


def _joined(path: Path, key: str, values: Mapping[str, Array]) -> tuple[Array, Parts]:
    """Parts side by side: arrays [rows] or [rows, n] by name -> ([rows, O], parts)."""
    columns = []
    for name, array in values.items():
        rows = len(next(iter(values.values()))) if array.ndim else 0
        if array.ndim not in (1, 2) or len(array) != rows or array.dtype.kind not in "fiub":
            raise DatasetError(
                f"{path}: {key}/{name}: expected numbers of shape [{rows}] or [{rows}, n], "
                f"got {array.dtype} of shape {list(array.shape)}"
            )
        columns.append(array.reshape(len(array), -1).astype(np.float32, copy=False))
    if not columns:
        raise DatasetError(f"{path}: {key}: expected an array, or a group of arrays, got an empty group")
    return np.concatenate(columns, axis=1), tuple(
        (name, column.shape[1]) for name, column in zip(values, columns, strict=True)
    )


def _shown(parts: Parts) -> str:
    return ", ".join(f"{key}[{size}]" for key, size in parts) or "one vector"


# -------------------------------------------------------------------- Minari


def _minari_file(folder: Path) -> Path:
    """`FOLDER/data/main_data.hdf5`, as Minari lays it out, or `FOLDER/main_data.hdf5`."""
    for candidate in (folder / "data" / _MINARI_FILE, folder / _MINARI_FILE):
        if candidate.is_file():
            return candidate
    stored = _metadata(folder / "data" / _MINARI_FILE).get("data_format")
    got = f"got data_format {stored!r}, which is not read here" if stored else "found none"
    raise DatasetError(f"{folder}: expected a Minari dataset in HDF5 (data/{_MINARI_FILE}), {got}")


def _metadata(path: Path) -> dict[str, Any]:
    """Minari's metadata.json beside the data, where there is one."""
    beside = path.with_name("metadata.json")
    try:
        document = json.loads(beside.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DatasetError(f"{beside}: expected JSON that can be read") from error
    if not isinstance(document, dict):
        raise DatasetError(f"{beside}: expected a JSON object")
    return document


def _read_minari(path: Path, file: Any, observation_keys: Sequence[str]) -> Recording:
    """Episodes one after the other; T + 1 observations of an episode become T pairs (s, s')."""
    metadata = {**file.attrs, **_metadata(path)}
    _require_known_rewards(path, metadata)
    names = sorted(
        (name for name in file if name.startswith(_MINARI_EPISODE)),
        key=lambda name: (len(name), name),  # episode_10 comes after episode_9
    )
    episodes: dict[str, list[Array]] = {}
    parts: Parts | None = None
    for name in names:
        _require_known_rewards(path, file[name].attrs)
        arrays, found = _read_episode(path, file[name], observation_keys)
        if parts is not None and found != parts:
            raise DatasetError(f"{path}: {name}: expected the parts {_shown(parts)}, got {_shown(found)}")
        parts = found
        for key, array in arrays.items():
            others = episodes.setdefault(key, [])
            if others and array.shape[1:] != others[0].shape[1:]:
                raise DatasetError(
                    f"{path}: {name}: {key}: expected rows of shape {list(others[0].shape[1:])} as in {names[0]}, "
                    f"got {list(array.shape[1:])}"
                )
            others.append(array)
    joined: dict[str, Array] = {}
    for key in list(episodes):
        joined[key] = np.concatenate(episodes.pop(key))
    return Recording(
        arrays=joined,
        observation_parts=parts or (),
        action_bounds=_action_bounds(path, metadata.get("action_space"), joined["actions"]),
    )


def _read_episode(path: Path, group: Any, observation_keys: Sequence[str]) -> tuple[dict[str, Array], Parts]:
    where = f"{path}: {group.name.removeprefix('/')}"
    for key in ("observations", "actions", "rewards", "terminations", "truncations"):
        if key not in group:
            raise DatasetError(f"{where}: expected a key {key!r}, got {sorted(group)}")
        if key != "observations" and not hasattr(group[key], "dtype"):
            raise DatasetError(f"{where}: {key}: expected an array, got a group")
    parts: Parts = ()
    if hasattr(group["observations"], "dtype"):
        observations = np.asarray(group["observations"])
    else:
        inside = group["observations"]
        chosen = _chosen(path, _dataset_names(inside), observation_keys)
        observations, parts = _joined(path, "observations", {key: np.asarray(inside[key]) for key in chosen})
    actions, rewards, terminals, timeouts = (
        np.asarray(group[key]) for key in ("actions", "rewards", "terminations", "truncations")
    )
    steps = len(rewards) if rewards.ndim else 0
    for key, array, expected in (
        ("observations", observations, steps + 1),
        ("actions", actions, steps),
        ("terminations", terminals, steps),
        ("truncations", timeouts, steps),
    ):
        got = len(array) if array.ndim else 0
        if got != expected:
            raise DatasetError(f"{where}: {key}: expected {expected} rows for {steps} rewards, got {got}")
    if steps:
        timeouts = timeouts.astype(np.bool_)
        timeouts[-1] |= not terminals[-1]  # an episode that was only cut off ends all the same
    arrays = {
        "observations": observations[:-1],
        "next_observations": observations[1:],
        "actions": actions,
        "rewards": rewards,
        "terminals": terminals,
        "timeouts": timeouts,
    }
    return arrays, parts


def _action_bounds(path: Path, space: Any, actions: Array) -> Bounds | None:
    """Of Minari's description of the action space; None where there is none."""
    if space is None:
        return None
    try:
        document = json.loads(space) if isinstance(space, str | bytes) else space
        kind = str(document["type"])
        if kind != "Box":
            raise DatasetError(f"{path}: action_space: expected a Box (continuous actions), got {kind:.32}")
        shape = actions.shape[1:]
        low, high = (np.broadcast_to(np.asarray(document[side], np.float32), shape) for side in ("low", "high"))
    except DatasetError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise DatasetError(f"{path}: action_space: expected Minari's description of a space") from error
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise DatasetError(f"{path}: action_space: expected finite bounds, low below high, got {document['low']!r:.64}")
    return low, high


def _require_known_rewards(path: Path, metadata: Mapping[str, Any]) -> None:
    """A recording of a robot at work may hold zeros for want of rewards; every action would look equally good."""
    if str(metadata.get("rewards_known", True)).lower() in ("false", "0"):
        raise DatasetError(
            f"{path}: rewards: expected known ones, its metadata says rewards_known: false; write the rewards into the "
            "file and set rewards_known to true"
        )
