"""What is said of several seeds."""

from collections.abc import Callable, Sequence

import numpy as np

from lom.study.quadratic import Array


def confidence_interval(values: Sequence[float] | Array, *, level: float = 0.95) -> tuple[float, float]:
    """Bounds of the mean: percentiles of 10,000 bootstrap resamples. With few seeds it is rather too narrow."""
    sample = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(sample), size=(10_000, len(sample)))
    tail = 50 * (1 - level)
    low, high = np.percentile(sample[drawn].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)


def mean_and_interval(values: Sequence[float] | Array, digits: int = 3) -> str:
    """ "mean [low, high]", the 95 % confidence interval."""
    low, high = confidence_interval(values)
    return f"{np.mean(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def mean_and_worst(values: Sequence[float], worst: Callable[[Sequence[float]], float] = min, *, digits: int = 3) -> str:
    """ "mean (worst)"."""
    return f"{np.mean(values):.{digits}f} ({worst(values):.{digits}f})"
