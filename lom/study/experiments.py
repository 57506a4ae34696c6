"""The first three experiments: does each stage of LOM find an answer that is known?

1. `fit_synthetic_mixture`: the mixture identifies the modes of synthetic data.
2. `select_in_linear_quadratic`: hyper-Q selects the modes that are optimal by exact values.
3. `improve_on_mode`, `learn_double_circle`: weighted imitation improves on mode selection, up to the closed form.

Each draws its data from its seed, trains with the learner that `lom-train` uses and returns plain numbers.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lom.config import TrainConfig
from lom.dataset import Transitions, load_transitions
from lom.learner import Learner
from lom.networks import Mixture
from lom.study.cells import STUDIED
from lom.study.linear_quadratic import Controller, LinearQuadraticProblem
from lom.study.quadratic import Array, QuadraticValue, tilted_mode

SYNTHETIC_STD = 0.08
"""Standard deviation of every synthetic mode, unit actions."""


def transitions_of(
    observations: Array,
    actions: Array,
    rewards: Array,
    next_observations: Array | None = None,
    next_actions: Array | None = None,
) -> Transitions:
    """Rows as `lom-train` would read them, each an episode; without what comes next a terminal one (a bandit)."""
    bandit = next_observations is None or next_actions is None
    arrays = {
        "observations": observations,
        "actions": actions,
        "rewards": rewards,
        "next_observations": observations if next_observations is None else next_observations,
        "terminals": np.full(len(rewards), bandit),
        "timeouts": np.full(len(rewards), not bandit),
    }
    if next_actions is not None:
        arrays["next_actions"] = next_actions
    return transitions_from(arrays)


def transitions_from(arrays: Mapping[str, Any]) -> Transitions:
    """Arrays with the keys of D4RL, as `lom-train` would read them from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.npz"
        np.savez(path, **arrays)
        return load_transitions([path])


def untrained(
    transitions: Transitions | Sequence[Transitions], config: TrainConfig, seeds: Sequence[int] = ()
) -> Learner:
    """A learner in the unit box of actions; with `seeds` one run for each, on data of its own."""
    first = transitions if isinstance(transitions, Transitions) else transitions[0]
    unit = torch.ones(first.actions.shape[1])
    return Learner(transitions, config, -unit, unit, seeds)


def trained(
    transitions: Transitions | Sequence[Transitions],
    config: TrainConfig,
    seeds: Sequence[int] = (),
    *,
    mixture_only: bool = False,
) -> Learner:
    """As `untrained`, after both stages, or after that of the mixture."""
    learner = untrained(transitions, config, seeds)
    for stage, done in learner.remaining():
        if mixture_only and stage == "mixture" and done == config.mixture_steps:
            break
    learner.metrics_of_runs()  # raises where training diverged
    return learner


def continued(
    learner: Learner, transitions: Sequence[Transitions], configs: Sequence[TrainConfig]
) -> Iterator[Learner]:
    """One learner of the same seeds for each configuration, from where `learner` stands, not yet trained any further.

    With a learner whose mixture is finished, and configurations that differ in the second stage only, each ends as if
    it had been trained alone.
    """
    states = learner.states()
    for config in configs:
        follower = untrained(transitions, config, learner.seeds)
        follower.restore(*states)
        yield follower


# ---------------------------------------------------------------- 1: the mixture finds the modes


