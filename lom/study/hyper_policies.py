"""Hyper-policies ζ(u|s): ways to choose a mode, good ones and spoilt ones, and what they are worth in one state.

Shapes: M modes, B states. A hyper-policy is float[B, M], rows sum to 1.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lom.mode_selection import select_mode, supported
from lom.study.quadratic import Array

RULES = ("random_uniform", "random_alpha", "max_alpha", "hyper_q", "oracle", "worst")


def greedy(hyper_q: Tensor, mixing_weights: Tensor, min_mixing_weight: float) -> Tensor:
    """ζ_g: all weight on argmax_u Q_H(s, u), through the support mask."""
    chosen = select_mode(hyper_q, mixing_weights, min_mixing_weight).mode
    return torch.nn.functional.one_hot(chosen, hyper_q.shape[-1]).to(hyper_q)


def rules(answer: Mapping[str, Tensor], best_actions: Tensor, min_mixing_weight: float) -> dict[str, Tensor]:
    """Every rule's hyper-policy at the B states that `LomPolicy.greedy_mode` answered for.

    random_uniform, oracle and worst choose among the components that hyper-Q may choose from; random_alpha is the
    behaviour's own ζ_b(u|s) = α_u(s). `oracle` knows `best_actions` (float32[B, A]) and takes the component whose mean
    is nearest; `worst` is hyper-Q upside down.
    """
    hyper_q, weights, means = answer["hyper_q"], answer["mixing_weights"], answer["component_means"]
    allowed = supported(weights, min_mixing_weight)
    nearness = -(means - best_actions.unsqueeze(1)).norm(dim=-1)
    return {
        "random_uniform": allowed / allowed.sum(dim=-1, keepdim=True),
        "random_alpha": weights,
        "max_alpha": greedy(weights, weights, 0.0),
        "hyper_q": greedy(hyper_q, weights, min_mixing_weight),
        "oracle": greedy(nearness, weights, min_mixing_weight),
        "worst": greedy(-hyper_q, weights, min_mixing_weight),
    }


def value_of_random_share(values: Array, share: float) -> float:
    """V(p) = (1 - p) max_u Q_H(u) + p mean_u Q_H(u) in one state: a random mode with probability p."""
    return float((1 - share) * values.max() + share * values.mean())


def value_of_noisy_choice(values: Array, noise_std: float) -> float:
    """E Q_H(argmax_u (Q_H(u) + ε_u)), ε ~ N(0, noise_std²) of each mode its own, by quadrature over the winner's value.

    P(u wins) = ∫ φ(z) Π_{v≠u} Φ(z + (Q_H(u) - Q_H(v)) / σ) dz.
    """
    z = np.linspace(-9.0, 9.0, 20_001)
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    lead = (values[:, None] - values[None, :]) / noise_std
    np.fill_diagonal(lead, np.inf)  # nobody has to beat itself
    below = torch.special.ndtr(torch.from_numpy(z[:, None, None] + lead)).numpy()
    wins = (density[:, None] * below.prod(axis=2)).sum(axis=0) * (z[1] - z[0])
    return float(wins @ values)
