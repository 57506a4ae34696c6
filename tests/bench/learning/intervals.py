"""Means over seeds with bootstrap intervals, and the interquartile mean over tasks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_RESAMPLES = 10_000
_COVERAGE = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A statistic and its 95 % percentile-bootstrap interval."""

    value: float
    low: float
    high: float


def mean(values: Array) -> Array:
    """The mean of the last axis."""
    return np.asarray(values.mean(axis=-1))


def interquartile_mean(values: Array) -> Array:
    """The mean of the middle half of the last axis; a quarter of n that is no whole number is rounded down."""
    ordered = np.sort(values, axis=-1)
    cut = values.shape[-1] // 4
    return np.asarray(ordered[..., cut : values.shape[-1] - cut].mean(axis=-1))


def estimate(scores: Sequence[Array], statistic: Callable[[Array], Array], seed: int = 0) -> Estimate:
    """The statistic of all scores together; seeds are resampled within each task (stratified).

    Args:
        scores: float64[S_t] for every task t.
        statistic: float64[..., n] -> float64[...].
    """
    rng = np.random.default_rng(seed)
    resampled = [task[rng.integers(len(task), size=(_RESAMPLES, len(task)))] for task in scores]
    spread = statistic(np.concatenate(resampled, axis=-1))
    low, high = np.quantile(spread, [(1 - _COVERAGE) / 2, (1 + _COVERAGE) / 2])
    return Estimate(value=float(statistic(np.concatenate(scores))), low=float(low), high=float(high))
