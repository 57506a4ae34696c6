"""Sums of discounted rewards along the episodes of a dataset."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lom.dataset import Transitions


class MultiStep(NamedTuple):
    """What a critic's target takes from several steps of the behaviour, for each of N rows.

    Attributes:
        rewards: float64[N], Σ_{i<k} γ^i r_i from the row on.
        last: int64[N], the row with the k-th of these rewards; its next state and action are what is bootstrapped with.
        discounts: float64[N], γ^k.
    """

    rewards: NDArray[np.float64]
    last: NDArray[np.int64]
    discounts: NDArray[np.float64]


def returns_to_go(transitions: Transitions, discount: float) -> NDArray[np.float64]:
    """Discounted return from every row to the end of its episode, float64[N]."""
    ends = np.diff(transitions.episodes, append=-1) != 0
    to_go, following = np.empty(len(transitions)), 0.0
    for row in range(len(transitions) - 1, -1, -1):
        following = float(transitions.rewards[row]) + (0.0 if ends[row] else discount * following)
        to_go[row] = following
    return to_go


def multi_step(transitions: Transitions, steps: int, discount: float) -> MultiStep:
    """Up to `steps` steps from every row on: fewer at the end of an episode.

    An episode that was cut off without a next action ends one step earlier, because there is nothing to bootstrap with
    behind its last row.
    """
    rows = np.arange(len(transitions))
    has_target = transitions.terminals | transitions.has_next_action
    stops = np.flatnonzero((np.diff(transitions.episodes, append=-1) != 0) | ~has_target)
    stop = stops[np.searchsorted(stops, rows)]
    last = np.maximum(np.minimum(rows + steps - 1, np.where(has_target[stop], stop, stop - 1)), rows)
    rewards = np.zeros(len(transitions))
    for ahead in range(min(steps, int((last - rows).max()) + 1)):
        inside = np.flatnonzero(rows + ahead <= last)
        rewards[inside] += discount**ahead * transitions.rewards[inside + ahead].astype(np.float64)
    return MultiStep(rewards, last, np.power(np.float64(discount), last - rows + 1))


def mean_horizon(transitions: Transitions, discount: float) -> float:
    """Steps over which what a row does still matters: the length of its episode, at most 1 / (1 - γ); mean over rows.

    An episode that was cut off might have gone on: it has 1 / (1 - γ), and its length where nothing is discounted.
    """
    lengths = np.bincount(transitions.episodes).astype(np.float64)
    if discount < 1.0:
        limit = 1.0 / (1.0 - discount)
        ended = np.bincount(transitions.episodes, weights=transitions.terminals) > 0
        lengths = np.where(ended, np.minimum(lengths, limit), limit)
    return float(lengths[transitions.episodes].mean())
