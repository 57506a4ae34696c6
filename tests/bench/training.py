"""Gradient steps per second of training, against a naive transcription of the same equations, in one run.

    python -m tests.bench.training [--repeats 7] [--seconds 3] [--device cpu] [--threads 1 --clock processor]

Variants take turns, so that a busy machine slows all of them; the table has the median over the turns and the spread.
On a machine with other work, processor time of one thread says what wall time says on a quiet one.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from lom.config import AS_PUBLISHED, PRESETS
from lom.dataset import Transitions
from lom.learner import Learner, chosen_device
from lom.networks import OneHotHyperCritic
from lom.study.experiments import transitions_of
from tests.bench.machine import processor

OBSERVATION_DIM, ACTION_DIM = 17, 6
ROWS = 100_000
FEW_OBSERVATION_DIM, FEW_ACTION_DIM = 4, 2
FEW_ROWS = 20_000
SEEDS = 8


class Draws(Protocol):
    """Where the naive step takes its random numbers from."""

    def integers(self, below: int, count: int) -> NDArray[np.int64]:
        """`count` rows below `below`."""

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers."""


class NumpyDraws:
    """As a first transcription does it: rows from numpy, noise from torch's global generator."""

    def __init__(self, device: torch.device) -> None:
        self._rng = np.random.default_rng(0)
        self._device = device

    def integers(self, below: int, count: int) -> NDArray[np.int64]:
        """`count` rows below `below`."""
        return self._rng.integers(below, size=count)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, device=self._device)


