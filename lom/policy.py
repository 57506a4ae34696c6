"""The trained policy as one module: everything that acts, in environment units at both ends."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lom.config import TrainConfig
from lom.mode_selection import ModeChoice, behaviour_value, gather_component, select_mode
from lom.networks import Actor, BehaviourMixture, HyperCritic, Mixture, OneHotHyperCritic
from lom.scaling import ActionScaler, ObservationNormaliser

VARIANTS = ("greedy_mode", "actor", "bc")

_REACH = 3.0
"""How far a residual actor may deviate from the mode's mean, in the mode's standard deviations."""


class LomPolicy(nn.Module):
    """Normaliser, mixture, hyper-critic, actor and behaviour cloning; three ways to act, called variants.

    greedy_mode: the mean of the supported component with the highest hyper-Q, less what it costs to be unusual.
    actor: weighted imitation of that component's actions, as a deviation from its mean or by a network of its own.
    bc: behaviour cloning of the whole dataset, for comparison.
    """

    def __init__(self, config: TrainConfig, observation_dim: int, action_low: Tensor, action_high: Tensor) -> None:
        super().__init__()
        action_dim = action_low.numel()
        self.observation_dim = observation_dim
        self.min_mixing_weight = config.effective_min_mixing_weight
        # Learned beside hyper-Q, in whose unit they are; absent where it costs nothing to be unusual.
        self.hazard = config.effective_hazard
        self.worst_value: Tensor | None
        self.noise_price: Tensor | None
        for name in ("worst_value", "noise_price"):
            self.register_buffer(name, torch.zeros(1, 1) if self.hazard > 0 else None)
        self.normaliser = ObservationNormaliser(observation_dim)
        self.action_scaler = ActionScaler(action_low, action_high)
        self.mixture = BehaviourMixture(
            observation_dim,
            action_dim,
            config.num_components,
            config.mixture_hidden,
            config.log_std_min,
            config.bound_margin,
        )
        head = HyperCritic if config.hyper_head == "components" else OneHotHyperCritic
        self.hyper_critic = head(observation_dim, config.num_components, config.hidden)
        self.actor = Actor(observation_dim, action_dim, config.hidden)
        self.is_residual = config.actor_form == "residual"
        if self.is_residual:
            self.actor.start_at_zero()
        self.bc = Actor(observation_dim, action_dim, config.hidden)

    def behaviour(self, observations: Tensor) -> Mixture:
        """The behaviour mixture in environment units: float32[B, O] -> parameters of B mixtures."""
        return self._in_environment_units(self.mixture(self.normaliser(observations)))

    def _in_environment_units(self, mixture: Mixture) -> Mixture:
        return Mixture(
            log_weights=mixture.log_weights,
            means=self.action_scaler.from_unit(mixture.means),
            log_stds=mixture.log_stds + self.action_scaler.log_half_range,
        )

    def log_shares(self, mixture: Mixture) -> Tensor | None:
        """How usual it is to act by each mode, of a mixture in unit actions, float32[..., B, M]; None where the
        choice does not ask."""
        return mixture.log_shares() if self.hazard > 0 else None

    def preference(self, hyper_q: Tensor, mixing_weights: Tensor, log_shares: Tensor | None) -> Tensor:
        """What modes are chosen by: Q_H(s, k) less what it costs to be unusual; all float32[..., B, M].

        Q_H(s, k) + c log u_k - h (V(s) - V_worst) (1 - u_k), where a share u_k of the behaviour does the same: c,
        half of hyper-Q's spread, is against its noise, and h, the hazard, is the chance of leaving the data with 1 - u.
        """
        if log_shares is None:
            return hyper_q
        assert self.worst_value is not None
        assert self.noise_price is not None
        at_stake = torch.relu(behaviour_value(hyper_q, mixing_weights) - self.worst_value)
        return hyper_q + self.noise_price * log_shares + self.hazard * at_stake * torch.expm1(log_shares)

    def choose(self, hyper_q: Tensor, mixing_weights: Tensor, log_shares: Tensor | None) -> ModeChoice:
        """The greedy hyper-policy's choice: the preferred one of the supported components; all float32[..., B, M]."""
        return select_mode(self.preference(hyper_q, mixing_weights, log_shares), mixing_weights, self.min_mixing_weight)

    def actor_action(self, output: Tensor, mode_mean: Tensor, mode_log_std: Tensor) -> Tensor:
        """The unit action that the actor's output means, at the chosen mode: all float32[..., A]."""
        if not self.is_residual:
            return output
        return (mode_mean + _REACH * output * mode_log_std.exp()).clamp(-1.0, 1.0)

    def actor_output(self, action: Tensor, mode_mean: Tensor, mode_log_std: Tensor) -> Tensor:
        """The output that means a unit action, or the nearest within reach: all float32[..., A]."""
        if not self.is_residual:
            return action
        return ((action - mode_mean) / (_REACH * mode_log_std.exp())).clamp(-1.0, 1.0)

    def chooses_mode(self, variant: str) -> bool:
        """Whether the variant acts by a component, which it then names."""
        return variant == "greedy_mode" or (variant == "actor" and self.is_residual)

    def by_mode(
        self, variant: str, observations: Tensor, forced_mode: Tensor | None = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`greedy_mode`, or the residual actor: the same choice, and the mean plus the learned deviation."""
        if variant == "actor":
            deviation = _REACH * self.actor(self.normaliser(observations))
            noise = deviation if noise is None else deviation + noise
        return self.greedy_mode(observations, forced_mode, noise)

    def greedy_mode(
        self, observations: Tensor, forced_mode: Tensor | None = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Chooses a component and acts by its mean, with everything that explains the choice.

        Args:
            observations: float32[B, O].
            forced_mode: int32[B]; a component to act by instead of the chosen one, or -1.
            noise: float32[B, A]; the action is the mean plus noise times the component's standard deviation, inside
                the bounds. An input, never drawn inside, so that every runtime gives the same answer.

        Returns:
            action float32[B, A]; mode int32[B], the component that acted; margin float32[B], of the free choice;
            hyper_q float32[B, M], as it is chosen by (`preference`); mixing_weights float32[B, M];
            component_means and component_log_stds float32[B, M, A].
            Action, means and standard deviations are in environment units.
        """
        normalised = self.normaliser(observations)
        mixture = self.mixture(normalised)
        behaviour, mixing_weights = self._in_environment_units(mixture), mixture.log_weights.exp()
        hyper_q = self.preference(self.hyper_critic(normalised), mixing_weights, self.log_shares(mixture))
        choice = select_mode(hyper_q, mixing_weights, self.min_mixing_weight)
        mode = choice.mode if forced_mode is None else torch.where(forced_mode >= 0, forced_mode.long(), choice.mode)
        action = gather_component(behaviour.means, mode)
        if noise is not None:
            std = gather_component(behaviour.log_stds, mode).exp()
            action = self.action_scaler.clamp(action + noise * std)
        return {
            "action": action,
            "mode": mode.to(torch.int32),
            "margin": choice.margin,
            "hyper_q": hyper_q,
            "mixing_weights": mixing_weights,
            "component_means": behaviour.means,
            "component_log_stds": behaviour.log_stds,
        }

    def forward(self, observations: Tensor, variant: str) -> Mapping[str, Tensor]:
        """Outputs by name of one variant; `action` is always among them.

        Raises:
            ValueError: an unknown variant.
        """
        if variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
        if self.chooses_mode(variant):
            return self.by_mode(variant, observations)
        network = self.actor if variant == "actor" else self.bc
        return {"action": self.action_scaler.from_unit(network(self.normaliser(observations)))}
