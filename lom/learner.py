"""Learns a LOM policy from transitions, in two stages.

1. mixture: the behaviour mixture (eq. 15), and behaviour cloning beside it. Then both are frozen.
2. policy: per step one critic update (eq. 16), one hyper-critic update (eq. 17) and one actor update (eq. 18), on
   three independent minibatches, in the order of the authors' code. `advantage_baseline="hyper"` adds critics of the
   greedy hyper-policy, on the critics' minibatch.

Every random number of a run comes from one generator whose state is part of `state()`: a resumed run continues to the
same result as one that was never stopped.

Several runs that differ in seed, and perhaps in data, train as one: every tensor has a seed axis in front, written
`...` in shapes (one run has none). Each run keeps its own generator, data order and statistics, and losses are summed,
so a run among others takes the steps that it takes alone, up to rounding.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lom import losses, signatures
from lom.config import TrainConfig
from lom.dataset import DatasetError, Transitions
from lom.mode_selection import ModeChoice, behaviour_value, gather_component, hyper_spread
from lom.networks import Critic, Mixture, stacked
from lom.policy import LomPolicy
from lom.returns import mean_horizon, multi_step

Stage = Literal["mixture", "policy"]
Metrics = dict[str, float]

_TARGET_NOISE_CLIP = 0.5
_TARGET_UPDATE_EVERY = 2
_MEANS_SEEDING_ROWS = 4096
_CACHE_CHUNK_ROWS = 8192
_SIGN_ROWS = 2048
_AVERAGED_STEPS = 100
_NOISE_PRICE = 0.5  # of hyper-Q's spread
_CACHE_FLOATS = 1 << 19
_NOT_NETWORKS = ("optimiser", "generator", "steps_done")


class LearningDivergedError(RuntimeError):
    """A loss became NaN or infinite; the message names it, the step and, among several runs, the seed."""


class _Networks(nn.Module):
    """All networks of one run, by their names in its checkpoint. Only random until data was seen."""

    def __init__(self, config: TrainConfig, observation_dim: int, action_low: Tensor, action_high: Tensor) -> None:
        super().__init__()
        self.policy = LomPolicy(config, observation_dim, action_low, action_high)
        self.critic = Critic(observation_dim, action_low.numel(), config.num_critics, config.hidden)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.mean_square_advantage: Tensor | None
        self.register_buffer("mean_square_advantage", torch.zeros(1, 1) if config.max_drift > 0 else None)
        if config.averaging_steps > 0:  # then the policy's own are averages of these
            self.learned_actor = copy.deepcopy(self.policy.actor)
            self.learned_hyper_critic = copy.deepcopy(self.policy.hyper_critic)
        if config.advantage_baseline == "hyper":
            self.greedy_critic = copy.deepcopy(self.critic)
            self.target_greedy_critic = copy.deepcopy(self.target_critic)


def _decay(done: int, total: int, share: float) -> float:
    """The learning rate's factor: 1, then linearly down to 0 over the last `share` of all steps."""
    return 1.0 if share == 0 else min(1.0, (1.0 - done / total) / share)


def _share_of(done: int, total: float) -> float:
    """How much of `total` is done, 1 at most; all of nothing."""
    return min(1.0, done / total) if total > 0 else 1.0


def chosen_device(name: str) -> torch.device:
    """`auto` is a GPU where torch sees one.

    Raises:
        ValueError: cuda, and torch sees none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device: expected auto or cpu, got 'cuda': torch sees no such device here")
    return torch.device("cuda" if name != "cpu" and available else "cpu")


def free_memory(device: torch.device) -> float:
    """Bytes that may still be allocated there; infinite where nobody tells."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return math.inf


def cached_row_bytes(config: TrainConfig, action_dim: int) -> int:
    """What the frozen mixture says of one row, in bytes: parameters, and the shares that a choice asks for."""
    return 4 * config.num_components * (2 * action_dim + 1 + (config.effective_hazard > 0))


