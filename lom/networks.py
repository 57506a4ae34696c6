"""The five function approximators. All take normalised observations and unit actions ([-1, 1]).

In shapes, `...` is nothing for a network of its own, and the seed axis S for networks that `stacked` made one.
"""

import copy
import math
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG_STD_MIN = -5.0
LOG_STD_MAX = 0.0
# The ceiling from which components widen: a std of 0.25 cannot cover actions to the left and to the right.
_NARROW_LOG_STD_MAX = -1.4
# A fresh network starts at a std of exp(-0.6) = 0.55, wide enough to see its neighbours.
_INITIAL_LOG_STD = -5.0 / (1.0 + math.exp(2.0))
_MEAN_LIMIT = 0.999
RESOLUTION = 0.1
"""Distance of unit actions below which none is told from another when modes are compared."""


_Network = TypeVar("_Network", bound=nn.Module)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x Wᵀ + b: float32[..., rows, I], [..., O, I] and [..., O] -> [..., rows, O]; rows may be several axes."""
    if weight.dim() == 2:
        return F.linear(inputs, weight, bias)
    outputs = torch.baddbmm(bias.unsqueeze(1), inputs.flatten(1, -2), weight.mT)
    # Not a view where none is needed: ReLU in place of a view would copy its gradient.
    return outputs if inputs.dim() == 3 else outputs.view(*inputs.shape[:-1], -1)


class Linear(nn.Linear):
    """A linear layer that can be stacked."""

    def forward(self, inputs: Tensor) -> Tensor:
        """float32[..., rows, I] -> [..., rows, O]."""
        return linear(inputs, self.weight, self.bias)


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of `sizes` with ReLU between them and none at the end."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(sizes):
        layers += [Linear(width_in, width_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def stacked(networks: Sequence[_Network]) -> _Network:
    """One network that is S networks of the same make: every tensor gains a leading seed axis.

    The networks that were given are views on it from then on: what one side learns or loads, the other has.
    """

    def tensors(network: nn.Module) -> dict[str, Tensor]:
        return dict(chain(network.named_parameters(), network.named_buffers()))

    whole = copy.deepcopy(networks[0])
    parts = [tensors(network) for network in networks]
    for name, tensor in tensors(whole).items():
        tensor.data = torch.stack([part[name] for part in parts])
        for part, view in zip(parts, tensor.data, strict=True):
            part[name].data = view
    return whole


class Mixture(NamedTuple):
    """Parameters of the behaviour mixture at B observations.

    Attributes:
        log_weights: log of the mixing weights, float32[..., B, M], normalised.
        means: component means, float32[..., B, M, A], unit actions.
        log_stds: float32[..., B, M, A], inside (the mixture's floor, LOG_STD_MAX).
    """

    log_weights: Tensor
    means: Tensor
    log_stds: Tensor

    def log_prob(self, unit_actions: Tensor, bound_margin: float = 0.0) -> Tensor:
        """log π_b(a|s) = logsumexp_k(log α_k + log N(a; μ_k, σ_k²)), float32[..., B] (eq. 15).

        Where |a| > 1 - `bound_margin`, in each dimension of its own, the density is replaced by the probability of all
        that lies beyond 1 - `bound_margin` on that side: what was clipped there is known no better.
        """
        return torch.logsumexp(self._log_joint(unit_actions, bound_margin), dim=-1)

    def responsibilities(self, unit_actions: Tensor, bound_margin: float = 0.0) -> Tensor:
        """α_k N(a; μ_k, σ_k²) / π_b(a|s): the probability that component k brought forth a, float32[..., B, M]."""
        return torch.softmax(self._log_joint(unit_actions, bound_margin), dim=-1)

    def log_shares(self) -> Tensor:
        """Log of the share of the behaviour that does what each mode does, or nearly, float32[..., B, M], 0 or less:
        log Σ_j α_j exp(-½ d²_kj), d²_kj = Σ_a (μ_ka - μ_ja)² / (σ_ja² + RESOLUTION²).

        Of actions, not of components: those that overlap vouch for each other. Not a density, by which an exact
        controller is likelier than a noisy one. The squared distances are one matrix product, which a graph does
        faster than M² A differences; what variances are widened by keeps its rounding harmless.
        """
        precisions = 1.0 / (torch.exp(2.0 * self.log_stds) + RESOLUTION**2)
        weighted_means = precisions * self.means
        as_actions = torch.cat([self.means.square(), -2.0 * self.means], dim=-1)
        as_components = torch.cat([precisions, weighted_means], dim=-1)
        squares = as_actions @ as_components.mT + (weighted_means * self.means).sum(dim=-1).unsqueeze(-2)
        return torch.logsumexp(self.log_weights.unsqueeze(-2) - 0.5 * squares, dim=-1)

    def _log_joint(self, unit_actions: Tensor, bound_margin: float) -> Tensor:
        """log α_k + log N(a; μ_k, σ_k²), float32[..., B, M]."""
        actions, precisions = unit_actions.unsqueeze(-2), torch.exp(-self.log_stds)
        constant = 0.5 * math.log(2.0 * math.pi)
        log_densities = -(0.5 * ((actions - self.means) * precisions).square() + self.log_stds + constant)
        if bound_margin > 0.0:
            edge = 1.0 - bound_margin
            beyond = torch.special.log_ndtr((torch.sign(actions) * self.means - edge) * precisions)
            log_densities = torch.where(actions.abs() > edge, beyond, log_densities)
        return self.log_weights + log_densities.sum(dim=-1)


class BehaviourMixture(nn.Module):
    """π_b(a|s) = Σ_k α_k(s) N(a; μ_k(s), diag σ_k(s)²), a mixture density network.

    The log-std is clamped softly and only here, so that fitting, scoring and sampling see the same density; the
    clamp has no dead zone in which a component could drift without a gradient.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        num_components: int,
        hidden: Sequence[int],
        log_std_min: float = LOG_STD_MIN,
        bound_margin: float = 0.0,
    ) -> None:
        super().__init__()
        self.log_std_min = log_std_min
        self.bound_margin = bound_margin
        self.num_components = num_components
        self.action_dim = action_dim
        self.trunk = nn.Sequential(mlp([observation_dim, *hidden]), nn.ReLU(inplace=True))
        self.mixing_logits = Linear(hidden[-1], num_components)
        self.raw_means = Linear(hidden[-1], num_components * action_dim)
        self.raw_log_stds = Linear(hidden[-1], num_components * action_dim)

    def forward(self, observations: Tensor, widened: float = 1.0) -> Mixture:
        """float32[..., B, O] -> mixture parameters. While it is fitted, `widened` in [0, 1] says how far components may
        be wide: from a std of 0.25 to LOG_STD_MAX."""
        features = self.trunk(observations)
        shape = (self.num_components, self.action_dim)
        narrow = max(_NARROW_LOG_STD_MAX, 0.5 * self.log_std_min)
        span = narrow + widened * (LOG_STD_MAX - narrow) - self.log_std_min
        # The clamp's input at which a log-std is _INITIAL_LOG_STD, whatever the span.
        shift = math.log((_INITIAL_LOG_STD - self.log_std_min) / (LOG_STD_MAX - _INITIAL_LOG_STD))
        raw_log_stds = self.raw_log_stds(features)
        return Mixture(
            log_weights=F.log_softmax(self.mixing_logits(features), dim=-1),
            means=torch.unflatten(torch.tanh(self.raw_means(features)), -1, shape),
            log_stds=torch.unflatten(self.log_std_min + span * torch.sigmoid(raw_log_stds + shift), -1, shape),
        )

    @torch.no_grad()
    def initialise_means(self, unit_actions: Tensor, generator: torch.Generator) -> None:
        """Starts every component at an action of the data, far apart from each other (k-means++ seeding).

        With default initialisation all components start at the middle of the action space and the best mode may
        never get one of its own. The means' dependence on the observation starts small (x 0.3) for the same reason.
        """
        centres = unit_actions[torch.randint(len(unit_actions), (1,), generator=generator)]
        for _ in range(1, self.num_components):
            squared_distance = torch.cdist(unit_actions, centres).amin(dim=1).square() + 1e-12
            chosen = torch.multinomial(squared_distance, 1, generator=generator)
            centres = torch.cat([centres, unit_actions[chosen]])
        self.raw_means.weight.mul_(0.3)
        self.raw_means.bias.copy_(torch.atanh(centres.clamp(-0.99, 0.99)).flatten())

    def negative_log_likelihood(self, observations: Tensor, unit_actions: Tensor, widened: float = 1.0) -> Tensor:
        """Eq. 15, averaged over rows, float32[...]. Densities move inside the bounds: tanh means cannot reach them."""
        mixture: Mixture = self(observations, widened)
        if self.bound_margin == 0.0:
            unit_actions = unit_actions.clamp(-_MEAN_LIMIT, _MEAN_LIMIT)
        return -mixture.log_prob(unit_actions, self.bound_margin).mean(dim=-1)


