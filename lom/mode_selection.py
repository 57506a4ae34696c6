"""Which component acts: the greedy hyper-policy, restricted to components that the behaviour really uses.

In shapes, `...` is nothing, or the seed axis of several runs that train as one.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ModeChoice(NamedTuple):
    """The greedy hyper-policy's choice at B observations.

    Attributes:
        mode: index of the chosen component, int64[..., B].
        margin: its hyper-Q minus the runner-up's among the allowed components, float32[..., B]; NaN without one.
        overruled: bool[..., B], the plain argmax over all components would have chosen an excluded one.
    """

    mode: Tensor
    margin: Tensor
    overruled: Tensor


def supported(mixing_weights: Tensor, min_mixing_weight: float) -> Tensor:
    """Which components may be chosen, bool[..., M]: those of enough weight, and always the heaviest."""
    heaviest = mixing_weights.amax(dim=-1, keepdim=True)
    return (mixing_weights >= min_mixing_weight) | (mixing_weights >= heaviest)


def select_mode(hyper_q: Tensor, mixing_weights: Tensor, min_mixing_weight: float) -> ModeChoice:
    """argmax_k Q_H(s, k) over components whose mixing weight is at least `min_mixing_weight`.

    Without that mask the argmax falls for components that no data supports, whose actions are arbitrary and whose
    values are extrapolated (LOM's fourth trap). The heaviest component always stays allowed.

    Shapes: hyper_q and mixing_weights float32[..., B, M].
    """
    masked = torch.where(supported(mixing_weights, min_mixing_weight), hyper_q, -torch.inf)
    mode = masked.argmax(dim=-1)
    if hyper_q.shape[-1] == 1:
        margin = torch.full_like(hyper_q[..., 0], torch.nan)
    else:
        best, second = masked.topk(2, dim=-1).values.unbind(dim=-1)
        margin = torch.where(torch.isinf(second), torch.nan, best - second)
    return ModeChoice(mode=mode, margin=margin, overruled=hyper_q.argmax(dim=-1) != mode)


def gather_component(parameters: Tensor, mode: Tensor) -> Tensor:
    """The chosen component's row of a per-component array: float32[..., B, M, A] and int64[..., B] -> [..., B, A]."""
    index = mode[..., None, None].expand(*(-1 for _ in mode.shape), 1, parameters.shape[-1])
    return parameters.gather(-2, index).squeeze(-2)


def behaviour_value(hyper_q: Tensor, mixing_weights: Tensor) -> Tensor:
    """What a state is worth while the behaviour goes on, V(s) = Σ_k α_k Q_H(s, k).

    Shapes: both float32[..., B, M] -> [..., B, 1].
    """
    return (mixing_weights * hyper_q).sum(dim=-1, keepdim=True)


def hyper_spread(hyper_q: Tensor, mixing_weights: Tensor) -> Tensor:
    """Root mean square of what a component is worth more than the behaviour, drawn by its weight: sqrt(E_s Σ_k α_k
    (Q_H(s, k) - V(s))²).

    Shapes: both float32[..., B, M] -> [...].
    """
    advantages = hyper_q - behaviour_value(hyper_q, mixing_weights)
    return (mixing_weights * advantages.square()).sum(dim=-1).mean(dim=-1).sqrt()
