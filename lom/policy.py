"""The trained policy as one module: everything that acts, in environment units at both ends."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lom.config import TrainConfig
from lom.mode_selection import ModeChoice, gather_component, select_mode
from lom.networks import Actor, BehaviourMixture, HyperCritic, Mixture, OneHotHyperCritic
from lom.scaling import ActionScaler, ObservationNormaliser

VARIANTS = ("greedy_mode", "actor", "bc")

_REACH = 3.0
"""How far a residual actor may deviate from the mode's mean, in the mode's standard deviations."""


class LomPolicy(nn.Module):
    """Normaliser, mixture, hyper-critic, actor and behaviour cloning; three ways to act, called variants.

    greedy_mode: the mean of the supported component with the highest hyper-Q, less the price of its surprise.
    actor: weighted imitation of that component's actions, as a deviation from its mean or by a network of its own.
    bc: behaviour cloning of the whole dataset, for comparison.
    """

    def __init__(self, config: TrainConfig, observation_dim: int, action_low: Tensor, action_high: Tensor) -> None:
        super().__init__()
        action_dim = action_low.numel()
        self.observation_dim = observation_dim
        self.min_mixing_weight = config.effective_min_mixing_weight
        self.surprise_price: Tensor | None
        # Learned beside hyper-Q, in whose unit a nat is paid; absent where nothing is limited or to be chosen.
        priced = config.num_components > 1 and (config.max_surprise > 0 or config.surprise_hazard > 0)
        self.register_buffer("surprise_price", torch.zeros(1, 1) if priced else None)
        self.normaliser = ObservationNormaliser(observation_dim)
        self.action_scaler = ActionScaler(action_low, action_high)
        self.mixture = BehaviourMixture(
            observation_dim, action_dim, config.num_components, config.mixture_hidden, config.log_std_min
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

    def surprise(self, mixture: Mixture) -> Tensor | None:
        """What acting by each mode would cost, float32[..., B, M] in nats, of a mixture in unit actions; None where it
        costs nothing."""
        return None if self.surprise_price is None else mixture.surprise()

    def preference(self, hyper_q: Tensor, surprise: Tensor | None) -> Tensor:
        """Q_H(s, k) less the price of k's surprise, by which modes are chosen: float32[..., B, M]."""
        if surprise is None:
            return hyper_q
        assert self.surprise_price is not None
        return hyper_q - self.surprise_price * surprise

    def choose(self, hyper_q: Tensor, mixing_weights: Tensor, surprise: Tensor | None) -> ModeChoice:
        """The greedy hyper-policy's choice: the preferred one of the supported components; all float32[..., B, M]."""
        return select_mode(self.preference(hyper_q, surprise), mixing_weights, self.min_mixing_weight)

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
            hyper_q float32[B, M], as it is chosen by: less the price of surprise; mixing_weights float32[B, M];
            component_means and component_log_stds float32[B, M, A].
            Action, means and standard deviations are in environment units.
        """
        normalised = self.normaliser(observations)
        mixture = self.mixture(normalised)
        hyper_q = self.preference(self.hyper_critic(normalised), self.surprise(mixture))
        behaviour = self._in_environment_units(mixture)
        mixing_weights = behaviour.log_weights.exp()
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
