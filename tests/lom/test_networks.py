import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lom.networks import LOG_STD_MAX, LOG_STD_MIN, BehaviourMixture, Critic, Mixture, OneHotHyperCritic


def two_clusters(rows: int = 2000) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    side = torch.where(torch.rand(rows, 1, generator=generator) < 0.5, -0.6, 0.6)
    return torch.zeros(rows, 1), side + 0.05 * torch.randn(rows, 1, generator=generator)


def fit(mixture: BehaviourMixture, loss_of: "type[Loss]", steps: int = 400) -> Mixture:
    observations, actions = two_clusters()
    mixture.initialise_means(actions, torch.Generator().manual_seed(1))
    optimiser = torch.optim.Adam(mixture.parameters(), lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        loss_of.of(mixture, observations, actions).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    with torch.no_grad():
        result: Mixture = mixture(observations[:1])
    return result


class Loss:
    @staticmethod
    def of(mixture: BehaviourMixture, observations: Tensor, actions: Tensor) -> Tensor:
        return mixture.negative_log_likelihood(observations, actions)


class LossWithoutLogsumexp(Loss):
    """The authors' code until November 2024: every component is fitted to all of the data."""

    @staticmethod
    def of(mixture: BehaviourMixture, observations: Tensor, actions: Tensor) -> Tensor:
        parameters: Mixture = mixture(observations)
        standardised = (actions.unsqueeze(1) - parameters.means) * torch.exp(-parameters.log_stds)
        component = -(0.5 * standardised.square() + parameters.log_stds).sum(dim=-1)
        return -(component + parameters.log_weights).mean()


def test_responsibilities_by_hand() -> None:
    """At the middle of two means that are 0.4 apart both bring forth with their weight; at one mean, the other's
    share is 1/3 exp(-0.4²/(2·0.2²)) = 1/3 exp(-2) of the whole."""
    mixture = Mixture(
        torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[[0.1], [0.5]]]), torch.full((1, 2, 1), math.log(0.2))
    )
    assert mixture.responsibilities(torch.tensor([[0.3]])).numpy() == pytest.approx(np.array([[0.75, 0.25]]))
    other = math.exp(-2.0) / 3
    at_first = mixture.responsibilities(torch.tensor([[0.1]]))[0, 1].item()
    assert at_first == pytest.approx(other / (1 + other))


def test_one_component_brought_forth_every_action() -> None:
    """So that imitating the data's actions with one component is advantage-weighted regression."""
    mixture = Mixture(torch.zeros(2, 1), torch.zeros(2, 1, 1), torch.full((2, 1, 1), -5.0))
    assert mixture.responsibilities(torch.tensor([[0.001], [0.99]])).tolist() == [[1.0], [1.0]]


def test_log_prob_of_a_mixture_by_hand() -> None:
    mixture = Mixture(
        log_weights=torch.log(torch.tensor([[0.25, 0.75]])),
        means=torch.tensor([[[0.0], [0.5]]]),
        log_stds=torch.log(torch.tensor([[[0.1], [0.2]]])),
    )
    expected = 0.25 * math.exp(-0.5) / (0.1 * math.sqrt(2 * math.pi)) + 0.75 * math.exp(-2.0) / (
        0.2 * math.sqrt(2 * math.pi)
    )
    assert mixture.log_prob(torch.tensor([[0.1]])).item() == pytest.approx(math.log(expected), rel=1e-5)


def mixture_of(weights: list[float], means: list[list[float]], stds: list[list[float]]) -> Mixture:
    return Mixture(
        log_weights=torch.tensor([weights]).log(),
        means=torch.tensor([means]),
        log_stds=torch.tensor([stds]).clamp(min=1e-9).log(),
    )


def shares_of(weights: list[float], means: list[list[float]], stds: list[list[float]]) -> list[float]:
    (shares,) = mixture_of(weights, means, stds).log_shares().exp().tolist()
    return list(shares)


def test_a_mode_apart_is_as_usual_as_its_weight_says() -> None:
    shares = shares_of([0.9, 0.1], [[-0.5, 0.5], [0.5, 0.5]], [[0.01, 0.01], [0.01, 0.01]])
    assert shares == pytest.approx([0.9, 0.1], abs=1e-4)


