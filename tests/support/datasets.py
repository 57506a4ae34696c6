"""Datasets on disk as other programs write them."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
Tree = dict[str, Any]


def write_arrays(path: Path, arrays: Tree) -> Path:
    """D4RL's keys at the top of an `.npz` or HDF5 file; a dict becomes a group (HDF5) or keys with slashes."""
    if path.suffix == ".npz":
        np.savez(path, **_slashed(arrays))  # type: ignore[arg-type]
    else:
        with h5py.File(path, "w") as file:
            _write_group(file, arrays)
    return path


def write_minari(
    folder: Path,
    episodes: list[Tree],
    *,
    action_space: Any = None,
    metadata: Tree | None = None,
    attributes: Tree | None = None,
) -> Path:
    """`FOLDER/data/main_data.hdf5` and `metadata.json` as Minari 0.5 lays them out."""
    data = folder / "data"
    data.mkdir(parents=True)
    with h5py.File(data / "main_data.hdf5", "w") as file:
        file.attrs.update(attributes or {})
        for index, episode in enumerate(episodes):
            group = file.create_group(f"episode_{index}")
            group.attrs["id"] = index
            _write_group(group, episode)
    described = {"total_episodes": len(episodes), "data_format": "hdf5", **(metadata or {})}
    if action_space is not None:
        described["action_space"] = json.dumps(action_space)
    (data / "metadata.json").write_text(json.dumps(described))
    return folder


def minari_episode(steps: int, *, first: float = 0.0, terminated: bool = False, truncated: bool = True) -> Tree:
    """Observation t is [first + t, -(first + t)], action t is [(first + t) / 100], reward t is t."""
    times = first + np.arange(steps + 1, dtype=np.float64)
    last = np.arange(steps) == steps - 1
    return {
        "observations": np.stack([times, -times], axis=1),
        "actions": (times[:-1, None] / 100).astype(np.float32),
        "rewards": np.arange(steps, dtype=np.float64),
        "terminations": last & terminated,
        "truncations": last & truncated,
        "infos": {"force": np.zeros((steps + 1, 3))},
    }


def box(low: list[float], high: list[float]) -> Tree:
    """A Box as Minari describes it."""
    return {"type": "Box", "dtype": "float32", "shape": [len(low)], "low": low, "high": high}


def _slashed(arrays: Tree) -> Arrays:
    flat: Arrays = {}
    for key, value in arrays.items():
        inside = _slashed(value).items() if isinstance(value, dict) else None
        flat |= {key: value} if inside is None else {f"{key}/{name}": array for name, array in inside}
    return flat


def _write_group(group: Any, arrays: Tree) -> None:
    for key, value in arrays.items():
        if isinstance(value, dict):
            _write_group(group.create_group(key), value)
        else:
            group[key] = value
