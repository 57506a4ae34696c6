"""Signs that a training goes wrong, each measured as one number while it runs, with advice.

Every number is better the smaller it is; above its limit the failure is called found. Limits are rules of thumb:
`docs/algorithm.md` says where they come from. Actions and standard deviations are unit actions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lom.networks import Mixture

NARROW_STD = 0.02
"""A mode narrower than this in the mean over action dimensions leaves the actor nothing to choose from."""
FAR = 0.3
"""Distance (L2) from which the actor is said to do something else than the mode that it imitates."""
SUPPORTED = 0.05
"""Mixing weight from which a component counts as supported; 0.5/M where that is smaller."""

_INTERIOR = 0.95
_GROUPS = 4
_MIN_GROUP_ROWS = 200


@dataclass(frozen=True, kw_only=True)
class Signature:
    """One way in which LOM fails.

    Attributes:
        metric: the number's name in curves and summary.
        limit: above it the failure is called found.
        advice: what to change, most likely remedy first.
    """

    name: str
    metric: str
    limit: float
    advice: str


SIGNATURES = (
    Signature(
        name="missed modes",
        metric="signs/mixture_misfit",
        limit=0.15,
        advice="the mixture does not describe the actions of the data: raise num_components or mixture_steps, and keep "
        "the defaults of initial_means, widening_share and, where actions lie at a bound, bound_margin",
    ),
    Signature(
        name="variance collapse",
        metric="signs/narrow_modes",
        limit=0.5,
        advice="chosen modes have almost no spread, so the actor can only repeat their means: lower num_components, "
        "raise log_std_min, or act by greedy_mode; with noiseless data it is the truth",
    ),
    Signature(
        name="out-of-distribution modes",
        metric="signs/unsupported_modes",
        limit=0.05,
        advice="modes act that are rare in the data: right where a bad policy left most of the rows, guesses where "
        "data is thin; compare with min_mixing_weight=0.05",
    ),
    Signature(
        name="saturated weights",
        metric="signs/saturated_weights",
        limit=0.6,
        advice="most imitation weights are at the ceiling or near 0, a yes-or-no filter: lower inverse_temperature or "
        "reward_scale, or set max_drift",
    ),
    Signature(
        name="actor and greedy mode disagree",
        metric="signs/actor_disagreement",
        limit=0.1,
        advice="the actor does something else than the modes it imitates, often between two of them: act by "
        "greedy_mode or set actor_form=residual, train longer, lower max_drift, or set imitation_samples=8, "
        "averaging_steps and decay_share",
    ),
)


def found(metrics: Mapping[str, float]) -> tuple[Signature, ...]:
    """The signatures whose number is there and above its limit."""
    return tuple(each for each in SIGNATURES if metrics.get(each.metric, 0.0) > each.limit)


def report(metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """What was found, for a run's summary: name, measured, limit and advice."""
    return [
        {"name": each.name, "measured": metrics[each.metric], "limit": each.limit, "advice": each.advice}
        for each in found(metrics)
    ]


def mixture_misfit(mixture: Mixture, unit_actions: Tensor, generator: torch.Generator) -> float:
    """How far the mixture's quantiles of the data's actions are from uniform, 0 to 1.

    Under the true density the distribution function at the data's own actions is uniform on (0, 1), whatever the
    observation. A component that spans two modes piles its actions up on two quantiles. The distance is
    Kolmogorov-Smirnov's, the worst over action dimensions and over four groups of rows by the spread that the mixture
    predicts: modes are often missed in the few states where they are far apart.

    Actions beyond ±0.95 are left out (and the distribution function conditioned on that): clipped actions lie on the
    bound, where no density is right. The others get noise a little narrower than the narrowest component (0.02 at
    most), because an action that is repeated exactly has no density either.

    Shapes: parameters of N mixtures, unit_actions float32[N, A]; wants some 2,000 rows. 0 with fewer than 200.
    """
    weights, stds = mixture.log_weights.exp().unsqueeze(-1), mixture.log_stds.exp()
    noise = min(0.75 * float(stds.amin()), NARROW_STD) * torch.randn(unit_actions.shape, generator=generator)

    def below(actions: Tensor) -> Tensor:
        standardised = (actions.unsqueeze(1) - mixture.means) / stds
        share: Tensor = (weights * torch.special.ndtr(standardised)).sum(dim=1)
        return share

    low, high = (below(torch.full_like(unit_actions, bound)) for bound in (-_INTERIOR, _INTERIOR))
    quantiles = (below(unit_actions + noise) - low) / (high - low).clamp(min=1e-6)
    mean = (weights * mixture.means).sum(dim=1)
    spread = (weights * (stds.square() + mixture.means.square())).sum(dim=1) - mean.square()
    worst = 0.0
    for dimension in range(unit_actions.shape[1]):
        interior = unit_actions[:, dimension].abs() < _INTERIOR
        order = spread[interior, dimension].argsort()
        for group in quantiles[interior, dimension][order].chunk(_GROUPS):
            if len(group) >= _MIN_GROUP_ROWS:
                worst = max(worst, _distance_to_uniform(group.clamp(0.0, 1.0)))
    return worst


def _distance_to_uniform(quantiles: Tensor) -> float:
    count = len(quantiles)
    steps = torch.arange(count + 1) / count
    ordered = quantiles.sort().values
    return float(torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).amax())


def narrow_modes(mode_log_stds: Tensor) -> float:
    """Share of rows whose chosen mode is narrower than `NARROW_STD`: float32[N, A]."""
    return float((mode_log_stds.exp().mean(dim=-1) < NARROW_STD).float().mean())


def unsupported_modes(mixing_weights: Tensor, mode: Tensor) -> float:
    """Share of rows whose chosen mode weighs too little: float32[N, M], int64[N]. The mask may be on or off."""
    threshold = min(SUPPORTED, 0.5 / mixing_weights.shape[1])
    chosen = mixing_weights.gather(1, mode.unsqueeze(1)).squeeze(1)
    return float((chosen < threshold).float().mean())


def saturated_weights(weights: Tensor, max_imitation_weight: float) -> float:
    """Share of imitation weights at the ceiling C, or below the smaller of 1/C and 0.02."""
    nothing = min(1.0 / max_imitation_weight, 0.02)
    at_ceiling = weights >= max_imitation_weight * (1.0 - 1e-5)
    return float((at_ceiling | (weights <= nothing)).float().mean())


def actor_disagreement(actions: Tensor, mode_means: Tensor) -> float:
    """Share of rows where the actor is farther than `FAR` from the chosen mode's mean: both float32[N, A]."""
    return float(((actions - mode_means).norm(dim=-1) > FAR).float().mean())