def _taken(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows of float32[N, ...] by index, int64[..., B] -> [..., B, ...]."""
    return tensor.index_select(0, rows.flatten()).view(*rows.shape, *tensor.shape[1:])


def _inside_bounds(unit_actions: Tensor) -> Tensor:
    return unit_actions.clamp(-1.0, 1.0)


def _sarsa_rows(transitions: Transitions) -> Tensor:
    """Rows with a target. One that was cut off without a next action has none; it still shows states and actions."""
    rows = torch.from_numpy(transitions.terminals | transitions.has_next_action).nonzero().squeeze(1)
    if len(rows) == 0:
        raise DatasetError(
            "expected transitions with a next action or a terminal state, got none: are all of them timeouts?"
        )
    return rows


@torch.no_grad()
def _move(network: nn.Module, towards: nn.Module, share: float) -> None:
    torch._foreach_lerp_(list(network.parameters()), list(towards.parameters()), share)


class _Rows(NamedTuple):
    """What is learned from, float32[N, ...] each; of several runs one after the other. Unit actions."""

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    discounts: Tensor
    next_observations: Tensor
    next_actions: Tensor


class _Population:
    """How many there are to draw from in every run, of tensors that hold one run's after the other's."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes = tuple(sizes)
        self.starts = torch.tensor([0, *itertools.accumulate(sizes[:-1])], device=device).unsqueeze(1)


class _Batch(NamedTuple):
    rows: Tensor
    observations: Tensor
    actions: Tensor
    mixture: Mixture


class Learner:
    """Owns networks, optimisers and data of one run, or of several that train as one. One thread.

    Args:
        transitions: the data of the run; of several runs one for each, in the order of `seeds`.
        config: of all runs; its seed is that of one run.
        action_low, action_high: bounds in environment units, float32[A].
        seeds: of several runs. Without them there is one, whose tensors have no seed axis.

    Raises:
        DatasetError: no row of a run has a target (eq. 16).

    Attributes:
        policies: of every run. Views on what is trained, so they learn meanwhile.
    """

    def __init__(
        self,
        transitions: Transitions | Iterable[Transitions],
        config: TrainConfig,
        action_low: Tensor,
        action_high: Tensor,
        seeds: Sequence[int] = (),
    ) -> None:
        self.config = config
        self.seeds = tuple(seeds) or (config.seed,)
        self.device = chosen_device(config.device)
        self.mixture_steps_done = 0
        self.policy_steps_done = 0
        self._axes = (len(seeds),) if seeds else ()
        self._generators = [torch.Generator(self.device).manual_seed(seed) for seed in self.seeds]
        self._networks_of_runs: list[_Networks] = []
        horizons: list[float] = []
        rows_of_runs: list[_Rows] = []
        sarsa_rows_of_runs: list[Tensor] = []
        data = [transitions] if isinstance(transitions, Transitions) else transitions
        for seed, generator, own in zip(self.seeds, self._generators, data, strict=True):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                networks = _Networks(config.for_rows(len(own)), own.observations.shape[1], action_low, action_high).to(
                    self.device
                )
            horizons.append(mean_horizon(own, config.discount))
            rows = self._converted(own, networks.policy)
            if config.initial_means == "data":
                seeding = torch.randperm(len(own), generator=generator, device=self.device)[:_MEANS_SEEDING_ROWS]
                networks.policy.mixture.initialise_means(rows.actions[seeding], generator)
            self._networks_of_runs.append(networks)
            sarsa_rows_of_runs.append(_sarsa_rows(own) + sum(len(before.rewards) for before in rows_of_runs))
            rows_of_runs.append(rows)
        self._horizons = torch.tensor(horizons, device=self.device).view(*self._axes, 1, 1)
        self._all_rows = _Population([len(rows.rewards) for rows in rows_of_runs], self.device)
        self._rows_with_target = _Population([len(rows) for rows in sarsa_rows_of_runs], self.device)
        self._sarsa_rows = torch.cat(sarsa_rows_of_runs).to(self.device)
        fields = [list(parts) for parts in zip(*rows_of_runs, strict=True)]
        rows_of_runs.clear()  # joined one field at a time: not all of the data should be held twice
        joined = []
        while fields:
            parts = fields.pop(0)
            joined.append(torch.cat(parts) if seeds else parts[0])
        self._rows = _Rows(*joined)
        self.policies = [networks.policy for networks in self._networks_of_runs]
        self._networks = stacked(self._networks_of_runs) if seeds else self._networks_of_runs[0]
        self.critic, self.target_critic = self._networks.critic, self._networks.target_critic
        averaged, policy = config.averaging_steps > 0, self._networks.policy
        self.actor = self._networks.learned_actor if averaged else policy.actor
        self.hyper_critic = self._networks.learned_hyper_critic if averaged else policy.hyper_critic

        def adam(network: nn.Module, learning_rate: float) -> torch.optim.Adam:
            return torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)

        self._optimisers = {
            "mixture": adam(policy.mixture, config.mixture_learning_rate),
            "bc": adam(policy.bc, config.mixture_learning_rate),
            "critic": adam(self.critic, config.critic_learning_rate),
            "hyper_critic": adam(self.hyper_critic, config.hyper_learning_rate),
            "actor": adam(self.actor, config.actor_learning_rate),
        }
        if config.advantage_baseline == "hyper":
            self.greedy_critic = self._networks.greedy_critic
            self.target_greedy_critic = self._networks.target_greedy_critic
            self._optimisers["greedy_critic"] = adam(self.greedy_critic, config.critic_learning_rate)
        self._mixture_cache: Mixture | None = None
        self._log_shares_cache: Tensor | None = None
        self._latest: dict[str, Callable[[], Tensor]] = {}
        self._decay = 1.0

    @property
    def policy(self) -> LomPolicy:
        """Of the only run.

        Raises:
            ValueError: there are several.
        """
        (policy,) = self.policies
        return policy

    def _converted(self, transitions: Transitions, policy: LomPolicy) -> _Rows:
        """Fits the normaliser; gives the rows in the units of the networks, on the device."""

        def tensor(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(self.device)

        observations = tensor(transitions.observations)
        policy.normaliser.fit(observations)
        rewards, last, discounts = multi_step(transitions, self.config.n_step, self.config.discount)
        return _Rows(
            observations=policy.normaliser(observations),
            actions=policy.action_scaler.to_unit(tensor(transitions.actions)),
            rewards=tensor(rewards).float() * self.config.reward_scale,
            discounts=tensor(discounts * ~transitions.terminals[last]).float(),
            next_observations=policy.normaliser(tensor(transitions.next_observations[last])),
            next_actions=policy.action_scaler.to_unit(tensor(transitions.next_actions[last])),
        )

    def remaining(self) -> Iterator[tuple[Stage, int]]:
        """Runs one gradient step per item; yields the stage and its steps done so far. Stop and go on at will."""
        while self.mixture_steps_done < self.config.mixture_steps:
            self._mixture_step()
            self.mixture_steps_done += 1
            yield "mixture", self.mixture_steps_done
        if self.policy_steps_done == 0:
            self._latest = {}
        while self.policy_steps_done < self.config.steps:
            self._policy_step()
            self.policy_steps_done += 1
            yield "policy", self.policy_steps_done

    # ---------------------------------------------------------------- stage 1

    def _mixture_step(self) -> None:
        config = self.config
        self._decay = _decay(self.mixture_steps_done, config.mixture_steps, config.mixture_decay_share)
        policy = self._networks.policy
        rows = self._sample(self._all_rows, config.mixture_batch)
        observations, actions = _taken(self._rows.observations, rows), _taken(self._rows.actions, rows)
        widened = _share_of(self.mixture_steps_done, config.widening_share * config.mixture_steps)
        mixture_loss = policy.mixture.negative_log_likelihood(observations, actions, widened)
        self._descend("mixture/nll", [mixture_loss], config.mixture_learning_rate)
        bc_loss = (policy.bc(observations) - actions).square().mean(dim=(-2, -1))
        self._descend("bc/loss", [bc_loss], config.mixture_learning_rate)

    # ---------------------------------------------------------------- stage 2

    def _policy_step(self) -> None:
        config = self.config
        self._decay = _decay(self.policy_steps_done, config.steps, config.decay_share)
        rows = _taken(self._sarsa_rows, self._sample(self._rows_with_target, config.batch))
        self._critic_step(rows)
        if config.advantage_baseline == "hyper":
            self._greedy_critic_step(rows)
        self._hyper_critic_step()
        self._actor_step()
        if self.policy_steps_done % _TARGET_UPDATE_EVERY == 0:
            _move(self.target_critic, self.critic, config.target_update_rate)
            if config.advantage_baseline == "hyper":
                _move(self.target_greedy_critic, self.greedy_critic, config.target_update_rate)
        if config.averaging_steps > 0:
            share = 1.0 / min(self.policy_steps_done + 1, config.averaging_steps)
            _move(self._networks.policy.actor, self.actor, share)
            _move(self._networks.policy.hyper_critic, self.hyper_critic, share)

    def _critic_step(self, rows: Tensor) -> None:
        """Values of the behaviour: bootstraps with the action that the data took next (eq. 16)."""
        config = self.config
        next_actions = _taken(self._rows.next_actions, rows)
        if config.target_noise_std > 0:
            noise = config.target_noise_std * self._normal_like(next_actions)
            next_actions = _inside_bounds(next_actions + noise.clamp(-_TARGET_NOISE_CLIP, _TARGET_NOISE_CLIP))
        self._temporal_difference("critic", self.critic, self.target_critic, rows, next_actions)

    @torch.no_grad()
    def _next_greedy_actions(self, rows: Tensor) -> Tensor:
        """One sample of the mode that the greedy hyper-policy chooses at s', clipped as every sample."""
        observations = _taken(self._rows.next_observations, rows)
        mixture: Mixture = self._networks.policy.mixture(observations)
        choice = self._choose(self.hyper_critic(observations), mixture)
        return self._sample_components(
            gather_component(mixture.means, choice.mode), gather_component(mixture.log_stds, choice.mode)
        )

    def _greedy_critic_step(self, rows: Tensor) -> None:
        """Values of the greedy hyper-policy: bootstraps with an action of the mode chosen at s'."""
        next_actions = self._next_greedy_actions(rows)
        self._temporal_difference("greedy_critic", self.greedy_critic, self.target_greedy_critic, rows, next_actions)

    def _temporal_difference(
        self, name: str, critic: Critic, target_critic: Critic, rows: Tensor, next_actions: Tensor
    ) -> None:
        observations, actions, rewards, discounts, next_observations = (_taken(part, rows) for part in self._rows[:-1])
        with torch.no_grad():
            next_values = target_critic(next_observations, next_actions)
            targets = losses.sarsa_target(rewards, discounts, next_values)
        loss = losses.critic_loss(critic(observations, actions), targets)
        self._descend(f"{name}/loss", [loss], self.config.critic_learning_rate)

    def _hyper_critic_step(self) -> None:
        count = self.config.hyper_batch
        batch = self._batch(count)
        with torch.no_grad():
            samples = self._sample_components(batch.mixture.means, batch.mixture.log_stds)
            sampled_values = self._value(self.critic, batch.observations, samples)
        outputs = 1 if self.config.hyper_head == "components" else self.config.num_components
        rows = self._rows_in_cache(outputs)
        pieces = (
            losses.hyper_critic_loss(self.hyper_critic(observations), values) * (observations.shape[-2] / count)
            for observations, values in zip(
                torch.split(batch.observations, rows, -2), torch.split(sampled_values, rows, -2), strict=True
            )
        )
        self._descend("hyper_critic/loss", pieces, self.config.hyper_learning_rate)

    def _actor_step(self) -> None:
        config, policy = self.config, self._networks.policy
        batch = self._batch(config.batch)
        output = self.actor(batch.observations)
        with torch.no_grad():
            hyper_q = self.hyper_critic(batch.observations)
            mixing_weights = batch.mixture.log_weights.exp()
            self._follow_values(hyper_q, mixing_weights)
            log_shares = self._log_shares(batch)
            choice = policy.choose(hyper_q, mixing_weights, log_shares)
            mode_mean = gather_component(batch.mixture.means, choice.mode)
            mode_log_std = gather_component(batch.mixture.log_stds, choice.mode)
            actions = policy.actor_action(output, mode_mean, mode_log_std)
            imitated = self._imitated_actions(mode_mean, mode_log_std, batch.actions)
            advantages = self._advantages(batch.observations, imitated, mode_mean, actions)
            self._follow_advantages(advantages)
            sharpness, ceiling = self._sharpness(), config.max_imitation_weight
            weights = losses.imitation_weights(advantages, sharpness, ceiling)
            if config.imitation_samples == 1:
                target, row_weights = imitated[..., 0, :], weights[..., 0]
            else:
                target = losses.self_normalised_target(imitated, advantages, sharpness, ceiling)
                row_weights = torch.ones_like(weights[..., 0])
            if config.imitated_actions == "data":
                brought_forth = batch.mixture.responsibilities(batch.actions, config.bound_margin)
                row_weights = row_weights * brought_forth.gather(-1, choice.mode.unsqueeze(-1)).squeeze(-1)
            target = policy.actor_output(target, mode_mean, mode_log_std)
        loss = losses.weighted_imitation_loss(output, target, row_weights)
        self._descend("actor/loss", [loss], config.actor_learning_rate)
        if log_shares is not None:
            self._latest["hyper_critic/share"] = lambda: (
                log_shares.exp().gather(-1, choice.mode.unsqueeze(-1)).mean(dim=(-2, -1))
            )
        self._latest |= {
            "actor/inverse_temperature": lambda: sharpness[..., 0, 0],
            "actor/mean_weight": lambda: weights.mean(dim=(-2, -1)),
            "actor/clipped_weights": lambda: (weights >= ceiling).float().mean(dim=(-2, -1)),
            "actor/distance_to_mode_mean": lambda: (actions - mode_mean).norm(dim=-1).mean(dim=-1),
            "hyper_critic/mean_q": lambda: hyper_q.mean(dim=(-2, -1)),
            "hyper_critic/margin": lambda: torch.nanmean(choice.margin, dim=-1).nan_to_num(0.0),
            "hyper_critic/mask_overruled": lambda: choice.overruled.float().mean(dim=-1),
        }

    def _follow_values(self, hyper_q: Tensor, mixing_weights: Tensor) -> None:
        """What a choice may cost: the worst value that a state has, and what hyper-Q's noise asks for."""
        policy = self._networks.policy
        if policy.worst_value is not None and policy.noise_price is not None:
            values = behaviour_value(hyper_q, mixing_weights)
            self._follow(policy.worst_value, values.amin(dim=-2, keepdim=True))
            self._follow(policy.noise_price, _NOISE_PRICE * hyper_spread(hyper_q, mixing_weights)[..., None, None])

    def _follow_advantages(self, advantages: Tensor) -> None:
        mean_square = self._networks.mean_square_advantage
        if mean_square is not None:
            self._follow(mean_square, advantages.square().mean(dim=(-2, -1), keepdim=True))

    def _follow(self, average: Tensor, latest: Tensor) -> None:
        """Over the last steps: a unit must neither jump nor lag behind what it measures."""
        average.lerp_(latest, 1.0 / min(self.policy_steps_done + 1, _AVERAGED_STEPS))

    def _sharpness(self) -> Tensor:
        """β, or less where that would lead too far from the mode: float32[..., 1, 1]."""
        config, mean_square = self.config, self._networks.mean_square_advantage
        if mean_square is None:
            return torch.full_like(self._horizons, config.inverse_temperature)
        return losses.limited_inverse_temperature(
            config.inverse_temperature, config.max_drift, self._horizons, mean_square.sqrt()
        )

    def _choose(self, hyper_q: Tensor, mixture: Mixture) -> ModeChoice:
        policy = self._networks.policy
        return policy.choose(hyper_q, mixture.log_weights.exp(), policy.log_shares(mixture))

    def _imitated_actions(self, mode_mean: Tensor, mode_log_std: Tensor, data_actions: Tensor) -> Tensor:
        """Actions of the chosen mode, or those of the data, float32[..., B, n, A].

        Before they are clipped where the actor's own action is clipped, too: at a bound the mean of clipped samples
        lies inside it, and an actor that imitated them would shrink from every bound.
        """

        def clipped(actions: Tensor) -> Tensor:
            return actions if self._networks.policy.is_residual else _inside_bounds(actions)

        if self.config.imitated_actions == "data":
            imitated = data_actions.unsqueeze(-2)
        else:
            mean, log_std = (
                each.unsqueeze(-2).repeat_interleave(self.config.imitation_samples, dim=-2)
                for each in (mode_mean, mode_log_std)
            )
            imitated = clipped(mean + log_std.exp() * self._normal_like(mean))
        if self.config.imitation_noise_std > 0:
            imitated = clipped(imitated + self.config.imitation_noise_std * self._normal_like(imitated))
        return imitated

    def _advantages(self, observations: Tensor, imitated: Tensor, mode_mean: Tensor, actions: Tensor) -> Tensor:
        """What the imitated actions, clipped, are worth more than the baseline, float32[..., B, n]."""
        baseline = self.config.advantage_baseline
        critic = self.greedy_critic if baseline == "hyper" else self.critic
        compared_with = actions if baseline == "policy" else mode_mean
        values = self._value(critic, observations, _inside_bounds(imitated))
        advantages = values - self._value(critic, observations, compared_with.unsqueeze(-2))
        return losses.normalised_advantages(advantages) if self.config.normalise_advantages else advantages

    # ---------------------------------------------------------------- shared

    def _sample(self, population: _Population, count: int) -> Tensor:
        """Indices of `count` of each run's own, int64[..., count]."""
        drawn = torch.empty(len(self.seeds), count, dtype=torch.int64, device=self.device)
        for own, size, generator in zip(drawn, population.sizes, self._generators, strict=True):
            own.random_(0, size, generator=generator)
        return (drawn + population.starts).view(*self._axes, count)

    def _normal_like(self, like: Tensor) -> Tensor:
        """Standard normal numbers, each run's from its own generator."""
        drawn = torch.empty(like.shape, device=self.device)
        for own, generator in zip(drawn.view(len(self.seeds), -1), self._generators, strict=True):
            own.normal_(generator=generator)
        return drawn

    def _value(self, critic: Critic, observations: Tensor, actions: Tensor) -> Tensor:
        """Values of several actions of each row: float32[..., B, O] and float32[..., B, n, A] -> [..., B, n].

        In pieces whose activations stay in the processor's cache: the whole would be mapped and cleared anew each time.
        """
        rows = self._rows_in_cache(actions.shape[-2])
        values = [
            critic(piece.unsqueeze(-2).expand(*own.shape[:-1], -1), own)
            for piece, own in zip(torch.split(observations, rows, -2), torch.split(actions, rows, -3), strict=True)
        ]
        return losses.reduced_value(torch.cat(values, dim=-2), self.config.critic_reduction)

    def _rows_in_cache(self, evaluations: int) -> int:
        """How many rows, each evaluated so many times, have a layer's activations in the cache."""
        return max(1, _CACHE_FLOATS // (len(self.seeds) * evaluations * max(self.config.hidden)))

    def _sample_components(self, means: Tensor, log_stds: Tensor) -> Tensor:
        """One sample, clipped to the action space: the action that is valued is the action that is imitated."""
        return _inside_bounds(means + log_stds.exp() * self._normal_like(means))

    @torch.no_grad()
    def _batch(self, count: int) -> _Batch:
        """Observations with what the frozen mixture says there, from the cache where the dataset fits in it."""
        rows = self._sample(self._all_rows, count)
        observations, actions = _taken(self._rows.observations, rows), _taken(self._rows.actions, rows)
        config, policy, (total, action_dim) = self.config, self._networks.policy, self._rows.actions.shape
        if self._mixture_cache is None and total * cached_row_bytes(config, action_dim) <= config.mixture_cache_bytes:
            self._mixture_cache = self._computed_mixture()
        if self._mixture_cache is None:
            return _Batch(rows, observations, actions, policy.mixture(observations))
        return _Batch(rows, observations, actions, Mixture(*(_taken(part, rows) for part in self._mixture_cache)))

    def _computed_mixture(self) -> Mixture:
        """At every row, filled in place: joining chunks would hold it twice."""
        whole: Mixture | None = None
        ends = torch.tensor(self._all_rows.sizes).cumsum(0).tolist()
        for policy, start, end in zip(self.policies, [0, *ends], ends, strict=False):
            for first in range(start, end, _CACHE_CHUNK_ROWS):
                rows = slice(first, min(first + _CACHE_CHUNK_ROWS, end))
                chunk: Mixture = policy.mixture(self._rows.observations[rows])
                whole = whole or Mixture(*(part.new_empty(ends[-1], *part.shape[1:]) for part in chunk))
                for part, part_of_chunk in zip(whole, chunk, strict=True):
                    part[rows] = part_of_chunk
        assert whole is not None
        return whole

    def _log_shares(self, batch: _Batch) -> Tensor | None:
        """That of the batch's mixture, kept where the mixture is."""
        policy = self._networks.policy
        if self._mixture_cache is None or policy.hazard == 0:
            return policy.log_shares(batch.mixture)
        if self._log_shares_cache is None:
            chunks = zip(*(torch.split(part, _CACHE_CHUNK_ROWS) for part in self._mixture_cache), strict=True)
            self._log_shares_cache = torch.cat([Mixture(*chunk).log_shares() for chunk in chunks])
        return _taken(self._log_shares_cache, batch.rows)

    def _descend(self, metric: str, pieces: Iterable[Tensor], learning_rate: float) -> None:
        """One step down the sum of a loss's pieces, of the network that the metric begins with; keeps the sum for it.

        A piece is float32[...]; its graph is gone before the next one is made.
        """
        optimiser = self._optimisers[metric.partition("/")[0]]
        optimiser.param_groups[0]["lr"] = self._decay * learning_rate
        optimiser.zero_grad(set_to_none=True)
        values: list[Tensor] = []
        for piece in pieces:
            piece.backward(torch.ones_like(piece))  # type: ignore[no-untyped-call]
            values.append(piece.detach())
        optimiser.step()
        self._latest[metric] = lambda: torch.stack(values).sum(dim=0)

    def metrics(self) -> Metrics:
        """As `metrics_of_runs`, of the only run."""
        (metrics,) = self.metrics_of_runs()
        return metrics

    def metrics_of_runs(self) -> list[Metrics]:
        """The last step's losses and signs of health, by name, of every run.

        Raises:
            LearningDivergedError: one of them is not finite.
        """
        columns = {name: value().reshape(-1).tolist() for name, value in self._latest.items()}
        for name, values in columns.items():
            for seed, value in zip(self.seeds, values, strict=True):
                if not math.isfinite(value):
                    which = f"seed {seed}: " if self._axes else ""
                    raise LearningDivergedError(
                        f"{which}{name}: expected a finite value, got {value} after {self.mixture_steps_done} mixture "
                        f"and {self.policy_steps_done} policy steps; lower the learning rates or scale the rewards"
                    )
        return [{name: values[run] for name, values in columns.items()} for run in range(len(self.seeds))]

    def signs(self) -> Metrics:
        """As `signs_of_runs`, of the only run."""
        (signs,) = self.signs_of_runs()
        return signs

    @torch.no_grad()
    def signs_of_runs(self) -> list[Metrics]:
        """The numbers of `lom.signatures` on a fixed part of the data, of every run; costs about as much as some steps.

        In the first stage those of the mixture alone. Training goes on as if it had not been asked.
        """
        random_states = [generator.get_state() for generator in self._generators]
        config, policy, count = self.config, self._networks.policy, min(_SIGN_ROWS, *self._all_rows.sizes)
        chosen = [
            torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]
            for size, seed in zip(self._all_rows.sizes, self.seeds, strict=True)
        ]
        rows = (torch.stack(chosen).to(self.device) + self._all_rows.starts).view(*self._axes, count)
        observations, data_actions = _taken(self._rows.observations, rows), _taken(self._rows.actions, rows)
        mixture: Mixture = policy.mixture(observations)
        mixtures = [Mixture(*parts) for parts in zip(*map(self._by_run, mixture), strict=True)]
        values = [
            {"signs/mixture_misfit": signatures.mixture_misfit(of_run, actions, generator)}
            for of_run, actions, generator in zip(mixtures, self._by_run(data_actions), self._generators, strict=True)
        ]
        if self.policy_steps_done > 0:
            choice = self._choose(policy.hyper_critic(observations), mixture)
            mode_mean, mode_log_std = (gather_component(p, choice.mode) for p in (mixture.means, mixture.log_stds))
            actions = policy.actor_action(policy.actor(observations), mode_mean, mode_log_std)
            imitated = self._imitated_actions(mode_mean, mode_log_std, data_actions)
            weights = losses.imitation_weights(
                self._advantages(observations, imitated, mode_mean, actions),
                self._sharpness(),
                config.max_imitation_weight,
            )
            seen = (mode_log_std, mixture.log_weights.exp(), choice.mode, weights, actions, mode_mean)
            for metrics, (log_std, mixing, mode, weight, action, mean) in zip(
                values, zip(*map(self._by_run, seen), strict=True), strict=True
            ):
                metrics |= {
                    "signs/narrow_modes": signatures.narrow_modes(log_std),
                    "signs/unsupported_modes": signatures.unsupported_modes(mixing, mode),
                    "signs/saturated_weights": signatures.saturated_weights(weight, config.max_imitation_weight),
                    "signs/actor_disagreement": signatures.actor_disagreement(action, mean),
                }
        for generator, random_state in zip(self._generators, random_states, strict=True):
            generator.set_state(random_state)
        return values

    def _by_run(self, tensor: Tensor) -> Tensor:
        """float32[..., rest] -> [S, rest], for one run too."""
        return tensor if self._axes else tensor.unsqueeze(0)

    # ---------------------------------------------------------------- resuming

    def state(self) -> dict[str, Tensor]:
        """As `states`, of the only run."""
        (state,) = self.states()
        return state

    def states(self) -> list[dict[str, Tensor]]:
        """Everything that training depends on, as flat tensors by name, of every run: a run alone has the same."""
        states = [dict(networks.state_dict()) for networks in self._networks_of_runs]
        for name, optimiser in self._optimisers.items():
            for index, moments in optimiser.state_dict()["state"].items():
                for key, tensor in moments.items():
                    shared = not self._axes or tensor.dim() == 0  # the count of steps
                    for run, state in enumerate(states):
                        state[f"optimiser.{name}.{index}.{key}"] = tensor if shared else tensor[run]
        for state, generator in zip(states, self._generators, strict=True):
            state["generator"] = generator.get_state()
            state["steps_done"] = torch.tensor([self.mixture_steps_done, self.policy_steps_done])
        return [{name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()} for state in states]

    def restore(self, *states: dict[str, Tensor]) -> None:
        """Takes back what `states()` gave, on the same data and configuration.

        Raises:
            ValueError: runs that are not equally far, or another kind of device, whose random numbers differ.
        """
        steps_done = {tuple(state["steps_done"].tolist()) for state in states}
        if len(steps_done) > 1:
            raise ValueError(f"steps done: expected the same of all seeds, got {sorted(steps_done)}")
        own_size = self._generators[0].get_state().numel()
        for networks, generator, state in zip(self._networks_of_runs, self._generators, states, strict=True):
            if state["generator"].numel() != own_size:
                raise ValueError(
                    f"generator: expected the random state of a run on {self.device.type}, got that of another kind "
                    "of device: go on there"
                )
            networks.load_state_dict({n: t for n, t in state.items() if n.partition(".")[0] not in _NOT_NETWORKS})
            generator.set_state(state["generator"])
        for name, optimiser in self._optimisers.items():
            prefix = f"optimiser.{name}."
            moments: dict[int, dict[str, Tensor]] = {}
            for key, tensor in states[0].items():
                if key.startswith(prefix):
                    index, moment = key.removeprefix(prefix).split(".")
                    shared = not self._axes or tensor.dim() == 0
                    whole = tensor if shared else torch.stack([state[key] for state in states])
                    moments.setdefault(int(index), {})[moment] = whole
            optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
        ((self.mixture_steps_done, self.policy_steps_done),) = steps_done
        self._mixture_cache = self._log_shares_cache = None