class NaivePolicyStage:
    """The second stage as one writes it down first, with the initial weights of a `Learner`.

    Data stays in numpy; every state is repeated M times with a one-hot component beside it; the mixture runs in every
    step, under autograd; losses are read after every step. The equations, their order and every default are those of
    the learner: eq. 16 with clipped target noise, eq. 17, the support mask, eq. 18 against the mode's mean.
    """

    def __init__(self, transitions: Transitions, learner: Learner, draws: Draws, device: torch.device) -> None:
        self._config = config = learner.config
        assert config.num_critics == 1
        assert config.advantage_baseline == "mode_mean"
        assert isinstance(learner.policy.hyper_critic, OneHotHyperCritic)
        self._draws, self._device = draws, device
        self._data = transitions
        self._sarsa_rows = np.flatnonzero(transitions.terminals | transitions.has_next_action)
        policy = copy.deepcopy(learner.policy).to(device)
        self._normaliser, self._scaler, self._mixture = policy.normaliser, policy.action_scaler, policy.mixture
        self._actor: nn.Module = policy.actor
        self._critic, self._target_critic = (
            copy.deepcopy(network.members[0]).to(device) for network in (learner.critic, learner.target_critic)
        )
        self._hyper_critic = self._joined_hyper_critic(learner.policy.hyper_critic).to(device)
        self._critic_adam = torch.optim.Adam(self._critic.parameters(), lr=config.critic_learning_rate)
        self._hyper_adam = torch.optim.Adam(self._hyper_critic.parameters(), lr=config.hyper_learning_rate)
        self._actor_adam = torch.optim.Adam(self._actor.parameters(), lr=config.actor_learning_rate)
        self._steps_done = 0

    @staticmethod
    def _joined_hyper_critic(split: OneHotHyperCritic) -> nn.Sequential:
        weight = torch.cat([split.observation_weight, split.component_weight], dim=1).detach()
        first = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            first.weight.copy_(weight)
            first.bias.copy_(split.bias)
        return nn.Sequential(first, nn.ReLU(), *copy.deepcopy(split.rest))

    def _taken(self, array: NDArray[np.float32], rows: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array[rows]).to(self._device)

    def _observations(self, array: NDArray[np.float32], rows: NDArray[np.int64]) -> Tensor:
        return self._normaliser(self._taken(array, rows))  # type: ignore[no-any-return]

    def _actions(self, array: NDArray[np.float32], rows: NDArray[np.int64]) -> Tensor:
        return self._scaler.to_unit(self._taken(array, rows))

    def step(self) -> dict[str, float]:
        """One step of critic, hyper-critic and actor; returns their losses."""
        losses = {"critic": self._critic_step(), "hyper_critic": self._hyper_critic_step(), "actor": self._actor_step()}
        if self._steps_done % 2 == 0:
            rate = self._config.target_update_rate
            with torch.no_grad():
                for target, source in zip(self._target_critic.parameters(), self._critic.parameters(), strict=True):
                    target.copy_((1 - rate) * target + rate * source)
        self._steps_done += 1
        return losses

    def _critic_step(self) -> float:
        config, data = self._config, self._data
        rows = self._sarsa_rows[self._draws.integers(len(self._sarsa_rows), config.batch)]
        next_actions = self._actions(data.next_actions, rows)
        if config.target_noise_std > 0:
            noise = config.target_noise_std * self._draws.normal(tuple(next_actions.shape))
            next_actions = (next_actions + noise.clamp(-0.5, 0.5)).clamp(-1.0, 1.0)
        with torch.no_grad():
            next_values = self._target_critic(
                torch.cat([self._observations(data.next_observations, rows), next_actions], dim=1)
            ).squeeze(1)
        alive = 1.0 - torch.from_numpy(data.terminals[rows]).float().to(self._device)
        rewards = config.reward_scale * self._taken(data.rewards, rows)
        targets = rewards + config.discount * alive * next_values
        observations = self._observations(data.observations, rows)
        values = self._critic(torch.cat([observations, self._actions(data.actions, rows)], dim=1)).squeeze(1)
        return _descend(self._critic_adam, F.mse_loss(values, targets))

    def _hyper_critic_step(self) -> float:
        config = self._config
        rows = self._draws.integers(len(self._data), config.hyper_batch)
        observations = self._observations(self._data.observations, rows)
        mixture = self._mixture(observations)
        noise = self._draws.normal(tuple(mixture.means.shape))
        samples = (mixture.means + mixture.log_stds.exp() * noise).clamp(-1.0, 1.0)
        repeated = observations.repeat_interleave(config.num_components, dim=0)
        targets = self._critic(torch.cat([repeated, samples.reshape(len(repeated), -1)], dim=1)).detach()
        return _descend(self._hyper_adam, F.mse_loss(self._hyper_q(observations), targets.view(len(rows), -1)))

    def _hyper_q(self, observations: Tensor) -> Tensor:
        components = self._config.num_components
        repeated = observations.repeat_interleave(components, dim=0)
        one_hot = torch.eye(components, device=self._device).repeat(len(observations), 1)
        values: Tensor = self._hyper_critic(torch.cat([repeated, one_hot], dim=1))
        return values.view(-1, components)

    def _actor_step(self) -> float:
        config = self._config
        rows = self._draws.integers(len(self._data), config.batch)
        observations = self._observations(self._data.observations, rows)
        mixture = self._mixture(observations)
        weights = mixture.log_weights.exp()
        heaviest = weights.amax(dim=1, keepdim=True)
        allowed = (weights >= config.effective_min_mixing_weight) | (weights >= heaviest)
        mode = self._hyper_q(observations).masked_fill(~allowed, -torch.inf).argmax(dim=1)
        each = torch.arange(len(rows), device=self._device)
        mean, std = mixture.means[each, mode], mixture.log_stds[each, mode].exp()
        imitated = (mean + std * self._draws.normal(tuple(mean.shape))).clamp(-1.0, 1.0).detach()
        values, baseline = (
            self._critic(torch.cat([observations, actions], dim=1)).squeeze(1) for actions in (imitated, mean)
        )
        advantages = (values - baseline).detach()
        weight = torch.exp(config.inverse_temperature * advantages).clamp(max=config.max_imitation_weight)
        error = (self._actor(observations) - imitated).square().mean(dim=1)
        return _descend(self._actor_adam, (weight * error).mean())


def _descend(adam: torch.optim.Adam, loss: Tensor) -> float:
    adam.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    adam.step()
    return loss.item()


