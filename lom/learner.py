"""Learns a LOM policy from transitions, in two stages.

1. mixture: the behaviour mixture (eq. 15), and behaviour cloning beside it. Then both are frozen.
2. policy: per step one critic update (eq. 16), one hyper-critic update (eq. 17) and one actor update (eq. 18), on
   three independent minibatches, in the order of the authors' code. `advantage_baseline="hyper"` adds critics of the
   greedy hyper-policy, on the critics' minibatch.

Every random number comes from one generator whose state is part of `state()`: a resumed run continues to the same
result as one that was never stopped.
"""

import copy
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lom import losses, signatures
from lom.config import TrainConfig
from lom.dataset import DatasetError, Transitions
from lom.mode_selection import ModeChoice, gather_component, select_mode
from lom.networks import Critic, Mixture
from lom.policy import LomPolicy

Stage = Literal["mixture", "policy"]
Metrics = dict[str, float]

_TARGET_NOISE_CLIP = 0.5
_TARGET_UPDATE_EVERY = 2
_MEANS_SEEDING_ROWS = 4096
_CACHE_CHUNK_ROWS = 8192
_SIGN_ROWS = 2048


class LearningDivergedError(RuntimeError):
    """A loss became NaN or infinite; the message names it and the step."""


def _decay(done: int, total: int, share: float) -> float:
    """The learning rate's factor: 1, then linearly down to 0 over the last `share` of all steps."""
    return 1.0 if share == 0 else min(1.0, (1.0 - done / total) / share)


@torch.no_grad()
def _move(network: nn.Module, towards: nn.Module, share: float) -> None:
    torch._foreach_lerp_(list(network.parameters()), list(towards.parameters()), share)


