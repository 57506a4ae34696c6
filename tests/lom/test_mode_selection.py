import math

import pytest
import torch

from lom.mode_selection import behaviour_value, gather_component, hyper_spread, select_mode


def test_an_unsupported_component_is_never_chosen_however_high_its_hyper_q() -> None:
    hyper_q = torch.tensor([[1.0, 2.0, 99.0]])
    weights = torch.tensor([[0.48, 0.48, 0.04]])
    choice = select_mode(hyper_q, weights, min_mixing_weight=0.05)
    assert choice.mode.item() == 1
    assert choice.margin.item() == 1.0  # the excluded component is no runner-up either
    assert choice.overruled.item()


def test_with_the_mask_off_the_plain_argmax_wins() -> None:
    choice = select_mode(torch.tensor([[1.0, 2.0, 99.0]]), torch.tensor([[0.5, 0.5, 0.0]]), min_mixing_weight=0.0)
    assert choice.mode.item() == 2
    assert not choice.overruled.item()


def test_the_heaviest_component_stays_allowed_when_none_passes_and_has_no_runner_up() -> None:
    choice = select_mode(torch.tensor([[5.0, 0.0, 9.0]]), torch.tensor([[0.3, 0.4, 0.3]]), min_mixing_weight=0.9)
    assert choice.mode.item() == 1
    assert math.isnan(choice.margin.item())


def test_a_component_exactly_on_the_threshold_is_allowed() -> None:
    choice = select_mode(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.75, 0.25]]), min_mixing_weight=0.25)
    assert choice.mode.item() == 1


def test_a_single_component_is_chosen_without_margin() -> None:
    choice = select_mode(torch.tensor([[3.0], [4.0]]), torch.ones(2, 1), min_mixing_weight=0.05)
    assert choice.mode.tolist() == [0, 0]
    assert torch.isnan(choice.margin).all()


def test_gather_component_takes_each_rows_own_component() -> None:
    parameters = torch.arange(12.0).view(2, 3, 2)
    assert gather_component(parameters, torch.tensor([2, 0])).tolist() == [[4.0, 5.0], [6.0, 7.0]]


def test_spread_by_hand() -> None:
    """Weights 3/4 and 1/4, values 1 and 5: the behaviour has 2, advantages are -1 and 3, the mean square 3/4 + 9/4."""
    weights = torch.tensor([[0.75, 0.25]])
    assert hyper_spread(torch.tensor([[1.0, 5.0]]), weights).item() == pytest.approx(3**0.5)
    two_runs = torch.tensor([[[1.0, 5.0]], [[1.0, 1.0]]])
    assert hyper_spread(two_runs, weights.expand(2, 1, 2)).tolist() == pytest.approx([3**0.5, 0.0])


def test_value_of_the_behaviour_by_hand() -> None:
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    assert behaviour_value(torch.tensor([[1.0, 5.0], [4.0, 6.0]]), weights).tolist() == [[2.0], [5.0]]