def random_transitions(rows: int, observation_dim: int, action_dim: int) -> Transitions:
    """Rows without meaning: speed does not depend on what is learned. One in a hundred is terminal."""
    rng = np.random.default_rng(0)
    data = transitions_of(
        rng.normal(size=(rows, observation_dim)),
        rng.uniform(-1, 1, (rows, action_dim)),
        rng.normal(size=rows),
        rng.normal(size=(rows, observation_dim)),
        rng.uniform(-1, 1, (rows, action_dim)),
    )
    return replace(data, terminals=rng.random(rows) < 0.01)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Steps per second of the second stage, by variant."""

    repeats: int = 7
    """Turns of every variant."""
    seconds: float = 3.0
    """Length of a turn."""
    threads: int = 0
    """torch's CPU threads where the preset does not say; 0 leaves the default."""
    clock: Literal["wall", "processor"] = "wall"
    """What a second is: on the wall, or of the processors that this process had."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """cpu, cuda, or auto: cuda where there is one."""


@dataclass
class Variant:
    """A way to train, and how fast it was in every turn.

    Attributes:
        seeds: runs that one step moves on.
        threads: torch's CPU threads; 0 leaves the default.
    """

    name: str
    step: Callable[[], object]
    device: torch.device
    seeds: int = 1
    threads: int = 0

    def __post_init__(self) -> None:
        self.speeds: list[float] = []

    def take_turn(self, seconds: float, default_threads: int, clock: Callable[[], float]) -> None:
        """Steps for about that long; notes (seeds x) steps per second."""
        torch.set_num_threads(self.threads or default_threads)
        self.step()  # the first step after another variant finds cold caches
        self._wait()
        started, steps = clock(), 0
        while clock() - started < seconds:
            self.step()
            steps += 1
        self._wait()
        self.speeds.append(self.seeds * steps / (clock() - started))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def second_stage(learner: Learner) -> Callable[[], object]:
    """Steps of critics and actor without the first stage: what the mixture knows does not change their cost."""
    learner.mixture_steps_done = learner.config.mixture_steps
    steps = learner.remaining()
    return lambda: next(steps)


def groups(device_name: Literal["auto", "cpu", "cuda"]) -> list[list[Variant]]:
    """Variants that are compared with each other, the reference first."""
    config = replace(PRESETS["standard"], **AS_PUBLISHED, steps=10**9, device=device_name)
    low, high = -torch.ones(ACTION_DIM), torch.ones(ACTION_DIM)
    large = random_transitions(ROWS, OBSERVATION_DIM, ACTION_DIM)
    exact = Learner(large, replace(config, hyper_head="one_hot"), low, high)
    device = exact.device
    naive = NaivePolicyStage(large, exact, NumpyDraws(device), device)
    components = Learner(large, config, low, high)
    small = replace(PRESETS["small"], steps=10**9, device=device_name)
    few = random_transitions(FEW_ROWS, FEW_OBSERVATION_DIM, FEW_ACTION_DIM)
    low, high = -torch.ones(FEW_ACTION_DIM), torch.ones(FEW_ACTION_DIM)
    alone = Learner(few, small, low, high)
    together = Learner([few] * SEEDS, small, low, high, range(SEEDS))
    return [
        [
            Variant("naive, 256 x 256, one_hot", naive.step, device),
            Variant("the same mathematics", second_stage(exact), device),
            Variant("hyper_head = components", second_stage(components), device),
        ],
        [
            Variant("preset small, one seed after the other", second_stage(alone), device, threads=small.threads),
            Variant(f"{SEEDS} seeds at once", second_stage(together), device, SEEDS, small.threads),
        ],
    ]


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python -m tests.bench.training")
    device = chosen_device(arguments.device)
    threads = arguments.threads or torch.get_num_threads()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()}, {threads} threads"
    console = Console(soft_wrap=True)
    table = Table(title=f"{name}, torch {torch.__version__}, {arguments.repeats} turns of {arguments.seconds:g} s")
    table.caption = f"steps per second of {arguments.clock} time"
    for heading in ("training", "steps/s, median", "lowest to highest", "ratio, median", "lowest to highest"):
        table.add_column(heading, justify="left" if heading == "training" else "right")
    compared = groups(arguments.device)
    for _ in track(range(arguments.repeats), "turns", console=Console(stderr=True)):
        for variants in compared:
            for variant in variants:
                variant.take_turn(arguments.seconds, threads, clock)
    for variants in compared:
        for variant in variants:
            ratios = [mine / first for mine, first in zip(variant.speeds, variants[0].speeds, strict=True)]
            table.add_row(variant.name, *_summary(variant.speeds, ".1f"), *_summary(ratios, ".2f"))
        table.add_section()
    console.print(table)


def _summary(values: list[float], form: str) -> tuple[str, str]:
    return f"{statistics.median(values):{form}}", f"{min(values):{form}} to {max(values):{form}}"


if __name__ == "__main__":
    main()
