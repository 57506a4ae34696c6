"""The first three experiments, small: each stage finds the answer that is known."""

import numpy as np
import pytest
import torch

from lom.study.experiments import (
    SyntheticModes,
    fit_synthetic_mixture,
    improve_on_mode,
    learn_double_circle,
    select_in_linear_quadratic,
)


@pytest.mark.parametrize(
    ("modes", "separation", "steps"), [(1, 4.0, 800), (2, 2.0, 800), (4, 6.0, 1200), (8, 6.0, 3000)]
)
def test_the_mixture_identifies_the_modes_of_synthetic_data(modes: int, separation: float, steps: int) -> None:
    """With twice as many components as modes: what is left over must not hurt."""
    fit = fit_synthetic_mixture(modes=modes, separation=separation, num_components=2 * modes, steps=steps)
    assert -0.01 < fit.nll_gap < 0.05  # below the truth only by chance
    assert fit.worst_mean_distance < 0.5


def test_synthetic_modes_lie_as_far_apart_as_they_say() -> None:
    truth = SyntheticModes(modes=5, separation=3.0).parameters(torch.tensor([[0.3]]))
    between = torch.cdist(truth.means[0], truth.means[0]) / 0.08
    assert between[0, 1].item() == pytest.approx(3.0, rel=1e-5)
    assert truth.log_weights.exp().sum().item() == pytest.approx(1.0, rel=1e-5)


def test_hyper_q_selects_the_optimal_modes_of_a_problem_with_exact_values() -> None:
    result = select_in_linear_quadratic()
    assert result.agreement > 0.95
    assert result.behaviour_value == pytest.approx(result.exact_behaviour_value, abs=4 * result.standard_error)
    assert result.greedy_value > result.exact_behaviour_value + 10 * result.standard_error  # Theorem 1
    # Theorem 1's value comes from a ranking; the values themselves are right too, where data is.
    inside = np.abs(result.states) < 1.0
    spread = np.abs(result.exact_advantage).max()
    assert np.abs(result.learned_advantage - result.exact_advantage)[inside].max() < 0.15 * spread


def test_weighted_imitation_moves_the_mode_to_the_closed_form() -> None:
    result = improve_on_mode()
    assert result.greedy_action == pytest.approx(result.mode_mean, abs=0.02)
    assert result.actor_action == pytest.approx(result.tilted_mean, abs=0.03)
    assert result.greedy_reward + 0.05 < result.actor_reward < result.best_reward
    assert result.actor_reward == pytest.approx(result.tilted_reward, abs=0.04)


def test_on_the_double_circle_lom_keeps_to_the_good_branches_where_cloning_leaves_the_data() -> None:
    result = learn_double_circle()
    assert result.rewards["behaviour"] == pytest.approx(0.5, abs=0.03)
    assert result.rewards["actor"] > 0.95
    assert result.rewards["greedy_mode"] > 0.95
    assert result.rewards["bc"] < 0.6
    assert result.distances["actor"] < 0.75 * result.distances["bc"]
