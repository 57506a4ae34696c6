"""Closed forms for a quadratic action value on one Gaussian mode.

Q(a) = c + b·a - a·Ha/2 and the mode N(μ, Σ). All arrays are float64: b, μ [A]; H, Σ [A, A].
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class QuadraticValue:
    """Q(a) = constant + slope·a - a·(curvature)a/2."""

    constant: float
    slope: Array
    curvature: Array

    def __call__(self, actions: Array) -> Array:
        """float64[..., A] -> float64[...]."""
        bent = np.einsum("...i,ij,...j->...", actions, self.curvature, actions)
        values: Array = self.constant + actions @ self.slope - 0.5 * bent
        return values


def hyper_value(value: QuadraticValue, mean: Array, covariance: Array) -> float:
    """E_{a~N(μ,Σ)} Q(a) = Q(μ) - tr(HΣ)/2."""
    return float(value(mean) - 0.5 * np.trace(value.curvature @ covariance))


def tilted_mode(
    value: QuadraticValue, mean: Array, covariance: Array, inverse_temperature: float
) -> tuple[Array, Array]:
    """Mean and covariance of N(μ, Σ)·exp(βQ), the optimum of weighted imitation without a clip.

    Σ* = (Σ⁻¹ + βH)⁻¹ and μ* = Σ*(Σ⁻¹μ + βb).
    """
    precision = np.linalg.inv(covariance)
    tilted_covariance = np.linalg.inv(precision + inverse_temperature * value.curvature)
    tilted_mean = tilted_covariance @ (precision @ mean + inverse_temperature * value.slope)
    return tilted_mean, tilted_covariance


def mean_weight(value: QuadraticValue, mean: Array, covariance: Array, inverse_temperature: float) -> float:
    """E_{a~N(μ,Σ)} exp(β(Q(a) - Q(μ))), the imitation weight to be expected with the mode's mean as baseline."""
    tilted_mean, tilted_covariance = tilted_mode(value, mean, covariance, inverse_temperature)
    exponent = 0.5 * tilted_mean @ np.linalg.solve(tilted_covariance, tilted_mean)
    exponent -= 0.5 * mean @ np.linalg.solve(covariance, mean)
    exponent -= inverse_temperature * (value(mean) - value.constant)
    return float(math.sqrt(np.linalg.det(tilted_covariance) / np.linalg.det(covariance)) * math.exp(exponent))


def clipped_target(
    value: QuadraticValue,
    mean: float,
    std: float,
    inverse_temperature: float,
    max_imitation_weight: float,
    baseline: float,
) -> float:
    """Σ w a / Σ w in one dimension with w = min(exp(β(Q(a) - baseline)), C), by quadrature over ±12 σ."""
    actions = mean + std * np.linspace(-12.0, 12.0, 200_001)
    density = np.exp(-0.5 * ((actions - mean) / std) ** 2)
    exponent = inverse_temperature * (value(actions[:, None]) - baseline)
    weights = density * np.exp(np.minimum(exponent, math.log(max_imitation_weight)))
    return float((weights * actions).sum() / weights.sum())


def clipped_fixed_point(
    value: QuadraticValue, mean: float, std: float, inverse_temperature: float, max_imitation_weight: float
) -> float:
    """The same with Q(π) as baseline, where π is itself the answer: iterated until it stands still."""
    action = mean
    for _ in range(1_000):
        baseline = float(value(np.array([action])))
        following = clipped_target(value, mean, std, inverse_temperature, max_imitation_weight, baseline)
        if abs(following - action) < 1e-9:
            return following
        action = following
    raise ArithmeticError(f"the fixed point was not reached within 1,000 iterations, last step to {action}")
