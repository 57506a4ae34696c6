"""The equations of LOM as pure functions, each with its number in the paper.

The mixture's loss (eq. 15) is `BehaviourMixture.negative_log_likelihood`. In shapes, `...` is nothing for one run, and
the seed axis for several that train as one: every loss is one number for each of them.
"""

import math
from typing import Literal

import torch
from torch import Tensor


def sarsa_target(rewards: Tensor, discounts: Tensor, next_values: Tensor) -> Tensor:
    """y = r + γ (1 - terminal) min_c Q̄_c(s', a'), a' being the action that the data took next (eq. 16).

    Shapes: rewards float32[..., B], discounts float32[..., B] (γ, and 0 where s' is absorbing), next_values
    float32[C, ..., B] -> [..., B]. Several steps have the sum of their rewards, γ^k and where they ended.
    """
    return rewards + discounts * next_values.amin(dim=0)


def critic_loss(values: Tensor, targets: Tensor) -> Tensor:
    """Squared error of every critic against the shared target: mean over rows, sum over critics (eq. 16).

    Shapes: values float32[C, ..., B], targets float32[..., B] -> [...].
    """
    return (values - targets).square().mean(dim=-1).sum(dim=0)


def hyper_critic_loss(hyper_q: Tensor, sampled_values: Tensor) -> Tensor:
    """(Q_H(s, k) - Q(s, a_k))², a_k one sample of component k; mean over rows and components (eq. 17).

    Shapes: both float32[..., B, M] -> [...]. One sample is enough: the regression averages it into the expectation.
    """
    return (hyper_q - sampled_values).square().mean(dim=(-2, -1))


def reduced_value(values: Tensor, reduction: Literal["mean", "min", "first"]) -> Tensor:
    """What C critics say together: float32[C, ...] -> [...]. The authors' code listens to the first alone."""
    if reduction == "mean":
        return values.mean(dim=0)
    return values.amin(dim=0) if reduction == "min" else values[0]


def normalised_advantages(advantages: Tensor) -> Tensor:
    """A / rms(A) over the whole batch, float32[..., B, n]; not centred: 0 still means "as good as the baseline"."""
    return advantages / advantages.square().mean(dim=(-2, -1), keepdim=True).sqrt().clamp(min=1e-6)


def limited_inverse_temperature(
    inverse_temperature: float, max_drift: float, horizon: Tensor, advantage: Tensor
) -> Tensor:
    """min(β, D / (H rms(A))): weights exp(β A) lead at most D standard deviations from the mode over H steps.

    Where A is linear in the action, exp(β A) moves a Gaussian by β std(A) of its standard deviations, and rms(A) is not
    less. What that costs grows with the square of H times the move (Kakade and Langford, 2002; Schulman et al., 2015).

    Shapes: horizon float32[..., 1, 1]; advantage, its root mean square over states and actions, likewise.
    """
    return (max_drift / (horizon * advantage).clamp(min=1e-6)).clamp(max=inverse_temperature)


def imitation_weights(advantages: Tensor, inverse_temperature: Tensor | float, max_imitation_weight: float) -> Tensor:
    """min(exp(β A), C): how strongly an action is imitated (eq. 18; β multiplies, as in the authors' code).

    The exponent is clipped before exp, which gives the same weight and never overflows.
    """
    return torch.exp((inverse_temperature * advantages).clamp(max=math.log(max_imitation_weight)))


def weighted_imitation_loss(policy_actions: Tensor, imitated_actions: Tensor, weights: Tensor) -> Tensor:
    """mean_i w_i · mean_dim (π(s_i) - â_i)² (eq. 18 with a deterministic policy).

    Shapes: actions float32[..., B, A], weights float32[..., B], which carry no gradient -> [...].
    """
    return (weights * (policy_actions - imitated_actions).square().mean(dim=-1)).mean(dim=-1)


def self_normalised_target(
    imitated_actions: Tensor, advantages: Tensor, inverse_temperature: Tensor | float, max_imitation_weight: float
) -> Tensor:
    """Σ_j w_j â_j / Σ_j w_j with the weights of eq. 18 over n actions of each state.

    The minimiser of the weighted squared error of one state (eq. 18) over its n actions; every state then counts once,
    as in E_s |π(s) - E_{π*}[a|s]|². A softmax, so that weights which all vanish still have a mean.

    Shapes: imitated_actions float32[..., B, n, A], advantages float32[..., B, n] -> [..., B, A].
    """
    exponents = (inverse_temperature * advantages).clamp(max=math.log(max_imitation_weight))
    return (torch.softmax(exponents, dim=-1).unsqueeze(-1) * imitated_actions).sum(dim=-2)