class Critic(nn.Module):
    """An ensemble of C action values Q(s, a)."""

    def __init__(self, observation_dim: int, action_dim: int, num_critics: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.members = nn.ModuleList(mlp([observation_dim + action_dim, *hidden, 1]) for _ in range(num_critics))

    def forward(self, observations: Tensor, unit_actions: Tensor) -> Tensor:
        """float32[..., O] and float32[..., A] -> float32[C, ...]."""
        joined = torch.cat([observations, unit_actions], dim=-1)
        return torch.stack([member(joined).squeeze(-1) for member in self.members])


class HyperCritic(nn.Module):
    """Hyper-Q(s, k), the value of choosing component k, as one network with M outputs."""

    def __init__(self, observation_dim: int, num_components: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.body = mlp([observation_dim, *hidden, num_components])

    def forward(self, observations: Tensor) -> Tensor:
        """float32[..., B, O] -> float32[..., B, M]."""
        values: Tensor = self.body(observations)
        return values


class OneHotHyperCritic(nn.Module):
    """Hyper-Q(s, k) as in the authors' code: one scalar network on (s, one-hot k).

    The first layer is linear in its input, so W·[s; onehot_k] = W_s·s + column k: the observation's share is computed
    once for all components. Identical mathematics, M times fewer first-layer products.
    """

    def __init__(self, observation_dim: int, num_components: int, hidden: Sequence[int]) -> None:
        super().__init__()
        first = nn.Linear(observation_dim + num_components, hidden[0])
        self.observation_weight = nn.Parameter(first.weight[:, :observation_dim].detach().clone())
        self.component_weight = nn.Parameter(first.weight[:, observation_dim:].detach().clone())
        self.bias = nn.Parameter(first.bias.detach().clone())
        self.rest = mlp([*hidden, 1])

    def forward(self, observations: Tensor) -> Tensor:
        """float32[..., B, O] -> float32[..., B, M]."""
        shared = linear(observations, self.observation_weight, self.bias)
        columns = self.component_weight.mT
        first = shared.unsqueeze(-2) + (columns if columns.dim() == 2 else columns.unsqueeze(1))
        values: Tensor = self.rest(torch.relu_(first)).squeeze(-1)
        return values


class Actor(nn.Module):
    """A deterministic function into [-1, 1]^A: the weighted-imitation actor, and behaviour cloning."""

    def __init__(self, observation_dim: int, action_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.body = mlp([observation_dim, *hidden, action_dim])

    def forward(self, observations: Tensor) -> Tensor:
        """float32[..., B, O] -> float32[..., B, A]."""
        return torch.tanh(self.body(observations))

    def start_at_zero(self) -> None:
        """Makes it answer 0 everywhere until it has learned."""
        last = self.body[-1]
        assert isinstance(last, Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
