"""Learns a LOM policy from transitions, in two stages.

1. mixture: the behaviour mixture (eq. 15), and behaviour cloning beside it. Then both are frozen.
2. policy: per step one critic update (eq. 16), one hyper-critic update (eq. 17) and one actor update (eq. 18), on
   three independent minibatches, in the order of the authors' code.

Every random number comes from one generator whose state is part of `state()`: a resumed run continues to the same
result as one that was never stopped.
"""

import copy
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lom import losses
from lom.config import TrainConfig
from lom.dataset import DatasetError, Transitions
from lom.mode_selection import gather_component, select_mode
from lom.networks import Critic, Mixture
from lom.policy import LomPolicy

Stage = Literal["mixture", "policy"]
Metrics = dict[str, float]

_TARGET_NOISE_CLIP = 0.5
_TARGET_UPDATE_EVERY = 2
_DECAY_SHARE = 0.3
_MEANS_SEEDING_ROWS = 4096


class LearningDivergedError(RuntimeError):
    """A loss became NaN or infinite; the message names it and the step."""


class _Batch(NamedTuple):
    observations: Tensor
    mixture: Mixture


class Learner:
    """Owns networks, optimisers and data of one run. One thread."""

    def __init__(self, transitions: Transitions, config: TrainConfig, action_low: Tensor, action_high: Tensor) -> None:
        self.config = config
        self.mixture_steps_done = 0
        self.policy_steps_done = 0
        self._generator = torch.Generator().manual_seed(config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.policy = LomPolicy(config, transitions.observations.shape[1], action_low, action_high)
            action_dim = action_low.numel()
            self.critic = Critic(self.policy.observation_dim, action_dim, config.num_critics, config.hidden)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self._load_data(transitions)
        seeding_rows = torch.randperm(self._rows, generator=self._generator)[:_MEANS_SEEDING_ROWS]
        self.policy.mixture.initialise_means(self._actions[seeding_rows], self._generator)

        def adam(network: nn.Module, learning_rate: float) -> torch.optim.Adam:
            return torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)

        self._optimisers = {
            "mixture": adam(self.policy.mixture, config.mixture_learning_rate),
            "bc": adam(self.policy.bc, config.mixture_learning_rate),
            "critic": adam(self.critic, config.critic_learning_rate),
            "hyper_critic": adam(self.policy.hyper_critic, config.hyper_learning_rate),
            "actor": adam(self.policy.actor, config.actor_learning_rate),
        }
        self._mixture_cache: Mixture | None = None
        self._latest: dict[str, Tensor] = {}

    def _load_data(self, transitions: Transitions) -> None:
        policy, config = self.policy, self.config
        self._rows = len(transitions)
        observations = torch.from_numpy(transitions.observations)
        policy.normaliser.fit(observations)
        self._observations = policy.normaliser(observations)
        self._next_observations = policy.normaliser(torch.from_numpy(transitions.next_observations))
        self._actions = policy.action_scaler.to_unit(torch.from_numpy(transitions.actions))
        self._next_actions = policy.action_scaler.to_unit(torch.from_numpy(transitions.next_actions))
        self._rewards = torch.from_numpy(transitions.rewards) * config.reward_scale
        self._terminals = torch.from_numpy(transitions.terminals).float()
        # A row that was cut off without a next action has no SARSA target; it still shows states and actions.
        self._sarsa_rows = torch.from_numpy(transitions.terminals | transitions.has_next_action).nonzero().squeeze(1)
        if len(self._sarsa_rows) == 0:
            raise DatasetError(
                "expected transitions with a next action or a terminal state, got none: are all of them timeouts?"
            )

    def remaining(self) -> Iterator[tuple[Stage, int]]:
        """Runs one gradient step per item; yields the stage and its steps done so far. Stop and go on at will."""
        while self.mixture_steps_done < self.config.mixture_steps:
            self._mixture_step()
            self.mixture_steps_done += 1
            yield "mixture", self.mixture_steps_done
        while self.policy_steps_done < self.config.steps:
            self._policy_step()
            self.policy_steps_done += 1
            yield "policy", self.policy_steps_done

    # ---------------------------------------------------------------- stage 1

    def _mixture_step(self) -> None:
        progress = self.mixture_steps_done / self.config.mixture_steps
        decay = min(1.0, (1.0 - progress) / _DECAY_SHARE)
        rows = self._sample(self._rows, self.config.mixture_batch)
        observations, actions = self._observations[rows], self._actions[rows]
        mixture_loss = self.policy.mixture.negative_log_likelihood(observations, actions)
        self._descend("mixture", mixture_loss, learning_rate=decay * self.config.mixture_learning_rate)
        bc_loss = (self.policy.bc(observations) - actions).square().mean()
        self._descend("bc", bc_loss, learning_rate=decay * self.config.mixture_learning_rate)
        self._latest = {"mixture/nll": mixture_loss.detach(), "bc/loss": bc_loss.detach()}

    # ---------------------------------------------------------------- stage 2

    def _policy_step(self) -> None:
        critic_loss = self._critic_step()
        hyper_loss = self._hyper_critic_step()
        self._actor_step()
        self._latest |= {"critic/loss": critic_loss.detach(), "hyper_critic/loss": hyper_loss.detach()}
        if self.policy_steps_done % _TARGET_UPDATE_EVERY == 0:
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(self.target_critic.parameters()),
                    list(self.critic.parameters()),
                    self.config.target_update_rate,
                )

    def _critic_step(self) -> Tensor:
        config = self.config
        rows = self._sarsa_rows[self._sample(len(self._sarsa_rows), config.batch)]
        with torch.no_grad():
            next_actions = self._next_actions[rows]
            if config.target_noise_std > 0:
                noise = config.target_noise_std * self._normal(next_actions.shape)
                next_actions = (next_actions + noise.clamp(-_TARGET_NOISE_CLIP, _TARGET_NOISE_CLIP)).clamp(-1.0, 1.0)
            next_values = self.target_critic(self._next_observations[rows], next_actions)
            targets = losses.sarsa_target(self._rewards[rows], self._terminals[rows], next_values, config.discount)
        loss = losses.critic_loss(self.critic(self._observations[rows], self._actions[rows]), targets)
        self._descend("critic", loss)
        return loss

    def _hyper_critic_step(self) -> Tensor:
        batch = self._batch(self.config.hyper_batch)
        with torch.no_grad():
            samples = self._sample_components(batch.mixture.means, batch.mixture.log_stds)
            observations = batch.observations.unsqueeze(1).expand(-1, samples.shape[1], -1)
            sampled_values = self.critic(observations, samples).mean(dim=0)
        loss = losses.hyper_critic_loss(self.policy.hyper_critic(batch.observations), sampled_values)
        self._descend("hyper_critic", loss)
        return loss

    def _actor_step(self) -> None:
        config = self.config
        batch = self._batch(config.batch)
        with torch.no_grad():
            hyper_q = self.policy.hyper_critic(batch.observations)
            weights = batch.mixture.log_weights.exp()
            choice = select_mode(hyper_q, weights, config.effective_min_mixing_weight)
            mode_mean = gather_component(batch.mixture.means, choice.mode)
            imitated = self._sample_components(mode_mean, gather_component(batch.mixture.log_stds, choice.mode))
            if config.imitation_noise_std > 0:
                imitated = (imitated + config.imitation_noise_std * self._normal(imitated.shape)).clamp(-1.0, 1.0)
            values, baseline = (
                self.critic(batch.observations, actions).mean(dim=0) for actions in (imitated, mode_mean)
            )
            imitation_weights = losses.imitation_weights(
                values - baseline, config.inverse_temperature, config.max_imitation_weight
            )
        actions = self.policy.actor(batch.observations)
        loss = losses.weighted_imitation_loss(actions, imitated, imitation_weights)
        self._descend("actor", loss)
        self._latest = {
            "actor/loss": loss.detach(),
            "actor/mean_weight": imitation_weights.mean(),
            "actor/clipped_weights": (imitation_weights >= config.max_imitation_weight).float().mean(),
            "actor/distance_to_mode_mean": (actions.detach() - mode_mean).norm(dim=-1).mean(),
            "hyper_critic/mean_q": hyper_q.mean(),
            "hyper_critic/margin": torch.nanmean(choice.margin).nan_to_num(0.0),
            "hyper_critic/mask_overruled": choice.overruled.float().mean(),
        }

    # ---------------------------------------------------------------- shared

    def _sample(self, population: int, count: int) -> Tensor:
        return torch.randint(population, (count,), generator=self._generator)

    def _normal(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def _sample_components(self, means: Tensor, log_stds: Tensor) -> Tensor:
        """One sample, clipped to the action space: the action that is valued is the action that is imitated."""
        return (means + log_stds.exp() * self._normal(means.shape)).clamp(-1.0, 1.0)

    @torch.no_grad()
    def _batch(self, count: int) -> _Batch:
        """Observations with the frozen mixture's parameters there, from the cache where the dataset fits in it."""
        rows = self._sample(self._rows, count)
        observations = self._observations[rows]
        config, action_dim = self.config, self._actions.shape[1]
        cache_bytes = 4 * self._rows * config.num_components * (2 * action_dim + 1)
        if self._mixture_cache is None and cache_bytes <= config.mixture_cache_bytes:
            chunks = [self.policy.mixture(chunk) for chunk in self._observations.split(8192)]
            self._mixture_cache = Mixture(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))
        if self._mixture_cache is None:
            return _Batch(observations, self.policy.mixture(observations))
        return _Batch(observations, Mixture(*(part[rows] for part in self._mixture_cache)))

    def _descend(self, name: str, loss: Tensor, learning_rate: float | None = None) -> None:
        optimiser = self._optimisers[name]
        if learning_rate is not None:
            optimiser.param_groups[0]["lr"] = learning_rate
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()

    def metrics(self) -> Metrics:
        """The last step's losses and signs of health, by name.

        Raises:
            LearningDivergedError: one of them is not finite.
        """
        values = {name: value.item() for name, value in self._latest.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise LearningDivergedError(
                    f"{name}: expected a finite value, got {value} after {self.mixture_steps_done} mixture and "
                    f"{self.policy_steps_done} policy steps; lower the learning rates or scale the rewards"
                )
        return values

    # ---------------------------------------------------------------- resuming

    def state(self) -> dict[str, Tensor]:
        """Everything that training depends on, as flat tensors by name."""
        tensors = {f"policy.{name}": tensor for name, tensor in self.policy.state_dict().items()}
        tensors |= {f"critic.{name}": tensor for name, tensor in self.critic.state_dict().items()}
        tensors |= {f"target_critic.{name}": tensor for name, tensor in self.target_critic.state_dict().items()}
        for name, optimiser in self._optimisers.items():
            for index, moments in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{name}.{index}.{key}": tensor for key, tensor in moments.items()}
        tensors["generator"] = self._generator.get_state()
        tensors["steps_done"] = torch.tensor([self.mixture_steps_done, self.policy_steps_done])
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `state()` gave, on the same data and configuration."""
        for prefix, module in (
            ("policy.", self.policy),
            ("critic.", self.critic),
            ("target_critic.", self.target_critic),
        ):
            module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        for name, optimiser in self._optimisers.items():
            prefix = f"optimiser.{name}."
            moments: dict[int, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                if key.startswith(prefix):
                    index, moment = key.removeprefix(prefix).split(".")
                    moments.setdefault(int(index), {})[moment] = tensor
            optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
        self._generator.set_state(tensors["generator"])
        self.mixture_steps_done, self.policy_steps_done = tensors["steps_done"].tolist()
        self._mixture_cache = None
