"""Ways to choose a mode, by hand and in closed form."""

import numpy as np
import pytest
import torch

from lom.study.hyper_policies import RULES, greedy, rules, value_of_noisy_choice, value_of_random_share

BANDIT4 = np.array([3.0, 0.0, 1.5, 5.0])


def test_every_rule_by_hand() -> None:
    """Four components on a line; the third has the highest hyper-Q but almost no weight, the second the most."""
    answer = {
        "hyper_q": torch.tensor([[2.0, 1.0, 9.0, 3.0]]),
        "mixing_weights": torch.tensor([[0.3, 0.4, 0.01, 0.29]]),
        "component_means": torch.tensor([[[0.0], [0.5], [0.6], [-1.0]]]),
    }
    found = rules(answer, torch.tensor([[0.7]]), 0.05)
    assert tuple(found) == RULES
    third = pytest.approx(1 / 3)
    assert found["random_uniform"].tolist() == [[third, third, 0.0, third]]
    assert found["random_alpha"].tolist() == answer["mixing_weights"].tolist()
    assert found["max_alpha"].tolist() == [[0, 1, 0, 0]]
    assert found["hyper_q"].tolist() == [[0, 0, 0, 1]]
    assert found["oracle"].tolist() == [[0, 1, 0, 0]]  # the nearest of those that may be chosen
    assert found["worst"].tolist() == [[0, 1, 0, 0]]


def test_a_random_share_moves_the_value_on_a_straight_line() -> None:
    assert [value_of_random_share(BANDIT4, share) for share in (0.0, 0.5, 1.0)] == [5.0, 3.6875, 2.375]


@pytest.mark.parametrize(
    ("noise_std", "value"),
    [(1e-3, 5.0), (0.5, 4.995), (1.0, 4.829), (2.0, 4.259), (4.0, 3.498), (8.0, 2.961), (1e6, 2.375)],
)
def test_the_value_of_a_noisy_choice(noise_std: float, value: float) -> None:
    """Figures worked out independently, and both limits: the best mode, and any."""
    assert value_of_noisy_choice(BANDIT4, noise_std) == pytest.approx(value, abs=5e-4)


def test_two_modes_under_noise_in_closed_form() -> None:
    """The better one of 1 and 0 wins where N(0, 2σ²) exceeds -1: Φ(1 / (σ √2))."""
    expected = float(torch.special.ndtr(torch.tensor(1 / (0.7 * 2**0.5), dtype=torch.float64)))
    assert value_of_noisy_choice(np.array([0.0, 1.0]), 0.7) == pytest.approx(expected, abs=1e-7)


def test_noise_through_the_choice_that_acts_follows_the_curve() -> None:
    rows = 200_000
    values = torch.from_numpy(BANDIT4).float().expand(rows, -1)
    noise = 2.0 * torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    chosen = greedy(values + noise, torch.full_like(values, 0.25), 0.05)
    earned = (chosen * values).sum(dim=1)
    standard_error = float(earned.std()) / rows**0.5
    assert float(earned.mean()) == pytest.approx(value_of_noisy_choice(BANDIT4, 2.0), abs=4 * standard_error)
