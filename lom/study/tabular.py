"""Exact values in a tabular MDP whose behaviour is a mixture of arbitrary distributions over actions.

Axes: S states, A actions, M modes. Everything is float64: these are answers, not estimates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lom.losses import imitation_weights


@dataclass(frozen=True, kw_only=True)
class TabularMDP:
    """A finite MDP.

    Attributes:
        transitions: P(s'|s, a), float64[S, A, S].
        rewards: float64[S, A].
        discount: γ, below 1.
    """

    transitions: Tensor
    rewards: Tensor
    discount: float

    def values(self, policy: Tensor) -> Tensor:
        """V^π by a linear solve: (I - γ P_π) V = r_π. Shapes: policy float64[S, A] -> [S]."""
        moves = torch.einsum("sa,sat->st", policy, self.transitions)
        rewards = (policy * self.rewards).sum(dim=1)
        identity = torch.eye(len(rewards), dtype=torch.float64)
        values: Tensor = torch.linalg.solve(identity - self.discount * moves, rewards)
        return values

    def action_values(self, policy: Tensor) -> Tensor:
        """Q^π(s, a) = r(s, a) + γ Σ_s' P(s'|s, a) V^π(s'), float64[S, A]."""
        return self.rewards + self.discount * self.transitions @ self.values(policy)


def composite_policy(hyper_policy: Tensor, modes: Tensor) -> Tensor:
    """π_ζ(a|s) = Σ_u ζ(u|s) φ_u(a|s). Shapes: float64[S, M] and float64[S, M, A] -> [S, A]."""
    return torch.einsum("sm,sma->sa", hyper_policy, modes)


def hyper_values(action_values: Tensor, modes: Tensor) -> Tensor:
    """Q_H(s, u) = E_{a~φ_u} Q(s, a) (Proposition 1). Shapes: float64[S, A], float64[S, M, A] -> [S, M]."""
    return torch.einsum("sa,sma->sm", action_values, modes)


def tilted_policy(policy: Tensor, action_values: Tensor, inverse_temperature: float) -> Tensor:
    """π(a|s) exp(β Q(s, a)) / Z(s): what weighted imitation without a clip learns (eq. 18); the baseline cancels."""
    baseline = action_values.amax(dim=1, keepdim=True)
    weights = policy * imitation_weights(action_values - baseline, inverse_temperature, torch.inf)
    return weights / weights.sum(dim=1, keepdim=True)


def worst_choice(mdp: TabularMDP, modes: Tensor, hyper_q: Tensor, error: float) -> Tensor:
    """The worst modes that an argmax of hyper-Q can be led to choose by errors of at most `error`, int64[S].

    An error can bring any mode to the top that lies at most 2·error below it, in every state on its own. Among these,
    policy iteration finds the choice whose value is least in all states at once.

    Shapes: modes float64[S, M, A], hyper_q float64[S, M], exact.
    """
    tolerance = 1e-9
    reachable = hyper_q >= hyper_q.amax(dim=1, keepdim=True) - 2 * error - tolerance
    values = hyper_q
    chosen = torch.where(reachable, values, torch.inf).argmin(dim=1)
    while True:
        values = hyper_values(mdp.action_values(deterministic_policy(chosen, modes)), modes)
        least = torch.where(reachable, values, torch.inf).min(dim=1)
        worse = values.gather(1, chosen.unsqueeze(1)).squeeze(1) - least.values > tolerance
        if not worse.any():
            return chosen
        chosen = torch.where(worse, least.indices, chosen)


def deterministic_policy(chosen: Tensor, modes: Tensor) -> Tensor:
    """φ_{u(s)}(a|s) of one mode per state. Shapes: int64[S], float64[S, M, A] -> [S, A]."""
    return composite_policy(torch.nn.functional.one_hot(chosen, modes.shape[1]).to(modes), modes)


def random_problem(generator: torch.Generator, discount: float = 0.95) -> tuple[TabularMDP, Tensor, Tensor]:
    """An MDP with 2 to 5 states and actions, its modes float64[S, M, A] and their mixing weights float64[S, M]."""
    states, actions, modes = (int(torch.randint(2, 6, (1,), generator=generator)) for _ in range(3))

    def distributions(*shape: int) -> Tensor:
        # Exponentials to the third power: sparse enough that modes differ and some choices are bad.
        raw = -torch.rand(shape, generator=generator, dtype=torch.float64).clamp(min=1e-12).log()
        return raw**3 / (raw**3).sum(dim=-1, keepdim=True)

    mdp = TabularMDP(
        transitions=distributions(states, actions, states),
        rewards=torch.randn(states, actions, generator=generator, dtype=torch.float64),
        discount=discount,
    )
    return mdp, distributions(states, modes, actions), distributions(states, modes)