def test_modes_that_overlap_vouch_for_each_other() -> None:
    """Two halves of one mode are as usual as the whole one beside them; at √2 times the widened width,
    √(0.03 + 0.1²) = 0.2, each does exp(-1) of what the other does."""
    halves = shares_of([0.25, 0.5, 0.25], [[-0.5], [0.5], [-0.5]], [[0.1], [0.1], [0.1]])
    assert halves == pytest.approx([0.5, 0.5, 0.5], abs=1e-4)
    width, near, shared = math.sqrt(0.03), 0.2 * math.sqrt(2.0), math.exp(-1.0)
    pair = shares_of([0.8, 0.2], [[0.0], [near]], [[width], [width]])
    assert pair == pytest.approx([0.8 + 0.2 * shared, 0.2 + 0.8 * shared], abs=1e-4)


def test_an_exact_controller_is_as_usual_as_a_noisy_one() -> None:
    shares = shares_of([0.5, 0.5], [[-0.5] * 3, [0.9] * 3], [[0.0] * 3, [0.2] * 3])
    assert shares == pytest.approx([0.5, 0.5], abs=1e-4)


def test_a_wide_mode_vouches_for_what_lies_within_it() -> None:
    """A poor policy, σ = 0.3, around an exact one two σ away: exp(-2) of it does the same; not the other way round."""
    shares = shares_of([0.99, 0.01], [[0.0], [0.6]], [[math.sqrt(0.08)], [0.0]])
    assert shares == pytest.approx([0.99, 0.01 + 0.99 * math.exp(-2.0)], abs=1e-4)


def test_two_clusters_get_a_component_each() -> None:
    torch.manual_seed(0)
    parameters = fit(BehaviourMixture(1, 1, 2, (16,)), Loss)
    assert sorted(parameters.means.flatten().tolist()) == pytest.approx([-0.6, 0.6], abs=0.02)
    assert parameters.log_weights.exp().flatten().tolist() == pytest.approx([0.5, 0.5], abs=0.05)
    assert parameters.log_stds.exp().flatten().tolist() == pytest.approx([0.05, 0.05], abs=0.01)


def test_without_logsumexp_the_same_data_gives_no_mixture() -> None:
    """Guards the test above: it would not notice the trap if this loss passed it."""
    torch.manual_seed(0)
    parameters = fit(BehaviourMixture(1, 1, 2, (16,)), LossWithoutLogsumexp)
    assert parameters.means.abs().max().item() < 0.2


def test_log_stds_stay_inside_their_bounds_and_keep_a_gradient_at_extreme_inputs() -> None:
    mixture = BehaviourMixture(1, 1, 2, (4,))
    for raw in (-8.0, 8.0):
        with torch.no_grad():
            mixture.raw_log_stds.weight.zero_()
            mixture.raw_log_stds.bias.fill_(raw)
        parameters: Mixture = mixture(torch.zeros(3, 1))
        assert parameters.log_stds.min().item() >= LOG_STD_MIN
        assert parameters.log_stds.max().item() <= LOG_STD_MAX
        mixture.zero_grad()
        parameters.log_stds.sum().backward()  # type: ignore[no-untyped-call]
        assert mixture.raw_log_stds.bias.grad is not None
        assert (mixture.raw_log_stds.bias.grad.abs() > 0).all()


