"""How far an observation lies from the training data: a number that a robot can be warned by.

The behaviour mixture is p(a|s) and cannot know whether s was ever seen. This score can: a mixture of Gaussians over
normalised observations, as a distance, together with the distance outside the range of every dimension. Whatever is
farther decides. It is fitted at export, and its threshold comes from episodes that the fitted part had not seen.

What it cannot see: a sensor frozen inside its usual range (one row says little about time), dimensions that were
swapped but look alike, drifts within the spread of the data. docs/bundles.md has the measured rates.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_COMPONENTS = 16
_ITERATIONS = 15
_SEEDING_ROWS = 8192
_FOLDS = 10
_FAR = 1e6  # normalised observations are cut here, so that no overflow becomes NaN
_RANGE_QUANTILES = (0.001, 0.999)

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """K Gaussians over normalised observations in O dimensions, and the range of each dimension.

    Attributes:
        projections: float64[K, O, O], x -> standardised residual of component k, before `shifts` are taken off.
        shifts: float64[K, O].
        log_heights: float64[K], log of each component's weight times its peak, up to a constant.
        middles, half_widths: float64[O], of the range that holds nearly all rows.
    """

    projections: Array
    shifts: Array
    log_heights: Array
    middles: Array
    half_widths: Array

    def distances(self, rows: Array, reference: float) -> tuple[Array, Array]:
        """(distance to the mixture, distance outside the range): float64[N] each, for rows float64[N, O].

        The first is what a Gaussian of log-height `reference` would need for the same density; with one reference,
        distances of different fits can be compared.
        """
        residuals = rows @ self.projections - self.shifts[:, None]
        squared = np.square(residuals).sum(axis=2) + 2.0 * (reference - self.log_heights)[:, None]
        outside = np.abs(rows - self.middles) - self.half_widths
        return np.sqrt(np.maximum(squared.min(axis=0), 0.0)), outside.max(axis=1)


class StateScore(nn.Module):
    """The calibrated score as part of a graph: about 1 at the edge of the data, larger is farther."""

    projection: Tensor
    bias: Tensor
    offsets: Tensor
    middles: Tensor
    half_widths: Tensor

    def __init__(self, fit: _Fit, distance_scale: float, range_slack: float) -> None:
        super().__init__()
        components, dimension = fit.shifts.shape
        offsets = 2.0 * (fit.log_heights.max() - fit.log_heights)
        # Both scales are folded into the weights: one product, one square, one minimum.
        projection = fit.projections.transpose(1, 0, 2).reshape(dimension, components * dimension) / distance_scale
        self.register_buffer("projection", torch.tensor(projection, dtype=torch.float32))
        self.register_buffer("bias", torch.tensor(-fit.shifts.ravel() / distance_scale, dtype=torch.float32))
        self.register_buffer("offsets", torch.tensor(offsets / distance_scale**2, dtype=torch.float32))
        self.register_buffer("middles", torch.tensor(fit.middles, dtype=torch.float32))
        self.register_buffer("half_widths", torch.tensor(fit.half_widths + range_slack - 1.0, dtype=torch.float32))

    def forward(self, normalised: Tensor) -> Tensor:
        """Normalised observations float32[B, O] -> score float32[B]."""
        rows = normalised.clamp(-_FAR, _FAR)
        residuals = torch.addmm(self.bias, rows, self.projection)
        by_component = (residuals * residuals).view(-1, self.offsets.shape[0], self.middles.shape[0]).sum(dim=-1)
        distance = (by_component + self.offsets).amin(dim=-1).sqrt()
        outside = ((rows - self.middles).abs() - self.half_widths).amax(dim=-1)
        return torch.maximum(distance, outside)


def fit_state_score(
    normalised: NDArray[np.float32], episodes: NDArray[np.int32], *, false_alarm_rate: float, seed: int
) -> tuple[StateScore, float]:
    """Fits the score and its threshold.

    The threshold is the (1 - rate) quantile of scores that each episode gets from a fit on other episodes (at most
    ten folds): rows of one episode resemble each other, so a split by rows would promise too much.

    Shapes: normalised float32[N, O], episodes int32[N] -> (score, threshold).
    """
    rows = np.clip(normalised.astype(np.float64), -_FAR, _FAR)
    shuffled = np.random.default_rng(seed).permutation(np.unique(episodes))
    final = _fit(rows, seed)
    reference = float(final.log_heights.max())
    folds = []
    for fold in np.array_split(shuffled, min(_FOLDS, len(shuffled))):
        apart = np.isin(episodes, fold)
        others = ~apart if not apart.all() else apart  # one single episode can only be judged by itself
        folds.append(_fit(rows[others], seed).distances(rows[apart], reference))
    distance, outside = (np.concatenate(column) for column in zip(*folds, strict=True))
    distance_scale = max(conformal_quantile(distance, false_alarm_rate), 1.0)
    range_slack = max(conformal_quantile(outside, false_alarm_rate), 0.1)
    joint = np.maximum(distance / distance_scale, outside + 1.0 - range_slack)
    threshold = max(conformal_quantile(joint, false_alarm_rate), 1.0)
    return StateScore(final, distance_scale, range_slack), threshold


def conformal_quantile(scores: NDArray[np.floating], rate: float) -> float:
    """The ⌈(n+1)(1-rate)⌉-th smallest of n scores: a new exchangeable one exceeds it with probability ≤ rate.

    The largest score where n is too small for that.
    """
    ordered = np.sort(scores)
    return float(ordered[min(math.ceil((len(ordered) + 1) * (1.0 - rate)), len(ordered)) - 1])


def _fit(rows: Array, seed: int) -> _Fit:
    """Expectation maximisation in whitened space, from k-means++ seeds; the same for the same seed."""
    rng = np.random.default_rng(seed)
    count, dimension = rows.shape
    covariance = 0.999 * (rows.T @ rows) / count + 0.001 * np.eye(dimension)
    whitening = np.linalg.inv(np.linalg.cholesky(covariance)).T
    points = rows @ whitening
    centres = _seeds(points, rng)
    nearest = (points @ centres.T - 0.5 * np.square(centres).sum(axis=1)).argmax(axis=1)
    responsibilities = np.eye(len(centres))[nearest]
    for _ in range(_ITERATIONS):
        mass = responsibilities.sum(axis=0)
        centres = responsibilities.T @ points / np.maximum(mass, 1e-9)[:, None]
        deviations = points - centres[:, None]
        scatter = (deviations * responsibilities.T[:, :, None]).transpose(0, 2, 1) @ deviations
        # Shrunk towards the pooled scatter, as if O more rows had it, so that a thin component stays a full one.
        shrunk = (scatter + dimension * scatter.sum(axis=0) / count) / (mass + dimension)[:, None, None]
        factors = np.linalg.inv(np.linalg.cholesky(shrunk + 0.01 * np.eye(dimension)))
        log_heights = np.log((mass + 1.0) / (count + len(centres)))
        log_heights += np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(axis=1)
        residuals = deviations @ factors.transpose(0, 2, 1)
        logits = log_heights - 0.5 * np.square(residuals).sum(axis=2).T
        responsibilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        responsibilities /= responsibilities.sum(axis=1, keepdims=True)
    low, high = np.quantile(rows, _RANGE_QUANTILES, axis=0)
    return _Fit(
        projections=whitening @ factors.transpose(0, 2, 1),
        shifts=np.einsum("kpq,kq->kp", factors, centres),
        log_heights=log_heights,
        middles=(low + high) / 2.0,
        half_widths=(high - low) / 2.0,
    )


def _seeds(points: Array, rng: np.random.Generator) -> Array:
    """Far-apart rows (k-means++), fewer than K where the data has fewer distinct points."""
    sample = points[rng.permutation(len(points))[:_SEEDING_ROWS]]
    centres = sample[:1]
    squared = np.square(sample - sample[0]).sum(axis=1)
    while len(centres) < _COMPONENTS and squared.sum() > 1e-9 * len(sample):
        chosen = sample[rng.choice(len(sample), p=squared / squared.sum())]
        centres = np.concatenate([centres, chosen[None]])
        squared = np.minimum(squared, np.square(sample - chosen).sum(axis=1))
    return centres
