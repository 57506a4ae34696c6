"""What policies are worth, from data alone: fitted-Q evaluation (Le, Voloshin and Yue, ICML 2019, Algorithm 3).

    python -m lom.off_policy_evaluation RUN DATASET...

For a policy π an action value is fitted to y = r + γ (1 - done) Q̄(s', π(s')) over the rows of the data, Q̄ following Q
slowly, and π is worth Q(s, π(s)) at the first states of the episodes. The behaviour is valued beside it, by
y = r + γ (1 - done) Q̄(s', a') with the action that the data took next; its value must be the discounted return that the
episodes show, which is the one check that data without an environment allow.

The values are of the data's states and actions: what a policy does where the data never went is extrapolated.
`docs/evaluation.md` says what that is good for.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from lom.config import TrainConfig
from lom.dataset import DatasetError, Transitions, load_transitions
from lom.evaluation import Recommendation, bootstrap_interval, policy_act, recommend
from lom.policy import VARIANTS, LomPolicy
from lom.returns import returns_to_go
from lom.run import RunError, load_run
from lom.scaling import ActionScaler, ObservationNormaliser

Array = NDArray[np.float32]

_MAX_EPISODES = 10_000
_CHUNK_ROWS = 8192
_BEHAVIOUR = "behaviour"
_BEHAVIOUR_LIMIT = 0.05
_SPREAD_LIMIT = 0.1


@dataclass(frozen=True, kw_only=True)
class FittedQConfig:
    """How values are fitted.

    Attributes:
        discount: γ.
        hidden: widths of a value's layers.
        steps: gradient steps; all policies and members make them together. Too few flatter policies that leave the
            data, because what they lead to is the last thing that is learned.
        batch: rows that a member sees in a step.
        members: values fitted to each policy from other weights and other batches.
        learning_rate: Adam's; falls linearly to 0 over the second half.
        target_update_rate: share of Q that enters Q̄ at every step.
    """

    discount: float
    hidden: tuple[int, ...] = (64, 64)
    steps: int = 3_000
    batch: int = 128
    members: int = 3
    learning_rate: float = 5e-3
    target_update_rate: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected 1 or more, got {self.steps}")

    @classmethod
    def after(cls, config: TrainConfig) -> "FittedQConfig":
        """An eighth of the policy's steps, but 3,000 where the policy had as many; its discount, widths and seed."""
        steps = max(config.steps // 8, min(config.steps, 3_000))
        return cls(discount=config.discount, hidden=config.hidden, steps=steps, seed=config.seed)


@dataclass(frozen=True, kw_only=True)
class OffPolicyEvaluation:
    """Discounted values at the first states of E episodes by K members, in the units of the data's rewards.

    Attributes:
        values: policy -> float64[K, E].
        behaviour_values: float64[K, E], of the behaviour and its own first actions.
        observed_returns: float64[E], what the episodes really brought. Where one was cut off its last row enters by
            the behaviour's fitted value of it.
        scale: standard deviation of the discounted returns from every row on; what doubts are measured by.
    """

    values: Mapping[str, NDArray[np.float64]]
    behaviour_values: NDArray[np.float64]
    observed_returns: NDArray[np.float64]
    scale: float

    def doubts(self) -> dict[str, str]:
        """Why values should not be believed, by policy or `behaviour`; limits are rules of thumb."""
        doubts = {}
        error = float(self.behaviour_values.mean() - self.observed_returns.mean())
        if abs(error) > _BEHAVIOUR_LIMIT * self.scale:
            doubts[_BEHAVIOUR] = (
                f"fitted {error:+.4g} away from the returns that the data show; so may all values be: give more --steps"
            )
        for name, values in self.values.items():
            spread = _spread(values)
            if spread > _SPREAD_LIMIT * self.scale:
                doubts[name] = (
                    f"its fits disagree (standard deviation {spread:.4g}): it acts where there is little data"
                )
        return doubts

    def recommendation(self) -> Recommendation:
        """That of `recommend` where the values can be believed, else the greedy mode, which stays with the data."""
        doubted = self.doubts().keys() & {_BEHAVIOUR, "actor", "greedy_mode"}
        if doubted:
            reason = f"the values of {', '.join(sorted(doubted))} are in doubt, and the greedy mode stays with the data"
            return Recommendation(variant="greedy_mode", reason=reason, warning=None)
        return recommend(self.values)

    def to_json(self) -> dict[str, Any]:
        """Means, intervals and spreads."""
        return {
            "episodes": len(self.observed_returns),
            "observed_return_mean": float(self.observed_returns.mean()),
            "behaviour": _summary(self.behaviour_values),
            "variants": {name: _summary(values) for name, values in self.values.items()},
            "doubts": self.doubts(),
        }

    def table(self) -> Table:
        """For people."""
        table = Table(
            title=f"fitted-Q evaluation: discounted values at {len(self.observed_returns)} first states",
            title_justify="left",
        )
        for heading in ("policy", "value", "95 % interval", "spread of fits"):
            table.add_column(heading)
        for name, values in {**self.values, _BEHAVIOUR: self.behaviour_values}.items():
            low, high = bootstrap_interval(values)
            table.add_row(name, f"{values.mean():.4g}", f"{low:.4g} to {high:.4g}", f"{_spread(values):.2g}")
        low, high = bootstrap_interval(self.observed_returns)
        table.add_row("returns in the data", f"{self.observed_returns.mean():.4g}", f"{low:.4g} to {high:.4g}", "")
        return table


def _spread(values: NDArray[np.float64]) -> float:
    return float(values.mean(axis=1).std())


def _summary(values: NDArray[np.float64]) -> dict[str, Any]:
    interval = bootstrap_interval(values)
    return {"value_mean": float(values.mean()), "value_interval": interval, "value_spread": _spread(values)}


def evaluate_off_policy(
    policies: Mapping[str, Callable[[Array], Array]],
    transitions: Transitions,
    config: FittedQConfig,
    on_step: Callable[[], None] = lambda: None,
) -> OffPolicyEvaluation:
    """Fits every policy's value, and the behaviour's, to the same rows in the same order.

    Rows that were cut off without a next action count for the policies, who say what they would do next, and not for
    the behaviour. At most 10,000 episodes are valued, drawn by the seed.

    Args:
        policies: name -> observations float32[B, O] to actions float32[B, A], environment units, deterministic.
        on_step: called after each gradient step.
    """
    generator = torch.Generator().manual_seed(config.seed)
    encoded = _Encoding(transitions)
    next_actions = [
        transitions.next_actions,
        *(_actions(act, transitions.next_observations) for act in policies.values()),
    ]
    to_go = returns_to_go(transitions, config.discount)
    # Values are fitted in units of the data's returns: a network that starts near 0 starts at their mean, so that a
    # horizon of a hundred steps need not be learned from nothing, and the rewards' scale does not matter.
    middle, unit = float(to_go.mean()), max(float(to_go.std()), 1e-3 * float(np.abs(to_go).max())) or 1.0
    bootstrap = torch.from_numpy(config.discount * ~transitions.terminals).float()
    rewards = (torch.from_numpy(transitions.rewards) - middle + bootstrap * middle) / unit
    fitted = _fitted_values(transitions, encoded, next_actions, rewards, bootstrap, config, generator, on_step)

    @torch.no_grad()
    def valued(rows: NDArray[np.int64], actions: Sequence[Array]) -> NDArray[np.float64]:
        """Each policy's actions at these rows, float64[P, K, rows]."""
        inputs = torch.stack([encoded.inputs(transitions.observations[rows], each) for each in actions])
        values: NDArray[np.float64] = fitted(inputs.unsqueeze(1).expand(-1, config.members, -1, -1)).double().numpy()
        return middle + unit * values

    first = np.flatnonzero(np.diff(transitions.episodes, prepend=-1))
    last = np.flatnonzero(np.diff(transitions.episodes, append=-1))
    if len(first) > _MAX_EPISODES:
        chosen = torch.randperm(len(first), generator=generator)[:_MAX_EPISODES].sort().values.numpy()
        first, last = first[chosen], last[chosen]
    starts = transitions.observations[first]
    at_first = valued(first, [transitions.actions[first], *(_actions(act, starts) for act in policies.values())])
    at_last = valued(last, [transitions.actions[last]] * len(next_actions))[0].mean(axis=0)
    observed = to_go[first]
    cut_off = ~transitions.terminals[last]
    observed[cut_off] += (config.discount ** (last - first) * (at_last - transitions.rewards[last]))[cut_off]
    return OffPolicyEvaluation(
        values=dict(zip(policies, at_first[1:], strict=True)),
        behaviour_values=at_first[0],
        observed_returns=observed,
        scale=unit,
    )


def _fitted_values(
    transitions: Transitions,
    encoded: "_Encoding",
    next_actions: Sequence[Array],
    rewards: Tensor,
    bootstrap: Tensor,
    config: FittedQConfig,
    generator: torch.Generator,
    on_step: Callable[[], None],
) -> "_ActionValues":
    """Q(s, a) towards `rewards` + `bootstrap` Q̄(s', a'), for the a' of P policies, the behaviour's first."""
    taken = encoded.inputs(transitions.observations, transitions.actions)
    following = encoded.observations(transitions.next_observations)
    following_actions = torch.stack([encoded.actions(actions) for actions in next_actions])
    has_target = torch.ones(len(next_actions), len(transitions))
    has_target[0] = torch.from_numpy(transitions.terminals | transitions.has_next_action)

    stack = (len(next_actions), config.members)
    values = _ActionValues([taken.shape[1], *config.hidden, 1], stack, generator)
    target_values = copy.deepcopy(values).requires_grad_(False)
    optimiser = torch.optim.Adam(values.parameters(), lr=config.learning_rate, fused=True)
    for step in range(config.steps):
        rows = torch.randint(len(transitions), (config.members, config.batch), generator=generator)
        with torch.no_grad():
            next_inputs = torch.cat([following[rows].expand(*stack, -1, -1), following_actions[:, rows]], dim=-1)
            targets = rewards[rows] + bootstrap[rows] * target_values(next_inputs)
        errors = values(taken[rows].expand(*stack, -1, -1)) - targets
        loss = (has_target[:, rows] * errors.square()).mean(dim=-1).sum()
        optimiser.param_groups[0]["lr"] = config.learning_rate * min(1.0, 2.0 * (1.0 - step / config.steps))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        torch._foreach_lerp_(list(target_values.parameters()), list(values.parameters()), config.target_update_rate)
        on_step()
    return values


class _Encoding:
    """Observations and actions as the networks take them: normalised, and in [-1, 1]."""

    def __init__(self, transitions: Transitions) -> None:
        self._normaliser = ObservationNormaliser(transitions.observations.shape[1])
        self._normaliser.fit(torch.from_numpy(transitions.observations))
        low, high = torch.tensor(transitions.action_low), torch.tensor(transitions.action_high)
        self._scaler = ActionScaler(low, high)

    def observations(self, observations: Array) -> Tensor:
        normalised: Tensor = self._normaliser(torch.from_numpy(observations))
        return normalised

    def actions(self, actions: Array) -> Tensor:
        return self._scaler.to_unit(torch.from_numpy(actions))

    def inputs(self, observations: Array, actions: Array) -> Tensor:
        return torch.cat([self.observations(observations), self.actions(actions)], dim=-1)


class _ActionValues(nn.Module):
    """P × K networks of one shape with stacked weights, those of one member starting alike: [P, K, B, I] -> [P, K, B].

    Member k of every policy then differs by its targets alone, which makes differences between policies less noisy.
    """

    def __init__(self, sizes: Sequence[int], stack: tuple[int, int], generator: torch.Generator) -> None:
        super().__init__()
        policies, members = stack

        def uniform(rows: int, columns: int, limit: float) -> nn.Parameter:
            weights = limit * (2.0 * torch.rand(members, rows, columns, generator=generator) - 1.0)
            return nn.Parameter(weights.repeat(policies, 1, 1))

        layers = [(width_in, width_out, width_in**-0.5) for width_in, width_out in pairwise(sizes)]
        self.weights = nn.ParameterList(uniform(i, o, limit) for i, o, limit in layers)
        self.biases = nn.ParameterList(uniform(1, o, limit) for _, o, limit in layers)

    def forward(self, inputs: Tensor) -> Tensor:
        features = inputs.flatten(0, 1)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            features = torch.baddbmm(bias, torch.relu(features) if layer else features, weight)
        return features.view(inputs.shape[:-1])


def _actions(act: Callable[[Array], Array], observations: Array) -> Array:
    starts = range(0, len(observations), _CHUNK_ROWS)
    return np.concatenate([act(observations[start : start + _CHUNK_ROWS]) for start in starts])


def evaluate_variants(
    policy: LomPolicy, transitions: Transitions, config: FittedQConfig, console: Console
) -> dict[str, Any]:
    """Values the variants of a policy, prints the table, the doubts and the recommendation; returns them as JSON."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("fitted-Q evaluation", total=config.steps)
        acts = {variant: policy_act(policy, variant) for variant in VARIANTS}
        evaluation = evaluate_off_policy(acts, transitions, config, on_step=lambda: progress.advance(bar))
    console.print(evaluation.table())
    for name, doubt in evaluation.doubts().items():
        console.print(f"warning: value of {name}: {doubt}", style="yellow", markup=False, soft_wrap=True)
    recommendation = evaluation.recommendation()
    recommendation.show(console)
    return {**asdict(config), **evaluation.to_json(), "recommended": asdict(recommendation)}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Values the variants of a trained run on recorded data, its own or other, without an environment."""

    run: tyro.conf.Positional[Path]
    """Folder that lom-train wrote."""
    datasets: tyro.conf.Positional[tuple[Path, ...]]
    """Files as for lom-train."""
    steps: int | None = None
    """Gradient steps; an eighth of the policy's, but 3,000 where it had as many, if not given."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the values; exits 2 with one line where run or data were refused."""
    arguments = tyro.cli(Arguments, prog="python -m lom.off_policy_evaluation", args=argv)
    console = Console(stderr=True, highlight=False)
    try:
        trained = load_run(arguments.run)
        spec = trained.spec
        transitions = load_transitions(
            arguments.datasets,
            action_bounds=(np.array(spec.action_low, np.float32), np.array(spec.action_high, np.float32)),
            observation_dim=len(spec.observation_low),
            observation_keys=spec.observation_keys,
        )
        config = FittedQConfig.after(spec.config)
        config = config if arguments.steps is None else replace(config, steps=arguments.steps)
        evaluate_variants(trained.policy, transitions, config, console)
    except (DatasetError, RunError, ValueError) as error:
        console.print(f"off_policy_evaluation: {error}", style="red", markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
