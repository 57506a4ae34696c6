"""The closed forms against samples, quadrature and the golden numbers, and the losses against the closed forms."""

import numpy as np
import pytest
import torch

from lom.losses import hyper_critic_loss, imitation_weights, weighted_imitation_loss
from lom.study.quadratic import (
    QuadraticValue,
    clipped_fixed_point,
    clipped_target,
    hyper_value,
    mean_weight,
    tilted_mode,
)

# mu 0.2, sigma 0.15, b 2, H 1, beta 5: the golden mode.
GOLDEN = QuadraticValue(constant=0.0, slope=np.array([2.0]), curvature=np.array([[1.0]]))
MEAN, STD, BETA = 0.2, 0.15, 5.0

PLANAR = QuadraticValue(constant=0.7, slope=np.array([1.0, -0.5]), curvature=np.array([[2.0, 0.3], [0.3, 1.0]]))
PLANAR_MEAN = np.array([0.1, -0.2])
PLANAR_COVARIANCE = np.array([[0.04, 0.01], [0.01, 0.02]])


@pytest.fixture(scope="module")
def samples() -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.random.default_rng(0).multivariate_normal(PLANAR_MEAN, PLANAR_COVARIANCE, 1_000_000)


def test_a_value_by_hand() -> None:
    """0.7 + 1·1 - 0.5·2 - (2·1 + 2·0.3·2 + 1·4)/2."""
    assert float(PLANAR(np.array([1.0, 2.0]))) == pytest.approx(0.7 + 1.0 - 1.0 - 3.6)


def test_hyper_q_is_the_mean_value_of_the_mode(samples: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    values = PLANAR(samples)
    standard_error = values.std() / np.sqrt(len(values))
    assert hyper_value(PLANAR, PLANAR_MEAN, PLANAR_COVARIANCE) == pytest.approx(values.mean(), abs=5 * standard_error)
    linear = QuadraticValue(constant=0.0, slope=np.array([1.0, 2.0]), curvature=np.zeros((2, 2)))
    assert hyper_value(linear, PLANAR_MEAN, PLANAR_COVARIANCE) == pytest.approx(float(linear(PLANAR_MEAN)))


def test_one_sample_targets_converge_to_hyper_q_with_the_root_of_the_visits() -> None:
    """The minimiser of eq. 17 over one number is the mean of its one-sample targets."""
    exact = hyper_value(PLANAR, PLANAR_MEAN, PLANAR_COVARIANCE)
    rng = np.random.default_rng(1)
    scaled_errors = []
    for visits in (100, 10_000, 1_000_000):
        targets = PLANAR(rng.multivariate_normal(PLANAR_MEAN, PLANAR_COVARIANCE, visits))
        estimate = torch.tensor([[targets.mean()]], requires_grad=True)
        loss = hyper_critic_loss(estimate.expand(visits, 1), torch.from_numpy(targets).unsqueeze(1))
        (gradient,) = torch.autograd.grad(loss, estimate)
        assert abs(gradient.item()) < 1e-9
        scaled_errors.append(abs(targets.mean() - exact) * np.sqrt(visits) / targets.std())
    assert max(scaled_errors) < 4.0


def test_the_tilted_mode_and_the_mean_weight_are_those_of_weighted_samples(
    samples: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
) -> None:
    advantages = torch.from_numpy(PLANAR(samples) - PLANAR(PLANAR_MEAN))
    weights = imitation_weights(advantages, BETA, torch.inf).numpy()
    mean, covariance = tilted_mode(PLANAR, PLANAR_MEAN, PLANAR_COVARIANCE, BETA)
    assert weights @ samples / weights.sum() == pytest.approx(mean, abs=2e-3)
    centred = samples - mean
    assert (centred.T * weights) @ centred / weights.sum() == pytest.approx(covariance, abs=1e-3)
    assert mean_weight(PLANAR, PLANAR_MEAN, PLANAR_COVARIANCE, BETA) == pytest.approx(weights.mean(), rel=0.01)


def test_on_a_linear_value_the_mean_moves_by_beta_times_covariance_times_slope() -> None:
    linear = QuadraticValue(constant=0.0, slope=np.array([1.0, 2.0]), curvature=np.zeros((2, 2)))
    mean, covariance = tilted_mode(linear, PLANAR_MEAN, PLANAR_COVARIANCE, BETA)
    assert mean == pytest.approx(PLANAR_MEAN + BETA * PLANAR_COVARIANCE @ linear.slope)
    assert covariance == pytest.approx(PLANAR_COVARIANCE)


def test_the_unclipped_golden_optimum() -> None:
    mean, _ = tilted_mode(GOLDEN, np.array([MEAN]), np.array([[STD**2]]), BETA)
    assert mean[0] == pytest.approx(0.38202, abs=5e-6)


@pytest.mark.parametrize(
    ("clip", "with_mode_mean", "with_policy"),
    [(50.0, 0.38092, 0.38202), (2.0, 0.29259, 0.34563), (1.0, 0.26331, 0.30107)],
)
def test_the_clipped_golden_optima(clip: float, with_mode_mean: float, with_policy: float) -> None:
    baseline = float(GOLDEN(np.array([MEAN])))
    assert clipped_target(GOLDEN, MEAN, STD, BETA, clip, baseline) == pytest.approx(with_mode_mean, abs=6e-6)
    assert clipped_fixed_point(GOLDEN, MEAN, STD, BETA, clip) == pytest.approx(with_policy, abs=6e-6)


def test_without_a_clip_the_baseline_does_not_matter() -> None:
    targets = [clipped_target(GOLDEN, MEAN, STD, BETA, 1e300, baseline) for baseline in (-1.0, 0.0, 0.38, 5.0)]
    assert targets == pytest.approx([0.38202] * 4, abs=5e-6)


@pytest.mark.parametrize(("clip", "optimum"), [(50.0, 0.38092), (2.0, 0.29259), (1.0, 0.26331)])
def test_the_loss_has_no_gradient_at_the_golden_optimum_and_one_beside_it(clip: float, optimum: float) -> None:
    generator = torch.Generator().manual_seed(0)
    sampled = MEAN + STD * torch.randn(1_000_000, 1, generator=generator, dtype=torch.float64)
    values = torch.from_numpy(GOLDEN(sampled.numpy()))
    weights = imitation_weights(values - float(GOLDEN(np.array([MEAN]))), BETA, clip)
    assert 0.0 <= weights.min() <= weights.max() <= clip * (1 + 1e-6)

    def gradient(action: float) -> float:
        policy = torch.tensor([[action]], dtype=torch.float64, requires_grad=True)
        loss = weighted_imitation_loss(policy.expand(len(sampled), 1), sampled, weights)
        return float(torch.autograd.grad(loss, policy)[0].item())

    slope = 2 * float(weights.mean())  # of the gradient in the action
    assert gradient(optimum) / slope == pytest.approx(0.0, abs=1e-3)
    assert gradient(optimum + 0.01) / slope == pytest.approx(0.01, abs=1e-3)
    assert gradient(optimum - 0.01) / slope == pytest.approx(-0.01, abs=1e-3)


def test_at_temperature_zero_the_optimum_is_the_mode_mean() -> None:
    assert clipped_target(GOLDEN, MEAN, STD, 0.0, 50.0, 0.0) == pytest.approx(MEAN, abs=1e-9)
    assert imitation_weights(torch.tensor([-3.0, 0.0, 9.0]), 0.0, 50.0).tolist() == [1.0, 1.0, 1.0]