@dataclass(frozen=True, kw_only=True)
class SyntheticModes:
    """k Gaussians on a circle that turns with the observation; mixing weights depend on the observation too.

    Attributes:
        separation: distance between neighbouring means in standard deviations.
    """

    modes: int
    separation: float

    def parameters(self, observations: Tensor) -> Mixture:
        """The truth, float32[B, 1] -> parameters of B mixtures."""
        index = torch.arange(self.modes, dtype=torch.float32)
        radius = 0.0 if self.modes == 1 else 0.5 * self.separation * SYNTHETIC_STD / np.sin(np.pi / self.modes)
        angles = 2 * torch.pi * index / self.modes + 0.7 * observations
        means = radius * torch.stack([angles.cos(), angles.sin()], dim=-1)
        return Mixture(
            log_weights=torch.log_softmax(torch.sin(observations * (1 + index) + 2 * index), dim=-1),
            means=means,
            log_stds=torch.full_like(means, np.log(SYNTHETIC_STD)),
        )

    def draw(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """Observations float32[rows, 1] in [-1, 1] and actions float32[rows, 2]."""
        generator = torch.Generator().manual_seed(seed)
        observations = 2 * torch.rand(rows, 1, generator=generator) - 1
        truth = self.parameters(observations)
        chosen = torch.multinomial(truth.log_weights.exp(), 1, generator=generator).squeeze(1)
        noise = SYNTHETIC_STD * torch.randn(rows, 2, generator=generator)
        return observations, truth.means[torch.arange(rows), chosen] + noise


@dataclass(frozen=True, kw_only=True)
class MixtureFit:
    """How a fitted mixture compares with the truth on fresh rows.

    Attributes:
        nll_gap: its negative log-likelihood minus the truth's, nat.
        worst_mean_distance: from a true mean to the nearest component of weight 0.01 or more, in standard deviations:
            the mean over the observations where the true mode weighs 0.05 or more, of the mode where it is largest.
        observations, true_means, weights, means: at 50 observations, float[50], [50, k, 2], [50, M], [50, M, 2].
    """

    nll_gap: float
    worst_mean_distance: float
    observations: Array
    true_means: Array
    weights: Array
    means: Array


@torch.no_grad()
def compare_mixture(truth: SyntheticModes, learner: Learner, seed: int) -> MixtureFit:
    """Compares on 20,000 rows that nothing was fitted to."""
    policy = learner.policy
    observations, actions = truth.draw(20_000, seed + 1_000_000)
    fitted: Mixture = policy.mixture(policy.normaliser(observations))
    gap = (truth.parameters(observations).log_prob(actions) - fitted.log_prob(actions)).mean()
    grid = torch.linspace(-1, 1, 50).unsqueeze(1)
    real, found = truth.parameters(grid), policy.mixture(policy.normaliser(grid))
    distances = torch.cdist(real.means, found.means) / SYNTHETIC_STD
    distances = torch.where(found.log_weights.exp().unsqueeze(1) >= 0.01, distances, torch.inf).amin(dim=-1)
    return MixtureFit(
        nll_gap=gap.item(),
        worst_mean_distance=distances.masked_fill(real.log_weights.exp() < 0.05, torch.nan).nanmean(dim=0).max().item(),
        observations=grid[:, 0].numpy(),
        true_means=real.means.numpy(),
        weights=found.log_weights.exp().numpy(),
        means=found.means.numpy(),
    )


def fit_synthetic_mixture(
    *, modes: int, separation: float, num_components: int, seed: int = 0, steps: int = 1500, rows: int = 20_000
) -> MixtureFit:
    """Experiment 1: fits `num_components` components to `modes` true ones."""
    truth = SyntheticModes(modes=modes, separation=separation)
    observations, actions = truth.draw(rows, seed)
    config = replace(STUDIED, seed=seed, num_components=num_components, mixture_steps=steps, steps=1)
    data = transitions_of(observations.numpy(), actions.numpy(), np.zeros(rows))
    return compare_mixture(truth, trained(data, config, mixture_only=True), seed)


# ---------------------------------------------------------------- 2: hyper-Q selects optimal modes

TWO_PUSHES = LinearQuadraticProblem(
    dynamics=np.array([[1.0]]),
    control=np.array([[0.5]]),
    noise_covariance=np.array([[0.01]]),
    state_cost=np.array([[1.0]]),
    action_cost=np.array([[0.1]]),
    discount=0.9,
    controllers=tuple(
        Controller(weight=0.5, gain=np.array([[-0.2]]), offset=np.array([push]), covariance=np.array([[0.01]]))
        for push in (-0.4, 0.4)
    ),
)
"""A point that is pushed left or right at random; the better push is the one towards the middle."""


@dataclass(frozen=True, kw_only=True)
class ModeSelection:
    """Learned and exact hyper-Q over the states that the behaviour visits.

    Attributes:
        agreement: share of the states with a margin whose selected mode is the optimal one.
        states: float64[N], sorted.
        exact_advantage, learned_advantage: hyper-Q of the right push minus that of the left one.
        behaviour_value, greedy_value, exact_behaviour_value: discounted return from the start, by roll-outs of the
            behaviour, roll-outs of `greedy_mode`, and in closed form.
        standard_error: of the difference between both roll-outs.
    """

    agreement: float
    states: Array
    exact_advantage: Array
    learned_advantage: Array
    behaviour_value: float
    greedy_value: float
    exact_behaviour_value: float
    standard_error: float


TWO_PUSHES_CONFIG = replace(
    STUDIED,
    mixture_steps=500,
    steps=1500,
    num_components=4,
    discount=TWO_PUSHES.discount,
    target_noise_std=0.0,
    target_update_rate=0.02,
)


def behave_in_two_pushes(rng: np.random.Generator, rows: int = 10_000) -> Transitions:
    """Single steps of the behaviour from states all over [-1.5, 1.5]."""
    states = rng.uniform(-1.5, 1.5, (rows, 1))
    actions = TWO_PUSHES.behave(states, rng)
    rewards, following = TWO_PUSHES.step(states, actions, rng)
    return transitions_of(states, actions, rewards, following, TWO_PUSHES.behave(following, rng))


def select_in_linear_quadratic(
    *, seed: int = 0, rows: int = 10_000, config: TrainConfig = TWO_PUSHES_CONFIG
) -> ModeSelection:
    """Experiment 2: trains on transitions of `TWO_PUSHES` and compares with its exact hyper-Q.

    States with a margin are those where the exact values of both pushes differ by more than a tenth of their spread.
    """
    problem, rng = TWO_PUSHES, np.random.default_rng(seed)
    policy = trained(behave_in_two_pushes(rng, rows), replace(config, seed=seed)).policy

    grid = np.linspace(-1.2, 1.2, 401)[:, None]
    exact = problem.hyper_values(grid)
    with torch.no_grad():
        answer = {name: value.numpy() for name, value in policy(torch.from_numpy(grid).float(), "greedy_mode").items()}
    pushes = np.stack([controller.means(grid)[:, 0] for controller in problem.controllers], axis=1)
    nearest = np.abs(answer["component_means"] - pushes[:, None, :]).argmin(axis=2)
    selected = nearest[np.arange(len(grid)), answer["mode"]]
    advantage = exact[:, 1] - exact[:, 0]
    clear = np.abs(advantage) > 0.1 * advantage.std()
    learned = np.stack(
        [
            np.where((nearest == push) & (answer["mixing_weights"] >= 0.05), answer["hyper_q"], -np.inf).max(axis=1)
            for push in (0, 1)
        ]
    )

    start, rollouts = np.full((4000, 1), 0.8), {}
    for name in ("behaviour", "greedy"):
        state, total = start, np.zeros(len(start))
        for step in range(80):
            if name == "behaviour":
                action = problem.behave(state, rng)
            else:
                with torch.no_grad():
                    action = policy(torch.from_numpy(state).float(), "greedy_mode")["action"].double().numpy()
            reward, state = problem.step(state, action, rng)
            total += problem.discount**step * reward
        rollouts[name] = total
    return ModeSelection(
        agreement=float((selected == exact.argmax(axis=1))[clear].mean()),
        states=grid[:, 0],
        exact_advantage=advantage,
        learned_advantage=learned[1] - learned[0],
        behaviour_value=float(rollouts["behaviour"].mean()),
        greedy_value=float(rollouts["greedy"].mean()),
        exact_behaviour_value=problem.value(start[0]),
        standard_error=float(np.sqrt(sum(total.var() / len(total) for total in rollouts.values()))),
    )


# ---------------------------------------------------------------- 3: weighted imitation improves on the mode

MODE_STD = 0.1
INVERSE_TEMPERATURE = 5.0
PEAKS = (
    (-0.5, QuadraticValue(constant=0.0, slope=np.array([1.0]), curvature=np.array([[2.0]]))),
    (0.4, QuadraticValue(constant=1.0, slope=np.array([1.5]), curvature=np.array([[2.0]]))),
)
"""Two modes of a bandit: their means, and the reward as a quadratic of the distance from that mean."""


@dataclass(frozen=True, kw_only=True)
class Improvement:
    """Where the learned policies act inside the better of two modes, and what that earns.

    Attributes:
        greedy_action, actor_action: what the learned policies do.
        mode_mean, tilted_mean, best_action: of the mode, of the closed form, and of the reward.
        greedy_reward, actor_reward, tilted_reward, best_reward: what these earn.
    """

    greedy_action: float
    actor_action: float
    mode_mean: float
    tilted_mean: float
    best_action: float
    greedy_reward: float
    actor_reward: float
    tilted_reward: float
    best_reward: float


def peak_reward(actions: Array) -> Array:
    """The bandit's reward: float64[N, 1] -> float64[N], the quadratic of the nearest mode."""
    per_mode = [value(actions - mean) for mean, value in PEAKS]
    nearest = np.abs(actions - np.array([[mean for mean, _ in PEAKS]])).argmin(axis=1)
    rewards: Array = np.choose(nearest, per_mode)
    return rewards


def improve_on_mode(*, seed: int = 0, rows: int = 10_000, config: TrainConfig | None = None) -> Improvement:
    """Experiment 3a: a bandit with a quadratic reward inside each mode."""
    rng = np.random.default_rng(seed)
    centres = np.array([mean for mean, _ in PEAKS])[rng.integers(2, size=rows)]
    actions = (centres + MODE_STD * rng.standard_normal(rows))[:, None]
    config = config or replace(
        STUDIED, mixture_steps=500, steps=1500, num_components=4, inverse_temperature=INVERSE_TEMPERATURE
    )
    data = transitions_of(np.zeros((rows, 1)), actions, peak_reward(actions))
    policy = trained(data, replace(config, seed=seed)).policy
    with torch.no_grad():
        acted = {name: policy(torch.zeros(1, 1), name)["action"].double().numpy() for name in ("greedy_mode", "actor")}
    mean, value = PEAKS[1]
    shift, _ = tilted_mode(value, np.zeros(1), np.array([[MODE_STD**2]]), config.inverse_temperature)
    best = float(value.slope[0] / value.curvature[0, 0])
    return Improvement(
        greedy_action=float(acted["greedy_mode"][0, 0]),
        actor_action=float(acted["actor"][0, 0]),
        mode_mean=mean,
        tilted_mean=mean + float(shift[0]),
        best_action=mean + best,
        greedy_reward=float(peak_reward(acted["greedy_mode"])[0]),
        actor_reward=float(peak_reward(acted["actor"])[0]),
        tilted_reward=float(value(shift)),
        best_reward=float(value(np.array([best]))),
    )


@dataclass(frozen=True, kw_only=True)
class DoubleCircle:
    """What was learned on the double circle.

    Attributes:
        data: float64[N, 2], states and actions.
        states: float64[S].
        actions: by variant, float64[S].
        rewards: mean reward by variant, and of the `behaviour`.
        distances: by variant, mean distance from the acted points to the nearest point of the data.
    """

    data: Array
    states: Array
    actions: dict[str, Array]
    rewards: dict[str, float]
    distances: dict[str, float]


def learn_double_circle(*, seed: int = 0, rows: int = 5_000, config: TrainConfig | None = None) -> DoubleCircle:
    """Experiment 3b: points on two rings of radius 0.3 (a quarter of them) and 1; the state is x, the action y.

    The reward is 1 where x and y have the same sign: up to four branches per state, two of them good.
    Lengths are in units of 1.2, so that every action lies in [-1, 1].
    """
    rng = np.random.default_rng(seed)
    radius = np.where(rng.random(rows) < 0.25, 0.3, 1.0) + rng.uniform(-0.1, 0.1, rows)
    angle = rng.uniform(0, 2 * np.pi, rows)
    points = (radius / 1.2)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    rewards = (points[:, 0] * points[:, 1] > 0).astype(np.float64)
    config = config or replace(STUDIED, mixture_steps=1500, steps=1500, num_components=8)
    policy = trained(transitions_of(points[:, :1], points[:, 1:], rewards), replace(config, seed=seed)).policy
    states = points[rng.permutation(rows)[:500], 0]
    states.sort()
    acted: dict[str, Array] = {}
    with torch.no_grad():
        for variant in ("greedy_mode", "actor", "bc"):
            acted[variant] = policy(torch.from_numpy(states[:, None]).float(), variant)["action"][:, 0].double().numpy()

    def distance(actions: Array) -> float:
        here = torch.from_numpy(np.stack([states, actions], axis=1))
        return float(torch.cdist(here, torch.from_numpy(points)).amin(dim=1).mean())

    return DoubleCircle(
        data=points,
        states=states,
        actions=acted,
        rewards={name: float((states * actions > 0).mean()) for name, actions in acted.items()}
        | {"behaviour": float(rewards.mean())},
        distances={name: distance(actions) for name, actions in acted.items()},
    )
