"""The three further checks: random modes against hyper-Q, sensitivity to M, β and C, and corrupted hyper-Q.

1. `measure_choices`: what a trained policy earns where its modes are chosen by other rules than hyper-Q, and by hyper-Q
   that was spoilt by random choices or noise.
2. `measure_sensitivity`: one mixture, one actor for each β and C.
3. `measure_error_bound`: what errors of hyper-Q cost in tabular MDPs. `measure_forced_modes`: whether weighted
   imitation mends a wrong choice.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lom.config import TrainConfig
from lom.dataset import Transitions
from lom.envs.bandit import CORNER_REWARDS, CORNERS, Bandit4Env, bandit_demonstrations
from lom.envs.fetch4 import TARGET_OFFSETS, fetch4_demonstrations, reach_action
from lom.envs.fork import demonstrator_action, fork_demonstrations
from lom.evaluation import EVALUATION_SEED, evaluate, policy_act
from lom.losses import imitation_weights, weighted_imitation_loss
from lom.mode_selection import gather_component
from lom.policy import LomPolicy
from lom.study.cells import STUDIED
from lom.study.experiments import continued, trained, transitions_from
from lom.study.hyper_policies import RULES, greedy, rules
from lom.study.quadratic import QuadraticValue, tilted_mode
from lom.study.tabular import composite_policy, deterministic_policy, hyper_values, random_problem, worst_choice

SKEWED_WEIGHTS = (0.45, 0.1, 0.4, 0.05)
"""Mixing weights of bandit-4 where the best corner is the rarest."""

RANDOM_SHARES = (0.1, 0.25, 0.5, 0.75)

HyperPolicy = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""From observations float32[B, O], and what `LomPolicy.greedy_mode` answered there, to float[B, M]."""


def _best_corner(observations: Tensor) -> Tensor:
    best: Tensor = torch.from_numpy(CORNERS[CORNER_REWARDS.argmax()]).expand(len(observations), -1)
    return best


def _lower_route(observations: Tensor) -> Tensor:
    rng = np.random.default_rng(0)
    actions = [demonstrator_action(each, below=True, rng=rng, noise_std=0.0) for each in observations.numpy()]
    return torch.from_numpy(np.stack(actions))