class _Batch(NamedTuple):
    observations: Tensor
    actions: Tensor
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
        if config.initial_means == "data":
            seeding_rows = torch.randperm(self._rows, generator=self._generator)[:_MEANS_SEEDING_ROWS]
            self.policy.mixture.initialise_means(self._actions[seeding_rows], self._generator)
        # What descends; the policy's own networks are these, or their averages.
        averaged = config.averaging_steps > 0
        self.actor = copy.deepcopy(self.policy.actor) if averaged else self.policy.actor
        self.hyper_critic = copy.deepcopy(self.policy.hyper_critic) if averaged else self.policy.hyper_critic
        self._modules: dict[str, nn.Module] = {
            "policy": self.policy,
            "critic": self.critic,
            "target_critic": self.target_critic,
        }
        if averaged:
            self._modules |= {"learned_actor": self.actor, "learned_hyper_critic": self.hyper_critic}

        def adam(network: nn.Module, learning_rate: float) -> torch.optim.Adam:
            return torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)

        self._optimisers = {
            "mixture": adam(self.policy.mixture, config.mixture_learning_rate),
            "bc": adam(self.policy.bc, config.mixture_learning_rate),
            "critic": adam(self.critic, config.critic_learning_rate),
            "hyper_critic": adam(self.hyper_critic, config.hyper_learning_rate),
            "actor": adam(self.actor, config.actor_learning_rate),
        }
        if config.advantage_baseline == "hyper":
            self.greedy_critic = copy.deepcopy(self.critic)
            self.target_greedy_critic = copy.deepcopy(self.target_critic)
            self._modules |= {"greedy_critic": self.greedy_critic, "target_greedy_critic": self.target_greedy_critic}
            self._optimisers["greedy_critic"] = adam(self.greedy_critic, config.critic_learning_rate)
        self._mixture_cache: Mixture | None = None
        self._latest: dict[str, Tensor] = {}
        self._decay = 1.0

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
        config = self.config
        self._decay = _decay(self.mixture_steps_done, config.mixture_steps, config.mixture_decay_share)
        rows = self._sample(self._rows, config.mixture_batch)
        observations, actions = self._observations[rows], self._actions[rows]
        mixture_loss = self.policy.mixture.negative_log_likelihood(observations, actions)
        self._descend("mixture", mixture_loss, config.mixture_learning_rate)
        bc_loss = (self.policy.bc(observations) - actions).square().mean()
        self._descend("bc", bc_loss, config.mixture_learning_rate)
        self._latest = {"mixture/nll": mixture_loss.detach(), "bc/loss": bc_loss.detach()}

    # ---------------------------------------------------------------- stage 2

    def _policy_step(self) -> None:
        config = self.config
        self._decay = _decay(self.policy_steps_done, config.steps, config.decay_share)
        rows = self._sarsa_rows[self._sample(len(self._sarsa_rows), config.batch)]
        self._latest = {"critic/loss": self._critic_step(rows)}
        if config.advantage_baseline == "hyper":
            self._latest["greedy_critic/loss"] = self._greedy_critic_step(rows)
        self._latest["hyper_critic/loss"] = self._hyper_critic_step()
        self._actor_step()
        if self.policy_steps_done % _TARGET_UPDATE_EVERY == 0:
            _move(self.target_critic, self.critic, config.target_update_rate)
            if config.advantage_baseline == "hyper":
                _move(self.target_greedy_critic, self.greedy_critic, config.target_update_rate)
        if config.averaging_steps > 0:
            share = 1.0 / min(self.policy_steps_done + 1, config.averaging_steps)
            _move(self.policy.actor, self.actor, share)
            _move(self.policy.hyper_critic, self.hyper_critic, share)

    def _critic_step(self, rows: Tensor) -> Tensor:
        """Values of the behaviour: bootstraps with the action that the data took next (eq. 16)."""
        config = self.config
        next_actions = self._next_actions[rows]
        if config.target_noise_std > 0:
            noise = config.target_noise_std * self._normal(next_actions.shape)
            next_actions = (next_actions + noise.clamp(-_TARGET_NOISE_CLIP, _TARGET_NOISE_CLIP)).clamp(-1.0, 1.0)
        return self._temporal_difference("critic", self.critic, self.target_critic, rows, next_actions)

    @torch.no_grad()
    def _next_greedy_actions(self, rows: Tensor) -> Tensor:
        """One sample of the mode that the greedy hyper-policy chooses at s', clipped as every sample."""
        observations = self._next_observations[rows]
        mixture: Mixture = self.policy.mixture(observations)
        choice = self._choose(self.hyper_critic(observations), mixture)
        return self._sample_components(
            gather_component(mixture.means, choice.mode), gather_component(mixture.log_stds, choice.mode)
        )

    def _greedy_critic_step(self, rows: Tensor) -> Tensor:
        """Values of the greedy hyper-policy: bootstraps with an action of the mode chosen at s'."""
        next_actions = self._next_greedy_actions(rows)
        return self._temporal_difference(
            "greedy_critic", self.greedy_critic, self.target_greedy_critic, rows, next_actions
        )

    def _temporal_difference(
        self, name: str, critic: Critic, target_critic: Critic, rows: Tensor, next_actions: Tensor
    ) -> Tensor:
        with torch.no_grad():
            next_values = target_critic(self._next_observations[rows], next_actions)
            targets = losses.sarsa_target(self._rewards[rows], self._terminals[rows], next_values, self.config.discount)
        loss = losses.critic_loss(critic(self._observations[rows], self._actions[rows]), targets)
        self._descend(name, loss, self.config.critic_learning_rate)
        return loss.detach()

    def _hyper_critic_step(self) -> Tensor:
        batch = self._batch(self.config.hyper_batch)
        with torch.no_grad():
            samples = self._sample_components(batch.mixture.means, batch.mixture.log_stds)
            sampled_values = self._value(self.critic, batch.observations, samples)
        loss = losses.hyper_critic_loss(self.hyper_critic(batch.observations), sampled_values)
        self._descend("hyper_critic", loss, self.config.hyper_learning_rate)
        return loss.detach()

    def _actor_step(self) -> None:
        config = self.config
        batch = self._batch(config.batch)
        actions = self.actor(batch.observations)
        with torch.no_grad():
            hyper_q = self.hyper_critic(batch.observations)
            choice = self._choose(hyper_q, batch.mixture)
            mode_mean = gather_component(batch.mixture.means, choice.mode)
            mode_log_std = gather_component(batch.mixture.log_stds, choice.mode)
            imitated = self._imitated_actions(mode_mean, mode_log_std, batch.actions)
            advantages = self._advantages(batch.observations, imitated, mode_mean, actions)
            sharpness, ceiling = config.inverse_temperature, config.max_imitation_weight
            weights = losses.imitation_weights(advantages, sharpness, ceiling)
            if config.imitation_samples == 1:
                target, row_weights = imitated[:, 0], weights[:, 0]
            else:
                target = losses.self_normalised_target(imitated, advantages, sharpness, ceiling)
                row_weights = torch.ones(len(target))
            if config.imitated_actions == "data":
                brought_forth = batch.mixture.responsibilities(batch.actions)
                row_weights = row_weights * brought_forth.gather(1, choice.mode.unsqueeze(1)).squeeze(1)
        loss = losses.weighted_imitation_loss(actions, target, row_weights)
        self._descend("actor", loss, config.actor_learning_rate)
        self._latest |= {
            "actor/loss": loss.detach(),
            "actor/mean_weight": weights.mean(),
            "actor/clipped_weights": (weights >= ceiling).float().mean(),
            "actor/distance_to_mode_mean": (actions.detach() - mode_mean).norm(dim=-1).mean(),
            "hyper_critic/mean_q": hyper_q.mean(),
            "hyper_critic/margin": torch.nanmean(choice.margin).nan_to_num(0.0),
            "hyper_critic/mask_overruled": choice.overruled.float().mean(),
        }

    def _choose(self, hyper_q: Tensor, mixture: Mixture) -> ModeChoice:
        return select_mode(hyper_q, mixture.log_weights.exp(), self.config.effective_min_mixing_weight)

    def _imitated_actions(self, mode_mean: Tensor, mode_log_std: Tensor, data_actions: Tensor) -> Tensor:
        """Actions of the chosen mode, or those of the data, float32[B, n, A]."""
        if self.config.imitated_actions == "data":
            imitated = data_actions.unsqueeze(1)
        else:
            shape = (-1, self.config.imitation_samples, -1)
            imitated = self._sample_components(
                mode_mean.unsqueeze(1).expand(shape), mode_log_std.unsqueeze(1).expand(shape)
            )
        if self.config.imitation_noise_std > 0:
            noise = self.config.imitation_noise_std * self._normal(imitated.shape)
            imitated = (imitated + noise).clamp(-1.0, 1.0)
        return imitated

    def _advantages(self, observations: Tensor, imitated: Tensor, mode_mean: Tensor, actions: Tensor) -> Tensor:
        """What the imitated actions are worth more than the baseline, float32[B, n]."""
        baseline = self.config.advantage_baseline
        critic = self.greedy_critic if baseline == "hyper" else self.critic
        compared_with = actions if baseline == "policy" else mode_mean
        values = self._value(critic, observations, imitated)
        advantages = values - self._value(critic, observations, compared_with.unsqueeze(1))
        return losses.normalised_advantages(advantages) if self.config.normalise_advantages else advantages

    # ---------------------------------------------------------------- shared

    def _sample(self, population: int, count: int) -> Tensor:
        return torch.randint(population, (count,), generator=self._generator)

    def _normal(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def _value(self, critic: Critic, observations: Tensor, actions: Tensor) -> Tensor:
        """Values of several actions of each row: float32[B, O] and float32[B, n, A] -> [B, n]."""
        repeated = observations.unsqueeze(1).expand(-1, actions.shape[1], -1)
        return losses.reduced_value(critic(repeated, actions), self.config.critic_reduction)

    def _sample_components(self, means: Tensor, log_stds: Tensor) -> Tensor:
        """One sample, clipped to the action space: the action that is valued is the action that is imitated."""
        return (means + log_stds.exp() * self._normal(means.shape)).clamp(-1.0, 1.0)

    @torch.no_grad()
    def _batch(self, count: int) -> _Batch:
        """Observations with the frozen mixture's parameters there, from the cache where the dataset fits in it."""
        rows = self._sample(self._rows, count)
        observations, actions = self._observations[rows], self._actions[rows]
        config, action_dim = self.config, self._actions.shape[1]
        cache_bytes = 4 * self._rows * config.num_components * (2 * action_dim + 1)
        if self._mixture_cache is None and cache_bytes <= config.mixture_cache_bytes:
            self._mixture_cache = self._computed_mixture()
        if self._mixture_cache is None:
            return _Batch(observations, actions, self.policy.mixture(observations))
        return _Batch(observations, actions, Mixture(*(part[rows] for part in self._mixture_cache)))

    def _computed_mixture(self) -> Mixture:
        """At every row, filled in place: joining chunks would hold it twice."""
        whole: Mixture | None = None
        for first in range(0, self._rows, _CACHE_CHUNK_ROWS):
            rows = slice(first, first + _CACHE_CHUNK_ROWS)
            chunk: Mixture = self.policy.mixture(self._observations[rows])
            whole = whole or Mixture(*(part.new_empty(self._rows, *part.shape[1:]) for part in chunk))
            for part, part_of_chunk in zip(whole, chunk, strict=True):
                part[rows] = part_of_chunk
        assert whole is not None
        return whole

    def _descend(self, name: str, loss: Tensor, learning_rate: float) -> None:
        optimiser = self._optimisers[name]
        optimiser.param_groups[0]["lr"] = self._decay * learning_rate
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

    @torch.no_grad()
    def signs(self) -> Metrics:
        """The numbers of `lom.signatures` on a fixed part of the data; costs about as much as a few steps.

        In the first stage those of the mixture alone. Training goes on as if it had not been asked.
        """
        random_state = self._generator.get_state()
        rows = torch.randperm(self._rows, generator=torch.Generator().manual_seed(self.config.seed))[:_SIGN_ROWS]
        observations = self._observations[rows]
        mixture: Mixture = self.policy.mixture(observations)
        values = {
            "signs/mixture_misfit": signatures.mixture_misfit(mixture, self._actions[rows], self._generator),
        }
        if self.policy_steps_done > 0:
            choice = self._choose(self.policy.hyper_critic(observations), mixture)
            mode_mean, mode_log_std = (gather_component(p, choice.mode) for p in (mixture.means, mixture.log_stds))
            actions = self.policy.actor(observations)
            imitated = self._imitated_actions(mode_mean, mode_log_std, self._actions[rows])
            weights = losses.imitation_weights(
                self._advantages(observations, imitated, mode_mean, actions),
                self.config.inverse_temperature,
                self.config.max_imitation_weight,
            )
            values |= {
                "signs/narrow_modes": signatures.narrow_modes(mode_log_std),
                "signs/unsupported_modes": signatures.unsupported_modes(mixture.log_weights.exp(), choice.mode),
                "signs/saturated_weights": signatures.saturated_weights(weights, self.config.max_imitation_weight),
                "signs/actor_disagreement": signatures.actor_disagreement(actions, mode_mean),
            }
        self._generator.set_state(random_state)
        return values

    # ---------------------------------------------------------------- resuming

    def state(self) -> dict[str, Tensor]:
        """Everything that training depends on, as flat tensors by name."""
        tensors = {
            f"{part}.{name}": tensor
            for part, module in self._modules.items()
            for name, tensor in module.state_dict().items()
        }
        for name, optimiser in self._optimisers.items():
            for index, moments in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{name}.{index}.{key}": tensor for key, tensor in moments.items()}
        tensors["generator"] = self._generator.get_state()
        tensors["steps_done"] = torch.tensor([self.mixture_steps_done, self.policy_steps_done])
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `state()` gave, on the same data and configuration."""
        for part, module in self._modules.items():
            prefix = f"{part}."
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
