"""How a dict observation becomes one vector. The order is recorded with the run, so that a client builds the same one.

A part is `(key, number of elements)`; parts in order describe the vector. A key inside a nested dict is its path, with
slashes (`robot/joints`). No parts at all: observations were vectors already.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Parts = tuple[tuple[str, int], ...]

_GOAL_KEYS = ("observation", "desired_goal")


def choose_keys(present: Sequence[str], asked: Sequence[str] = ()) -> tuple[str, ...]:
    """The keys that enter the vector, in order.

    Those asked for; else, where the dict is a goal environment's, `observation` and `desired_goal` (`achieved_goal` is
    left out: it repeats what the observation says); else all of them in alphabetical order.

    Raises:
        ValueError: a key that was asked for is not there, or was asked for twice.
    """
    if len(set(asked)) != len(asked):
        raise ValueError(f"observation keys: expected each one once, got {list(asked)}")
    for key in asked:
        if key not in present:
            raise ValueError(f"observation keys: expected some of {sorted(present)}, got {key!r}")
    if asked:
        return tuple(asked)
    if set(_GOAL_KEYS) <= set(present):
        return _GOAL_KEYS
    return tuple(sorted(present))


def element_names(parts: Parts) -> tuple[str, ...]:
    """`observation[0]`, `observation[1]`, ..., `desired_goal[0]`, ...: what each element of the vector is."""
    return tuple(f"{key}[{index}]" for key, size in parts for index in range(size))


def leaves(observation: Mapping[str, Any]) -> dict[str, Any]:
    """A nested mapping as one of paths: `{"robot": {"joints": x}}` gives `{"robot/joints": x}`."""
    flat: dict[str, Any] = {}
    for key, value in observation.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{path}": leaf for path, leaf in leaves(value).items()}
        else:
            flat[key] = value
    return flat


def flatten_observation(observation: Mapping[str, Any], keys: Sequence[str]) -> NDArray[np.float32]:
    """One dict observation as float32[O], its parts in the order of `keys`."""
    values = leaves(observation)
    return np.concatenate([np.asarray(values[key], np.float32).ravel() for key in keys])
