"""Theorems 1 and 2 on random tabular MDPs with exact values, through the code that training uses."""

from itertools import product

import pytest
import torch
from torch import Tensor

from lom.mode_selection import select_mode
from lom.study.tabular import (
    TabularMDP,
    composite_policy,
    deterministic_policy,
    hyper_values,
    random_problem,
    tilted_policy,
    worst_choice,
)

ROUNDING = 1e-8


def greedy(mdp: TabularMDP, modes: Tensor, weights: Tensor, min_mixing_weight: float = 0.0) -> Tensor:
    """π_{ζ_g}: the greedy hyper-policy with respect to the behaviour's own hyper-Q."""
    behaviour = composite_policy(weights, modes)
    chosen = select_mode(hyper_values(mdp.action_values(behaviour), modes), weights, min_mixing_weight).mode
    return deterministic_policy(chosen, modes)


@pytest.fixture(scope="module")
def problems() -> list[tuple[TabularMDP, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [random_problem(generator) for _ in range(1000)]


def test_values_of_a_two_state_chain_by_hand() -> None:
    """s0 → s1 with reward 1, s1 stays with reward 2, γ = 0.5: V(s1) = 4, V(s0) = 1 + 0.5 · 4."""
    moves = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]], dtype=torch.float64)
    mdp = TabularMDP(transitions=moves, rewards=torch.tensor([[1.0], [2.0]], dtype=torch.float64), discount=0.5)
    assert mdp.values(torch.ones(2, 1, dtype=torch.float64)).tolist() == [3.0, 4.0]


def test_theorem_1_the_greedy_hyper_policy_is_nowhere_worse_than_the_behaviour(
    problems: list[tuple[TabularMDP, Tensor, Tensor]],
) -> None:
    better = 0
    for mdp, modes, weights in problems:
        gain = mdp.values(greedy(mdp, modes, weights)) - mdp.values(composite_policy(weights, modes))
        assert gain.min() >= -ROUNDING
        better += int(gain.max() > 0.01)
    assert better > 900  # the theorem is not met by standing still


def test_theorem_1_holds_behind_the_support_mask_too(problems: list[tuple[TabularMDP, Tensor, Tensor]]) -> None:
    """Masking restricts the choice; Σ_u α_u Q_H(u) over the allowed ones need not reach V^b, the heaviest might be
    the worst. What stays: a mask below every mixing weight changes nothing."""
    for mdp, modes, weights in problems[:200]:
        below = float(weights.min()) * 0.5
        assert torch.equal(greedy(mdp, modes, weights, below), greedy(mdp, modes, weights))


def test_a_component_without_weight_is_chosen_only_when_the_mask_is_off() -> None:
    """Its hyper-Q is the best there is; with exact values choosing it is right, with learned ones it is a guess."""
    moves = torch.ones(1, 2, 1, dtype=torch.float64)
    mdp = TabularMDP(transitions=moves, rewards=torch.tensor([[0.0, 1.0]], dtype=torch.float64), discount=0.5)
    modes = torch.eye(2, dtype=torch.float64).unsqueeze(0)
    weights = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert mdp.values(greedy(mdp, modes, weights, 0.0)).item() == pytest.approx(2.0)
    assert mdp.values(greedy(mdp, modes, weights, 0.05)).item() == pytest.approx(0.0)


@pytest.mark.parametrize("inverse_temperature", [0.5, 5.0])
def test_theorem_2_with_the_advantage_of_the_greedy_hyper_policy(
    problems: list[tuple[TabularMDP, Tensor, Tensor]], inverse_temperature: float
) -> None:
    for mdp, modes, weights in problems:
        chosen = greedy(mdp, modes, weights)
        learned = tilted_policy(chosen, mdp.action_values(chosen), inverse_temperature)
        assert (mdp.values(learned) - mdp.values(chosen)).min() >= -ROUNDING


def test_with_the_behaviours_advantage_only_the_behaviour_is_a_floor(
    problems: list[tuple[TabularMDP, Tensor, Tensor]],
) -> None:
    """What Algorithm 1 and the authors' code do. V^L ≥ V^b holds; V^L ≥ V^{ζ_g} fails now and then."""
    below_greedy = 0
    for mdp, modes, weights in problems:
        behaviour = composite_policy(weights, modes)
        chosen = greedy(mdp, modes, weights)
        learned = tilted_policy(chosen, mdp.action_values(behaviour), 1.0)
        assert (mdp.values(learned) - mdp.values(behaviour)).min() >= -ROUNDING
        below_greedy += int((mdp.values(learned) - mdp.values(chosen)).min() < -1e-3)
    assert 0 < below_greedy < 50


