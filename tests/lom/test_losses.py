"""Hand-worked numbers, and gradients that reach what they must and stop where they must."""

import math

import pytest
import torch

from lom import losses


def test_sarsa_target_takes_the_minimum_over_critics_and_ignores_what_follows_a_terminal() -> None:
    rewards = torch.tensor([1.0, 1.0])
    discounts = torch.tensor([0.5, 0.0])
    next_values = torch.tensor([[10.0, 10.0], [4.0, 4.0]])
    targets = losses.sarsa_target(rewards, discounts, next_values)
    assert targets.tolist() == [3.0, 1.0]


def test_critic_loss_is_the_mean_over_rows_and_the_sum_over_critics() -> None:
    values = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    targets = torch.tensor([1.0, 1.0])
    assert losses.critic_loss(values, targets).item() == pytest.approx((0 + 4) / 2 + (1 + 1) / 2)


def test_hyper_critic_loss_is_the_mean_over_rows_and_components() -> None:
    assert losses.hyper_critic_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])).item() == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("advantage", "weight"),
    [(0.0, 1.0), (math.log(2.0) / 5, 2.0), (-math.log(2.0) / 5, 0.5), (1e6, 50.0), (-1e6, 0.0)],
)
def test_imitation_weights_are_the_clipped_exponential_advantage(advantage: float, weight: float) -> None:
    got = losses.imitation_weights(torch.tensor([advantage]), inverse_temperature=5.0, max_imitation_weight=50.0)
    assert got.item() == pytest.approx(weight, rel=1e-5)


def test_weighted_imitation_loss_by_hand_and_its_gradient() -> None:
    policy_actions = torch.tensor([[0.0, 0.0], [1.0, 1.0]], requires_grad=True)
    imitated = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    weights = torch.tensor([2.0, 0.0])
    loss = losses.weighted_imitation_loss(policy_actions, imitated, weights)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(0.5 * 2.0 * 0.5)
    assert policy_actions.grad is not None
    # d/dπ of w/B · mean_dim (π - â)² = w/B · 2/A · (π - â); the row without weight gets none.
    assert policy_actions.grad.tolist() == [[-1.0, 0.0], [0.0, 0.0]]


def test_weighted_regression_finds_the_tilted_mean_of_the_closed_form() -> None:
    """Q(a) = 2a - a²/2 on N(0.2, 0.15²), β = 5: without clip the optimum is 0.38202, with C = 2 it is 0.29259."""
    generator = torch.Generator().manual_seed(0)
    samples = 0.2 + 0.15 * torch.randn(2_000_000, generator=generator, dtype=torch.float64)

    def value(action: torch.Tensor) -> torch.Tensor:
        return 2 * action - action.square() / 2

    advantages = value(samples) - value(torch.tensor(0.2, dtype=torch.float64))
    for clip, optimum in ((50.0, 0.38092), (2.0, 0.29259), (1.0, 0.26331)):
        weights = losses.imitation_weights(advantages, 5.0, clip).double()
        assert float((weights * samples).sum() / weights.sum()) == pytest.approx(optimum, abs=1e-3)
        assert float(weights.min()) >= 0.0
        assert float(weights.max()) <= clip * (1 + 1e-6)