def _best_target(observations: Tensor) -> Tensor:
    actions = [reach_action(each, each[-3:] + TARGET_OFFSETS[0]) for each in observations.numpy()]
    return torch.from_numpy(np.stack(actions)).float().clamp(-1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Generated data whose best modes are known, and how it is trained on: preset `small` with these fields.

    Attributes:
        env_id: where policies are played.
        demonstrations: seed -> arrays with the keys of D4RL.
        best_actions: float32[B, O] -> float32[B, A], the mean of the best mode.
        noise_stds: of the noise on hyper-Q, in units of the return.
        episodes: of one evaluation.
    """

    env_id: str
    demonstrations: Callable[[int], Mapping[str, Any]]
    best_actions: Callable[[Tensor], Tensor]
    noise_stds: tuple[float, ...]
    episodes: int = 100
    mixture_steps: int = 1500
    steps: int = 3000
    min_mixing_weight: float = 0.05

    def transitions(self, seed: int) -> Transitions:
        """The data of one seed."""
        return transitions_from(self.demonstrations(seed))

    def config(self, *, seed: int, **overrides: Any) -> TrainConfig:
        """How one seed is trained."""
        own = {name: getattr(self, name) for name in ("mixture_steps", "steps", "min_mixing_weight")}
        return replace(STUDIED, seed=seed, **own, **overrides)


_BANDIT = Task(
    env_id="lom/Bandit4-v0",
    demonstrations=lambda seed: bandit_demonstrations(seed=seed),
    best_actions=_best_corner,
    noise_stds=(0.5, 1.0, 2.0, 4.0, 8.0),
    episodes=1,  # one state, and nothing in it is random
    mixture_steps=1000,
    steps=1000,
)
TASKS = {
    "bandit4": _BANDIT,
    "bandit4_skewed": replace(
        _BANDIT,
        demonstrations=lambda seed: bandit_demonstrations(seed=seed, weights=SKEWED_WEIGHTS),
        min_mixing_weight=0.02,
    ),
    "fork": Task(
        env_id="lom/Fork-v0",
        demonstrations=lambda seed: fork_demonstrations(seed=seed),
        best_actions=_lower_route,
        noise_stds=(0.1, 0.3, 1.0, 3.0, 10.0),
    ),
    "fetch4_reach": Task(
        env_id="lom/Fetch4Reach-v0",
        demonstrations=lambda seed: fetch4_demonstrations("Reach", seed=seed),
        best_actions=_best_target,
        noise_stds=(0.1, 1.0, 10.0),
        episodes=25,
        mixture_steps=6000,
        steps=12_000,
    ),
}


# ---------------------------------------------------------------- 1: random mode against hyper-Q


@torch.no_grad()
def bandit_value(policy: LomPolicy, hyper_policy: HyperPolicy, draws: int = 20_000) -> float:
    """Σ_u ζ(u) r(μ_u) in the one state of bandit-4; averaged over `draws` where ζ itself is random."""
    env, observations = Bandit4Env(), torch.zeros(draws, 1)
    answer = policy.greedy_mode(observations[:1])
    rewards = torch.tensor([env.step(mean)[1] for mean in answer["component_means"][0].numpy()])
    many = {name: value.expand(draws, *value.shape[1:]) for name, value in answer.items()}
    return float((hyper_policy(observations, many) @ rewards).mean())


def played_value(policy: LomPolicy, hyper_policy: HyperPolicy, task: Task, seed: int) -> float:
    """Mean return of episodes in which a mode is drawn anew from ζ at every step, and acts by its mean."""
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def act(observations: Any) -> Any:
        seen = torch.from_numpy(observations)
        answer = policy.greedy_mode(seen)
        mode = torch.multinomial(hyper_policy(seen, answer), 1, generator=generator).squeeze(1)
        return gather_component(answer["component_means"], mode).numpy()

    return float(evaluate(act, task.env_id, episodes=task.episodes, seed=EVALUATION_SEED).returns.mean())


def measure_choices(*, task: str, num_components: int, seed: int) -> dict[str, dict[str, float]]:
    """Trains once, then lets modes be chosen by every rule, and by hyper-Q with random choices or noise mixed in.

    Returns:
        rules: value by rule. random_share: value by p, where with probability p any supported mode acts. noise: value
        by the standard deviation of the noise on hyper-Q, drawn anew at every state.
    """
    this = TASKS[task]
    policy = trained(this.transitions(seed), this.config(seed=seed, num_components=num_components)).policy
    generator = torch.Generator().manual_seed(seed)

    def value(hyper_policy: HyperPolicy) -> float:
        if this.env_id == _BANDIT.env_id:
            return bandit_value(policy, hyper_policy)
        return played_value(policy, hyper_policy, this, seed)

    def by_rule(rule: str) -> HyperPolicy:
        return lambda seen, answer: rules(answer, this.best_actions(seen), policy.min_mixing_weight)[rule]

    def random_share(share: float) -> HyperPolicy:
        chosen, uniform = by_rule("hyper_q"), by_rule("random_uniform")
        return lambda seen, answer: (1 - share) * chosen(seen, answer) + share * uniform(seen, answer)

    def noisy(noise_std: float) -> HyperPolicy:
        def hyper_policy(_: Tensor, answer: Mapping[str, Tensor]) -> Tensor:
            noise = noise_std * torch.randn(answer["hyper_q"].shape, generator=generator)
            return greedy(answer["hyper_q"] + noise, answer["mixing_weights"], policy.min_mixing_weight)

        return hyper_policy

    return {
        "rules": {rule: value(by_rule(rule)) for rule in RULES},
        "random_share": {f"{share:g}": value(random_share(share)) for share in RANDOM_SHARES},
        "noise": {f"{noise_std:g}": value(noisy(noise_std)) for noise_std in this.noise_stds},
    }


# ---------------------------------------------------------------- 2: sensitivity

_LAST_STEPS = 100
_STATES = 2000


def measure_sensitivity(
    *, task: str, num_components: int, seeds: Sequence[int], settings: Sequence[tuple[float, float]]
) -> list[dict[str, Any]]:
    """Trains one mixture a seed, and on top of it everything else for each (β, C) of `settings`; all seeds at once.

    Returns:
        For each setting: score of `actor` and `greedy_mode`; mode_std, of the chosen mode (mean over states of the data
        and action dimensions); active_components, how many weigh more than 0.05; clipped_weights, the share at C over
        the last 100 steps. Each a list over the seeds.
    """
    this = TASKS[task]
    data, config = [this.transitions(seed) for seed in seeds], this.config(seed=0, num_components=num_components)
    configs = [replace(config, inverse_temperature=beta, max_imitation_weight=ceiling) for beta, ceiling in settings]
    rows = []
    for learner in continued(trained(data, config, seeds, mixture_only=True), data, configs):
        clipped = [
            [metrics["actor/clipped_weights"] for metrics in learner.metrics_of_runs()]
            for _, done in learner.remaining()
            if done > config.steps - _LAST_STEPS
        ]
        found = [_described(policy, each, this) for policy, each in zip(learner.policies, data, strict=True)]
        rows.append(
            {
                "inverse_temperature": learner.config.inverse_temperature,
                "max_imitation_weight": learner.config.max_imitation_weight,
                "clipped_weights": np.mean(clipped, axis=0),
            }
            | {name: [each[name] for each in found] for name in found[0]}
        )
    return rows


@torch.no_grad()
def _described(policy: LomPolicy, data: Transitions, task: Task) -> dict[str, float]:
    answer = policy.greedy_mode(torch.from_numpy(data.observations[:_STATES]))
    stds = gather_component(answer["component_log_stds"], answer["mode"].long()).exp()

    def score(variant: str) -> float:
        act = policy_act(policy, variant)
        return float(evaluate(act, task.env_id, episodes=task.episodes, seed=EVALUATION_SEED).returns.mean())

    return {
        "actor": score("actor"),
        "greedy_mode": score("greedy_mode"),
        "mode_std": float(stds.mean()),
        "active_components": float((answer["mixing_weights"] > 0.05).sum(dim=1).float().mean()),
    }


# ---------------------------------------------------------------- 3: corrupted hyper-Q


def measure_error_bound(*, errors: Sequence[float], problems: int, seed: int) -> dict[str, Any]:
    """What errors of hyper-Q cost in random tabular MDPs.

    V^{ζ̂} ≥ V^b - 2 ε / (1 - γ) for the greedy choice ζ̂ by any hyper-Q within ε of the behaviour's own.

    Returns:
        discount; and for each error, over problems, the loss max(0, max_s V^b(s) - V^{ζ̂}(s)) where errors are uniform
        in ±ε (`uniform`, float64[errors, problems]) and where they are the worst that there are (`worst`, likewise).
    """
    generator = torch.Generator().manual_seed(seed)
    uniform, worst = (np.zeros((len(errors), problems)) for _ in range(2))
    for problem in range(problems):
        mdp, modes, weights = random_problem(generator)
        behaviour = composite_policy(weights, modes)
        behaviour_values = mdp.values(behaviour)
        exact = hyper_values(mdp.action_values(behaviour), modes)
        direction = 2 * torch.rand(exact.shape, generator=generator, dtype=torch.float64) - 1
        for index, error in enumerate(errors):
            choices = (
                (uniform, (exact + error * direction).argmax(dim=1)),
                (worst, worst_choice(mdp, modes, exact, error)),
            )
            for losses, chosen in choices:
                loss = behaviour_values - mdp.values(deterministic_policy(chosen, modes))
                losses[index, problem] = max(0.0, float(loss.max()))
    return {"discount": mdp.discount, "uniform": uniform, "worst": worst}


_IMITATION_BATCH = 256


def misleading_value() -> QuadraticValue:
    """A value on bandit-4's actions that rises from everywhere towards the best corner: 5 there, 0 in the opposite."""
    best = CORNERS[CORNER_REWARDS.argmax()].astype(np.float64)
    curvature = 2 * 5.0 / float(np.square(2 * best).sum())
    return QuadraticValue(
        constant=5.0 - 0.5 * curvature * float(best @ best), slope=curvature * best, curvature=curvature * np.eye(2)
    )


def measure_forced_modes(*, seed: int, steps: int = 1000) -> list[dict[str, Any]]:
    """Weighted imitation (eq. 18) of each mode of bandit-4 in turn, whatever it is worth, with exact values.

    The value is `misleading_value`: the way to the best mode is uphill from every other one.

    Returns:
        For each component of a fitted mixture of four: mode_mean, mode_std and action, float[2]; tilted_mean, where
        the closed form puts the action; reward, what bandit-4 pays for the action.
    """
    task, value = TASKS["bandit4"], misleading_value()
    config = task.config(seed=seed, num_components=len(CORNERS))
    fitted = trained(task.transitions(seed), config, mixture_only=True).policy
    generator, env, rows = torch.Generator().manual_seed(seed), Bandit4Env(), []
    observations = torch.zeros(_IMITATION_BATCH, 1)
    for mode in range(len(CORNERS)):
        policy = copy.deepcopy(fitted)
        forced = torch.full((_IMITATION_BATCH,), mode)
        optimiser = torch.optim.Adam(policy.actor.parameters(), lr=config.actor_learning_rate)
        for _ in range(steps):
            noise = torch.randn(_IMITATION_BATCH, 2, generator=generator)
            with torch.no_grad():
                answer = policy.greedy_mode(observations, forced_mode=forced, noise=noise)
                mean = answer["component_means"][:, mode]
                advantages = value(answer["action"].double().numpy()) - value(mean.double().numpy())
                weights = imitation_weights(
                    torch.from_numpy(advantages).float(), config.inverse_temperature, config.max_imitation_weight
                )
            loss = weighted_imitation_loss(policy(observations, "actor")["action"], answer["action"], weights)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        with torch.no_grad():
            action = policy(observations[:1], "actor")["action"][0].numpy()
        std = answer["component_log_stds"][0, mode].exp().double().numpy()
        tilted, _ = tilted_mode(value, mean[0].double().numpy(), np.diag(std**2), config.inverse_temperature)
        rows.append(
            {
                "mode_mean": mean[0].numpy(),
                "mode_std": std,
                "action": action,
                "tilted_mean": tilted,
                "reward": env.step(action)[1],
            }
        )
    return rows