def test_the_counterexample_to_theorem_2_as_coded_and_what_restores_it() -> None:
    """γ 0.9, β 1; s0: a0 stays (+2), a1 → s1 (-2); s1: a0 stays (0), a1 → s0 (-2). Mode 1 plays a0 with 1.0 and 0.9,
    mode 2 with 0.0 and 0.8; both weigh 1/2. All values were worked out independently."""
    stay_or_cross = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    mdp = TabularMDP(
        transitions=stay_or_cross,
        rewards=torch.tensor([[2.0, -2.0], [0.0, -2.0]], dtype=torch.float64),
        discount=0.9,
    )
    first = torch.tensor([[1.0, 0.0], [0.9, 0.8]], dtype=torch.float64)
    modes = torch.stack([first, 1 - first], dim=-1)
    weights = torch.full((2, 2), 0.5, dtype=torch.float64)
    behaviour, chosen = composite_policy(weights, modes), greedy(mdp, modes, weights)
    assert mdp.values(behaviour).tolist() == pytest.approx([-1.971, -2.409], abs=5e-4)
    assert chosen[:, 0].tolist() == pytest.approx([1.0, 0.9])
    assert mdp.values(chosen).tolist() == pytest.approx([20.0, 8.421], abs=5e-4)
    as_coded = tilted_policy(chosen, mdp.action_values(behaviour), 1.0)
    assert mdp.values(as_coded).tolist() == pytest.approx([20.0, 2.918], abs=5e-4)  # below 8.421
    hyper = tilted_policy(chosen, mdp.action_values(chosen), 1.0)
    assert mdp.values(hyper).tolist() == pytest.approx([20.0, 15.997], abs=5e-4)


@pytest.mark.parametrize("error", [0.01, 0.3, 3.0])
def test_an_error_of_hyper_q_costs_at_most_twice_its_size_over_one_minus_discount(
    problems: list[tuple[TabularMDP, Tensor, Tensor]], error: float
) -> None:
    """Not even the worst choice that such an error can lead to costs more, and random errors cost no more than that."""
    generator = torch.Generator().manual_seed(1)
    for mdp, modes, weights in problems[:200]:
        behaviour = composite_policy(weights, modes)
        exact = hyper_values(mdp.action_values(behaviour), modes)
        worst = mdp.values(deterministic_policy(worst_choice(mdp, modes, exact, error), modes))
        assert (worst - mdp.values(behaviour)).min() >= -2 * error / (1 - mdp.discount) - ROUNDING
        noise = error * (2 * torch.rand(exact.shape, generator=generator, dtype=torch.float64) - 1)
        chosen = select_mode(exact + noise, weights, 0.0).mode
        assert (mdp.values(deterministic_policy(chosen, modes)) - worst).min() >= -ROUNDING


def test_the_worst_choice_is_the_worst_of_all_that_an_error_can_bring_about(
    problems: list[tuple[TabularMDP, Tensor, Tensor]],
) -> None:
    """Against every choice of reachable modes, one by one."""
    for mdp, modes, weights in [each for each in problems if each[1].shape[1] ** len(each[1]) <= 128][:30]:
        exact = hyper_values(mdp.action_values(composite_policy(weights, modes)), modes)
        reachable = [[mode for mode, value in enumerate(values) if value >= values.max() - 2 * 0.5] for values in exact]
        least = torch.stack(
            [mdp.values(deterministic_policy(torch.tensor(choice), modes)) for choice in product(*reachable)]
        ).amin(dim=0)
        found = mdp.values(deterministic_policy(worst_choice(mdp, modes, exact, 0.5), modes))
        assert found.tolist() == pytest.approx(least.tolist(), abs=1e-7)


def test_the_bound_on_the_cost_of_an_error_is_met_exactly_by_one_problem() -> None:
    """One state, γ 0.9; the behaviour always takes mode 0, which pays 0; mode 1 pays -0.2. An error of 0.1 makes both
    look alike, and the worst choice then pays -0.2 for ever: -2 · 0.1 / (1 - 0.9) below the behaviour."""
    mdp = TabularMDP(
        transitions=torch.ones(1, 2, 1, dtype=torch.float64),
        rewards=torch.tensor([[0.0, -0.2]], dtype=torch.float64),
        discount=0.9,
    )
    modes = torch.eye(2, dtype=torch.float64).unsqueeze(0)
    behaviour = composite_policy(torch.tensor([[1.0, 0.0]], dtype=torch.float64), modes)
    exact = hyper_values(mdp.action_values(behaviour), modes)
    misled = worst_choice(mdp, modes, exact, 0.1)
    assert misled.tolist() == [1]
    assert mdp.values(deterministic_policy(misled, modes)).item() == pytest.approx(-2.0)
    assert worst_choice(mdp, modes, exact, 0.099).tolist() == [0]


def test_imitating_the_mean_is_only_safe_where_the_value_is_concave_on_the_mode() -> None:
    """A deterministic policy keeps E[Q] only by Jensen. Q(a) = a² on N(0, 0.5²), a convex value: the tilted density
    is better than the mode, its mean 0 is worse than both."""
    actions = torch.linspace(-6, 6, 60_001, dtype=torch.float64)
    density = torch.exp(-0.5 * (actions / 0.5) ** 2).unsqueeze(0)
    density = density / density.sum()
    value = actions.square().unsqueeze(0)
    tilted = tilted_policy(density, value, 1.0)
    mode, learned = (float((p * value).sum()) for p in (density, tilted))
    imitated = float((tilted * actions).sum()) ** 2
    assert mode == pytest.approx(0.25, abs=1e-4)
    assert learned == pytest.approx(0.5, abs=1e-4)  # 1/σ*² = 1/0.25 - 2
    assert imitated < 1e-12