def test_means_start_at_far_apart_actions_of_the_data() -> None:
    """Four corners, one of them rare: k-means++ seeds find all four, default initialisation starts at the middle."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([[-0.8, 0.8], [-0.8, -0.8], [0.8, 0.8], [0.8, -0.8]])
    which = torch.multinomial(torch.tensor([0.45, 0.1, 0.4, 0.05]), 2000, replacement=True, generator=generator)
    actions = corners[which] + 0.05 * torch.randn(2000, 2, generator=generator)
    torch.manual_seed(0)
    mixture = BehaviourMixture(1, 2, 4, (64, 64))
    mixture.initialise_means(actions, generator)
    with torch.no_grad():
        means = mixture(torch.zeros(1, 1)).means[0]
    assert (torch.cdist(corners, means).amin(dim=1) < 0.3).all()


def test_actions_on_the_bounds_and_a_constant_action_dimension_give_finite_losses() -> None:
    mixture = BehaviourMixture(1, 2, 3, (8,))
    actions = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).repeat(8, 1)
    mixture.initialise_means(actions, torch.Generator().manual_seed(0))
    loss = mixture.negative_log_likelihood(torch.zeros(16, 1), actions)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in mixture.parameters())


def test_log_prob_near_a_bound_by_hand() -> None:
    """Beyond 0.95 stands all that lies there: half of N(0.95, 0.1²), and Φ(1.5) of N(-0.8, 0.1²) above -0.95 is inside.

    The second dimension is inside the margin in all three rows and keeps its density.
    """
    mixture = Mixture(
        torch.zeros(3, 1),
        torch.tensor([[[0.95, 0.0]], [[0.95, 0.0]], [[-0.8, 0.0]]]),
        torch.full((3, 1, 2), math.log(0.1)),
    )
    density = 1 / (0.1 * math.sqrt(2 * math.pi))
    expected = [0.5 * density, density * math.exp(-0.5) * density, (1 - 0.9331928) * density]
    actions = torch.tensor([[1.0, 0.0], [0.85, 0.0], [-0.97, 0.0]])
    assert mixture.log_prob(actions, 0.05).exp().tolist() == pytest.approx(expected, rel=1e-5)


def test_a_component_that_is_far_from_a_bound_keeps_a_gradient_there() -> None:
    means = torch.full((1, 1, 1), -0.99, requires_grad=True)
    Mixture(torch.zeros(1, 1), means, torch.full((1, 1, 1), -5.0)).log_prob(torch.ones(1, 1), 0.05).backward()  # type: ignore[no-untyped-call]
    assert means.grad is not None
    assert math.isfinite(means.grad.item())
    assert means.grad.item() > 1.0


def clipped_at_a_bound(rows: int = 2000) -> tuple[Tensor, Tensor]:
    """Full speed ahead, to the left or to the right: half of the noise on the speed is clipped."""
    generator = torch.Generator().manual_seed(0)
    side = torch.where(torch.rand(rows, generator=generator) < 0.5, -0.4, 0.4)
    noise = 0.15 * torch.randn(rows, 2, generator=generator)
    actions = torch.stack([1.0 + noise[:, 0], side + noise[:, 1]], dim=1)
    return torch.zeros(rows, 1), actions.clamp(-1.0, 1.0)


@pytest.mark.parametrize(("bound_margin", "found"), [(0.05, [-0.4, 0.4]), (0.0, [0.0, 0.0])])
def test_clipped_noise_is_no_mode(bound_margin: float, found: list[float]) -> None:
    """Two components find left and right. To a density what was clipped is worth more: it has one component on the
    bound and one below it, and both go straight ahead, which nobody did."""
    observations, actions = clipped_at_a_bound()
    torch.manual_seed(0)
    mixture = BehaviourMixture(1, 2, 2, (16,), bound_margin=bound_margin)
    mixture.initialise_means(actions, torch.Generator().manual_seed(1))
    optimiser = torch.optim.Adam(mixture.parameters(), lr=1e-2)
    for _ in range(400):
        optimiser.zero_grad()
        mixture.negative_log_likelihood(observations, actions).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    with torch.no_grad():
        fitted: Mixture = mixture(observations[:1])
    assert sorted(fitted.means[0, :, 1].tolist()) == pytest.approx(found, abs=0.03)
    if bound_margin > 0:
        assert fitted.means[0, :, 0].tolist() == pytest.approx([1.0, 1.0], abs=0.02)
        assert fitted.log_stds.exp().flatten().tolist() == pytest.approx([0.15] * 4, abs=0.02)


def test_components_widen_from_a_quarter_to_their_ceiling() -> None:
    mixture = BehaviourMixture(1, 1, 2, (4,))
    with torch.no_grad():
        mixture.raw_log_stds.weight.zero_()
        mixture.raw_log_stds.bias.fill_(30.0)
        widest = [mixture(torch.zeros(1, 1), widened).log_stds.max().item() for widened in (0.0, 0.5, 1.0)]
        mixture.raw_log_stds.bias.fill_(-30.0)
        narrowest = [mixture(torch.zeros(1, 1), widened).log_stds.min().item() for widened in (0.0, 0.5, 1.0)]
    assert widest == pytest.approx([-1.4, -0.7, 0.0])
    assert narrowest == pytest.approx([-5.0] * 3)


def at_a_crossing(rows: int = 4000) -> tuple[Tensor, Tensor]:
    """Three actions by observation below 0.92, and above it the four corners, equally often."""
    generator = torch.Generator().manual_seed(1)
    observations = 2.0 * torch.rand(rows, 1, generator=generator) - 1.0
    piece = ((observations[:, 0] + 1.0) / 1.92 * 3.0).long().clamp(max=3)
    means = torch.tensor([[0.0, 0.0], [0.3, -0.3], [-0.3, 0.3], [0.0, 0.0]])[piece]
    corners = 1.6 * torch.randint(0, 2, (rows, 2), generator=generator) - 0.8
    actions = torch.where((piece == 3).unsqueeze(1), corners, means) + 0.15 * torch.randn(rows, 2, generator=generator)
    return observations, actions.clamp(-1.0, 1.0)


@pytest.mark.parametrize("widening_share", [0.6, 0.0])
def test_narrow_components_find_the_modes_of_a_rare_crossing(widening_share: float) -> None:
    """One that may be wide at once covers all four corners and keeps them: the others are elsewhere by then."""
    observations, actions = at_a_crossing()
    torch.manual_seed(1)
    mixture = BehaviourMixture(1, 2, 4, (64, 64), bound_margin=0.05)
    mixture.initialise_means(actions, torch.Generator().manual_seed(1))
    optimiser = torch.optim.Adam(mixture.parameters(), lr=2e-3)
    generator, steps = torch.Generator().manual_seed(5), 1500
    for step in range(steps):
        rows = torch.randint(0, len(observations), (256,), generator=generator)
        widened = min(1.0, step / (widening_share * steps)) if widening_share else 1.0
        optimiser.zero_grad()
        loss = mixture.negative_log_likelihood(observations[rows], actions[rows], widened)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    with torch.no_grad():
        fitted: Mixture = mixture(torch.tensor([[0.96]]))
    corners = torch.tensor([[0.8, 0.8], [0.8, -0.8], [-0.8, 0.8], [-0.8, -0.8]])
    used = fitted.log_weights[0] > math.log(0.05)
    nearest = torch.cdist(corners, fitted.means[0, used]).amin(dim=1)
    if widening_share:
        assert nearest.max().item() < 0.3
    else:
        assert nearest.min().item() > 0.5
        assert fitted.log_stds[0, used].exp().max().item() > 0.7


def test_what_always_saturates_is_narrow_and_on_the_bound() -> None:
    torch.manual_seed(0)
    mixture = BehaviourMixture(1, 1, 2, (8,), bound_margin=0.05)
    actions = torch.tensor([[1.0], [-1.0]]).repeat(500, 1)
    mixture.initialise_means(actions, torch.Generator().manual_seed(1))
    optimiser = torch.optim.Adam(mixture.parameters(), lr=1e-2)
    for _ in range(400):
        optimiser.zero_grad()
        mixture.negative_log_likelihood(torch.zeros(1000, 1), actions).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    with torch.no_grad():
        fitted: Mixture = mixture(torch.zeros(1, 1))
    assert sorted(fitted.means.flatten().tolist()) == pytest.approx([-1.0, 1.0], abs=0.03)
    assert fitted.log_stds.exp().max().item() < 0.03
    assert fitted.log_weights.exp().flatten().tolist() == pytest.approx([0.5, 0.5], abs=0.02)


def test_an_action_on_the_bound_is_fitted_just_inside_it() -> None:
    """A tanh mean would have to grow without end to reach 1."""
    torch.manual_seed(0)
    mixture = BehaviourMixture(1, 1, 2, (8,))
    observations = torch.zeros(4, 1)
    on_bound, inside = torch.ones(4, 1), torch.full((4, 1), 0.999)
    assert mixture.negative_log_likelihood(observations, on_bound) == mixture.negative_log_likelihood(
        observations, inside
    )


def test_the_split_one_hot_head_equals_one_network_on_the_joined_input() -> None:
    torch.manual_seed(0)
    head = OneHotHyperCritic(observation_dim=3, num_components=4, hidden=(8, 8))
    observations = torch.randn(5, 3)
    joined_weight = torch.cat([head.observation_weight, head.component_weight], dim=1)
    for k in range(4):
        one_hot = torch.nn.functional.one_hot(torch.full((5,), k), 4).float()
        first = torch.cat([observations, one_hot], dim=1) @ joined_weight.T + head.bias
        expected = head.rest(torch.relu(first)).squeeze(-1)
        torch.testing.assert_close(head(observations)[:, k], expected)


def test_critic_values_every_action_of_a_row_and_every_member() -> None:
    torch.manual_seed(0)
    critic = Critic(observation_dim=2, action_dim=1, num_critics=3, hidden=(8,))
    observations, actions = torch.randn(4, 2), torch.randn(4, 5, 1)
    values = critic(observations.unsqueeze(1).expand(-1, 5, -1), actions)
    assert values.shape == (3, 4, 5)
    torch.testing.assert_close(values[:, :, 2], critic(observations, actions[:, 2]))
