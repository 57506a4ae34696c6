"""Every option of training, by hand-worked numbers through the learner; defaults are in the other tests."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lom import losses, train
from lom.config import PRESETS, TASKS, TrainConfig, preset_config
from lom.dataset import load_transitions
from lom.envs.fork import fork_demonstrations
from lom.learner import Learner
from lom.networks import LOG_STD_MAX, BehaviourMixture, Mixture
from lom.returns import multi_step
from lom.run import load_run
from lom.study.experiments import (
    TWO_PUSHES,
    TWO_PUSHES_CONFIG,
    behave_in_two_pushes,
    improve_on_mode,
    trained,
    transitions_of,
)

# One state and its successor; the value of an action is the action times `slope`, see `linear_critic`.
TINY = replace(
    PRESETS["small"],
    mixture_steps=1,
    steps=10,
    hidden=(4,),
    mixture_hidden=(4,),
    num_components=2,
    batch=8,
    hyper_batch=8,
    target_noise_std=0.0,
    mixture_decay_share=0.0,
    max_drift=0.0,
    actor_form="direct",
)
MODES = (-0.5, 0.25)


def learner_of(config: TrainConfig, data_action: float = 0.1, states: Sequence[float] = (0.0,)) -> Learner:
    """Two modes of nearly no spread; hyper-Q prefers the second; Q(s, a) = 2a in every critic; six rows."""
    rows = 6
    zeros, observations = np.zeros((rows, 1)), np.resize(np.array(states), (rows, 1))
    data = transitions_of(observations, zeros + data_action, np.ones(rows), observations, zeros + 0.1)
    learner = Learner(data, config, -torch.ones(1), torch.ones(1))
    learner.mixture_steps_done = config.mixture_steps
    mixture = learner.policy.mixture
    with torch.no_grad():
        for head in (mixture.mixing_logits, mixture.raw_means, mixture.raw_log_stds):
            head.weight.zero_()
        mixture.mixing_logits.bias.zero_()
        mixture.raw_means.bias.copy_(torch.atanh(torch.tensor(MODES)))
        mixture.raw_log_stds.bias.fill_(-20.0)
    for network in (learner.critic, learner.target_critic):
        for member in network.members:
            linear_critic(member, 2.0)
    set_output(learner.hyper_critic, [0.0, 1.0])
    set_output(learner.actor, [math.atanh(0.125)])
    return learner


def linear_critic(member: nn.Module, slope: float) -> None:
    """Q(s, a) = slope · a, as relu(a) - relu(-a)."""
    first, last = (module for module in member.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        for parameter in member.parameters():
            parameter.zero_()
        first.weight[0, 1], first.weight[1, 1] = 1.0, -1.0
        last.weight[0, 0], last.weight[0, 1] = slope, -slope


def set_output(network: nn.Module, values: list[float]) -> None:
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor(values))


def calls_of(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    recorded: list[tuple[Any, ...]] = []
    original: Callable[..., Tensor] = getattr(losses, name)

    def recording(*arguments: Any) -> Tensor:
        recorded.append(tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments))
        return original(*arguments)

    monkeypatch.setattr(losses, name, recording)
    return recorded


def step(learner: Learner) -> None:
    next(learner.remaining())


# ---------------------------------------------------------------- losses


def test_three_ways_to_hear_three_critics() -> None:
    values = torch.tensor([[1.0, 6.0], [4.0, 2.0], [1.0, 1.0]])
    assert losses.reduced_value(values, "mean").tolist() == [2.0, 3.0]
    assert losses.reduced_value(values, "min").tolist() == [1.0, 1.0]
    assert losses.reduced_value(values, "first").tolist() == [1.0, 6.0]


def test_normalised_advantages_have_root_mean_square_one_and_keep_their_zero() -> None:
    advantages = torch.tensor([[3.0, 0.0], [-4.0, 5.0]])
    torch.testing.assert_close(losses.normalised_advantages(advantages), advantages / math.sqrt(12.5))
    assert losses.normalised_advantages(torch.zeros(1, 3)).tolist() == [[0.0, 0.0, 0.0]]


def test_the_self_normalised_target_by_hand() -> None:
    """Weights 1, 2 and min(e^9, 3) = 3 on the actions 0, 0.3 and 0.6: (0.6 + 1.8) / 6."""
    actions = torch.tensor([[[0.0], [0.3], [0.6]]])
    advantages = torch.tensor([[0.0, math.log(2.0) / 3, 3.0]])
    target = losses.self_normalised_target(actions, advantages, 3.0, 3.0)
    assert target.item() == pytest.approx(0.4)


def test_weights_that_all_vanish_still_have_a_mean() -> None:
    target = losses.self_normalised_target(torch.tensor([[[0.2], [0.8]]]), torch.tensor([[-1e4, -1e4]]), 5.0, 50.0)
    assert target.item() == pytest.approx(0.5)


def test_the_self_normalised_target_is_the_optimum_of_the_weighted_loss_of_one_state() -> None:
    generator = torch.Generator().manual_seed(0)
    actions, advantages = torch.randn(1, 16, 2, generator=generator), torch.randn(1, 16, generator=generator)
    target = losses.self_normalised_target(actions, advantages, 2.0, 4.0).requires_grad_()
    weights = losses.imitation_weights(advantages, 2.0, 4.0)
    loss = losses.weighted_imitation_loss(target.expand(16, 2), actions[0], weights[0])
    assert torch.autograd.grad(loss, target)[0].abs().max().item() < 1e-6


# ---------------------------------------------------------------- the actor's target


@pytest.mark.parametrize(
    ("baseline", "advantage"),
    [
        ("mode_mean", 0.0),  # Q(0.25) - Q(0.25)
        ("policy", 2 * 0.25 - 2 * 0.125),  # the actor acts 0.125
        ("hyper", 0.0),
    ],
)
def test_what_an_action_is_compared_with(monkeypatch: pytest.MonkeyPatch, baseline: Any, advantage: float) -> None:
    learner = learner_of(replace(TINY, advantage_baseline=baseline, critic_learning_rate=1e-9))
    if baseline == "hyper":
        linear_critic(learner.greedy_critic.members[0], 7.0)
    weights = calls_of(monkeypatch, "imitation_weights")
    step(learner)
    # The floor of the spread, exp(-5) = 0.0067, is what is left of randomness: times the slope, at 5 sigma.
    assert weights[0][0].numpy() == pytest.approx(advantage, abs=0.25)
    assert float(weights[0][0].mean()) == pytest.approx(advantage, abs=0.1)


def test_hyper_values_come_from_critics_that_bootstrap_with_the_chosen_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data acts 0.1 at s', the chosen mode 0.25: the behaviour's target is 1 + γ·2·0.1, the other 1 + γ·4·0.25."""
    learner = learner_of(replace(TINY, advantage_baseline="hyper", discount=0.5, num_critics=2))
    for member, slope in zip(learner.target_greedy_critic.members, (4.0, 5.0), strict=True):
        linear_critic(member, slope)
    recorded = calls_of(monkeypatch, "critic_loss")
    step(learner)
    (_, behaviour), (_, greedy) = recorded
    assert behaviour.numpy() == pytest.approx(1 + 0.5 * 2 * 0.1, abs=1e-5)
    assert greedy.numpy() == pytest.approx(1 + 0.5 * 4 * 0.25, abs=0.08)  # the smaller of both critics


def test_hyper_advantages_are_the_greedy_critics(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(replace(TINY, advantage_baseline="hyper", imitation_noise_std=0.2, critic_learning_rate=1e-9))
    linear_critic(learner.greedy_critic.members[0], -3.0)  # the behaviour's critic says +2
    weights, imitated = calls_of(monkeypatch, "imitation_weights"), calls_of(monkeypatch, "weighted_imitation_loss")
    step(learner)
    assert weights[0][0][:, 0].numpy() == pytest.approx(-3.0 * (imitated[0][1][:, 0].numpy() - 0.25), abs=1e-4)


def test_hyper_critics_value_the_greedy_hyper_policy_not_the_behaviour() -> None:
    """A point that is pushed left or right at random: -4.29 from 0.8 in closed form. Choosing the better push each
    time is worth -1.34 (roll-outs of `lom-study selection`)."""
    config = replace(TWO_PUSHES_CONFIG, advantage_baseline="hyper", target_update_rate=0.2)
    learner = trained(behave_in_two_pushes(np.random.default_rng(0)), config)
    start = torch.tensor([[0.8]])
    with torch.no_grad():
        action = learner.policy(start, "greedy_mode")["action"]
        observation = learner.policy.normaliser(start)
        behaviour, greedy = (critic(observation, action).item() for critic in (learner.critic, learner.greedy_critic))
    exact = float(TWO_PUSHES.action_value(np.array([0.8]))(action.double().numpy()[0]))
    assert behaviour == pytest.approx(exact, abs=0.3)
    assert greedy == pytest.approx(-1.34, abs=0.3)
    assert exact < -3.0


def test_several_samples_share_one_self_normalised_target(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(replace(TINY, imitation_samples=16, imitation_noise_std=0.1, critic_learning_rate=1e-9))
    seen, imitated = calls_of(monkeypatch, "self_normalised_target"), calls_of(monkeypatch, "weighted_imitation_loss")
    step(learner)
    samples, advantages, *_ = seen[0]
    _, target, row_weights = imitated[0]
    assert samples.shape == (8, 16, 1)
    assert advantages.numpy() == pytest.approx(2 * (samples[:, :, 0].numpy() - 0.25), abs=1e-4)
    weights = np.exp(5 * advantages.numpy())
    expected = (weights * samples[:, :, 0].numpy()).sum(axis=1) / weights.sum(axis=1)
    assert target[:, 0].numpy() == pytest.approx(expected, abs=1e-5)
    assert row_weights.tolist() == [1.0] * 8


@pytest.mark.parametrize(
    ("data_action", "brought_forth", "weight"),
    [
        (0.24, 1.0, math.exp(5 * 2 * (0.24 - 0.25))),  # the chosen mode's: its advantage alone decides
        (-0.49, 0.0, 0.0),  # the other mode's: not imitated, whatever it is worth
    ],
)
def test_the_datas_own_action_counts_as_far_as_the_chosen_mode_brought_it_forth(
    monkeypatch: pytest.MonkeyPatch, data_action: float, brought_forth: float, weight: float
) -> None:
    learner = learner_of(replace(TINY, imitated_actions="data", critic_learning_rate=1e-9), data_action)
    imitated = calls_of(monkeypatch, "weighted_imitation_loss")
    step(learner)
    _, target, row_weights = imitated[0]
    assert target[:, 0].numpy() == pytest.approx(data_action, abs=1e-6)
    assert row_weights.numpy() == pytest.approx(brought_forth * weight, abs=1e-4)


def test_several_steps_enter_the_critics_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With target critics that say 2: Σ γ^i r_i + 2 γ^k, and no 2 behind a terminal."""
    np.savez(tmp_path / "fork.npz", **fork_demonstrations(episodes=5, seed=1))  # type: ignore[arg-type]
    transitions = load_transitions([tmp_path / "fork.npz"])
    learner = Learner(transitions, replace(TINY, n_step=4, batch=256), -torch.ones(2), torch.ones(2))
    learner.mixture_steps_done = TINY.mixture_steps
    set_output(learner.target_critic.members[0], [2.0])
    recorded = calls_of(monkeypatch, "critic_loss")
    step(learner)
    rewards, last, discounts = multi_step(transitions, 4, TINY.discount)
    expected = np.unique((rewards + 2.0 * discounts * ~transitions.terminals[last]).astype(np.float32))
    targets = np.unique(recorded[0][1].numpy())
    assert len(targets) > 10
    assert np.abs(targets[:, None] - expected).min(axis=1).max() < 1e-5
    one_step = transitions.rewards + 2.0 * TINY.discount * ~transitions.terminals
    assert np.abs(targets[:, None] - one_step).min(axis=1).max() > 0.1


def test_steps_of_the_data_say_nothing_about_the_greedy_hyper_policy() -> None:
    with pytest.raises(ValueError, match="n_step: expected 1 with advantage_baseline = hyper"):
        replace(TINY, n_step=2, advantage_baseline="hyper")


def two_state_learner(config: TrainConfig, in_good_state: tuple[float, float], scale: float) -> Learner:
    """States at -1 and 1; modes of weights 0.9 and 0.1, hyper-Q 0 and 1; more by `in_good_state` at 1."""
    learner = learner_of(replace(config, hyper_learning_rate=1e-9, batch=64, steps=300), states=(-1.0, 1.0))
    first, last = (module for module in learner.hyper_critic.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        learner.policy.mixture.mixing_logits.bias.copy_(torch.tensor([math.log(9.0), 0.0]))
        first.weight.zero_()
        first.bias.zero_()
        first.weight[0, 0] = 1.0
        last.weight[:, 0] = torch.tensor(in_good_state)
        for parameter in (last.weight, last.bias):
            parameter.mul_(scale)
    for _ in learner.remaining():
        pass
    return learner


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize(
    ("hazard", "modes", "in_good_state"),
    [(0.0, [1, 1], [10.0, 11.0]), (0.05, [1, 1], [9.934, 10.205]), (0.2, [1, 0], [9.784, 8.855])],
)
def test_an_unusual_mode_costs_what_it_puts_at_stake(
    hazard: float, modes: list[int], in_good_state: list[float], scale: float
) -> None:
    """The good state is worth 10 more than the worst, where nothing is to be lost: 10 h (1 - u) with u = 0.9 and 0.1.
    Besides 0.15 log u, half of the spread 0.3. Whatever the scale of the rewards."""
    learner = two_state_learner(replace(TINY, hazard=hazard), (10.0, 10.0), scale)
    answer = learner.policy(torch.tensor([[-1.0], [1.0]]), "greedy_mode")
    assert answer["mode"].tolist() == modes
    assert (answer["hyper_q"][1] / scale).tolist() == pytest.approx(in_good_state, rel=1e-3)
    metrics = learner.metrics()
    assert ("hyper_critic/share" in metrics) == (hazard > 0)
    if hazard > 0:
        assert metrics["hyper_critic/share"] == pytest.approx(0.1 if modes[1] == 1 else 0.5, abs=0.1)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_an_unusual_mode_must_be_better_by_more_than_noise(scale: float) -> None:
    """The mode of share 0.1 is worth 11 more in one state and 1 more in the other: half of the spread,
    sqrt(0.09 (121 + 1) / 2) / 2 = 1.17, times ln 9 is more than 1 and less than 11."""
    learner = two_state_learner(replace(TINY, hazard=1e-9), (0.0, 10.0), scale)
    answer = learner.policy(torch.tensor([[-1.0], [1.0]]), "greedy_mode")
    assert answer["mode"].tolist() == [0, 1]
    expected = [1.17 * math.log(0.9), 1.0 + 1.17 * math.log(0.1)]
    assert (answer["hyper_q"][0] / scale).tolist() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("max_drift", "expected"), [(0.0, 5.0), (1.0, 0.2), (10.0, 2.0), (50.0, 5.0)])
def test_weights_lead_no_farther_than_the_drift(
    monkeypatch: pytest.MonkeyPatch, max_drift: float, expected: float
) -> None:
    """A = 2 (0.3 - 0.25) = 0.1 with the data's action, 50 steps of horizon: β is at most D / (50 · 0.1)."""
    config = replace(TINY, max_drift=max_drift, discount=0.98, imitated_actions="data", critic_learning_rate=1e-9)
    learner = learner_of(config, data_action=0.3)
    weights = calls_of(monkeypatch, "imitation_weights")
    for _ in range(3):
        step(learner)
    assert [float(call[1]) for call in weights] == pytest.approx([expected] * 3, rel=1e-3)
    assert learner.metrics()["actor/inverse_temperature"] == pytest.approx(expected, rel=1e-3)


def residual_learner(**choices: Any) -> Learner:
    """Modes as wide as they can be, σ = 1, and an actor that answers 1/8: three eighths above the second mode, 1/4."""
    learner = learner_of(replace(TINY, actor_form="residual", **choices), data_action=0.3)
    with torch.no_grad():
        learner.policy.mixture.raw_log_stds.bias.fill_(20.0)
    return learner


def test_a_residual_actor_learns_how_far_to_deviate_from_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = residual_learner(imitated_actions="data", advantage_baseline="policy", critic_learning_rate=1e-9)
    fitted, weighted = calls_of(monkeypatch, "weighted_imitation_loss"), calls_of(monkeypatch, "imitation_weights")
    step(learner)
    output, target, _ = fitted[0]
    assert output.detach().numpy() == pytest.approx(0.125, abs=1e-4)
    assert target.numpy() == pytest.approx((0.3 - 0.25) / 3.0, abs=1e-4)
    assert weighted[0][0].numpy() == pytest.approx(2.0 * (0.3 - 0.625), abs=1e-3)  # against its own action


def test_a_residual_actor_does_not_shrink_from_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode on the bound, σ = 1: samples deviate by 0 in the mean, and are worth what they are once they are clipped.
    Clipped ones would lie 0.4 inside, which is -0.13 of the actor's reach."""
    learner = residual_learner(batch=4096, critic_learning_rate=1e-9)
    with torch.no_grad():
        learner.policy.mixture.raw_means.bias.fill_(math.atanh(0.99))
    fitted, weighted = calls_of(monkeypatch, "weighted_imitation_loss"), calls_of(monkeypatch, "imitation_weights")
    step(learner)
    assert fitted[0][1].mean().item() == pytest.approx(0.0, abs=0.02)
    advantages = weighted[0][0]
    assert advantages.max().item() == pytest.approx(2.0 * (1.0 - 0.99), abs=1e-3)
    assert advantages.min().item() == pytest.approx(2.0 * (-1.0 - 0.99), abs=1e-3)


@pytest.mark.parametrize(("output", "forced_mode", "action"), [(0.125, -1, 0.625), (0.9, -1, 1.0), (0.125, 0, -0.125)])
def test_a_residual_actor_deviates_from_the_mode_that_acts(output: float, forced_mode: int, action: float) -> None:
    policy = residual_learner().policy
    set_output(policy.actor, [math.atanh(output)])
    rows = torch.zeros(1, 1)
    acted = policy.by_mode("actor", rows, torch.tensor([forced_mode], dtype=torch.int32))
    assert acted["action"].item() == pytest.approx(action, abs=1e-4)
    assert policy(rows, "actor")["mode"].item() == 1
    assert policy(rows, "greedy_mode")["action"].item() == pytest.approx(0.25, abs=1e-4)


def test_a_residual_actor_begins_at_the_mode() -> None:
    zeros = np.zeros((6, 1))
    data = transitions_of(zeros, zeros, np.ones(6), zeros, zeros)
    policy = Learner(data, replace(TINY, actor_form="residual"), -torch.ones(1), torch.ones(1)).policy
    rows = torch.linspace(-1.0, 1.0, 5).unsqueeze(1)
    assert torch.equal(policy(rows, "actor")["action"], policy(rows, "greedy_mode")["action"])


def test_many_samples_reach_the_closed_form_too() -> None:
    config = replace(
        PRESETS["small"], mixture_steps=400, steps=800, num_components=4, imitation_samples=8, averaging_steps=200
    )
    result = improve_on_mode(config=config)
    assert result.actor_action == pytest.approx(result.tilted_mean, abs=0.03)


def test_normalised_advantages_reach_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(replace(TINY, normalise_advantages=True, imitation_noise_std=0.2))
    weights = calls_of(monkeypatch, "imitation_weights")
    step(learner)
    assert float(weights[0][0].square().mean()) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(("reduction", "expected"), [("mean", 2.5), ("min", 1.0), ("first", 4.0)])
def test_what_several_critics_say_to_hyper_q(monkeypatch: pytest.MonkeyPatch, reduction: Any, expected: float) -> None:
    learner = learner_of(replace(TINY, num_critics=2, critic_reduction=reduction, critic_learning_rate=1e-9))
    for member, value in zip(learner.critic.members, (4.0, 1.0), strict=True):
        set_output(member, [value])
    hyper = calls_of(monkeypatch, "hyper_critic_loss")
    step(learner)
    assert hyper[0][1].numpy() == pytest.approx(expected, abs=1e-5)


def test_target_noise_is_clipped_at_half_and_stays_in_the_action_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """Q = 2a, a' = 0.1: targets are 1 + 2(0.1 ± at most 0.5), and both bounds are reached at std 50."""
    learner = learner_of(replace(TINY, target_noise_std=50.0, discount=1.0, batch=256))
    targets = calls_of(monkeypatch, "critic_loss")
    step(learner)
    assert targets[0][1].min().item() == pytest.approx(1 + 2 * -0.4, abs=1e-5)
    assert targets[0][1].max().item() == pytest.approx(1 + 2 * 0.6, abs=1e-5)


# ---------------------------------------------------------------- the mixture


@pytest.mark.parametrize("floor", [-5.0, -15.0])
def test_the_floor_of_the_spread_moves_and_the_start_does_not(floor: float) -> None:
    mixture = BehaviourMixture(1, 1, 2, (4,), floor)
    for raw, log_std in ((-30.0, floor), (0.0, -0.596), (30.0, LOG_STD_MAX)):
        with torch.no_grad():
            mixture.raw_log_stds.weight.zero_()
            mixture.raw_log_stds.bias.fill_(raw)
            parameters: Mixture = mixture(torch.zeros(1, 1))
        assert parameters.log_stds[0, 0, 0].item() == pytest.approx(log_std, abs=1e-3)


def test_initial_means_of_the_network_ignore_the_data() -> None:
    rows = 200
    actions = np.where(np.arange(rows) % 2 == 0, 0.9, -0.9)[:, None]
    data = transitions_of(np.zeros((rows, 1)), actions, np.zeros(rows))
    spread = {}
    for initial_means in ("data", "network"):
        config = replace(TINY, initial_means=initial_means)
        learner = Learner(data, config, -torch.ones(1), torch.ones(1))
        with torch.no_grad():
            spread[initial_means] = learner.policy.mixture(torch.zeros(1, 1)).means.abs().min().item()
    assert spread["data"] > 0.7
    assert spread["network"] < 0.6


# ---------------------------------------------------------------- schedules and averages


def test_learning_rates_fall_over_the_last_share_of_each_stage() -> None:
    learner = learner_of(replace(TINY, mixture_steps=10, mixture_decay_share=0.5, decay_share=0.2))
    learner.mixture_steps_done = 0
    rates: dict[str, list[float]] = {"mixture": [], "policy": []}
    for stage, _ in learner.remaining():
        optimiser = learner._optimisers["mixture" if stage == "mixture" else "actor"]
        rates[stage].append(optimiser.param_groups[0]["lr"] * 1000)
    assert rates["mixture"] == pytest.approx([1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert rates["policy"] == pytest.approx([1] * 9 + [0.5])


def test_components_widen_over_the_first_share_of_the_mixture_s_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    loss = BehaviourMixture.negative_log_likelihood

    def seeing(mixture: BehaviourMixture, observations: Tensor, actions: Tensor, widened: float) -> Tensor:
        seen.append(widened)
        return loss(mixture, observations, actions, widened)

    monkeypatch.setattr(BehaviourMixture, "negative_log_likelihood", seeing)
    for share in (0.5, 0.0):
        learner = learner_of(replace(TINY, mixture_steps=8, widening_share=share))
        learner.mixture_steps_done = 0
        for _ in learner.remaining():
            pass
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0] + [1.0] * 8


def test_without_decay_the_rates_stay() -> None:
    learner = learner_of(TINY)
    for _ in learner.remaining():
        pass
    assert [o.param_groups[0]["lr"] for o in learner._optimisers.values()] == pytest.approx([1e-3] * 5)


def test_what_acts_is_the_average_of_the_last_weights() -> None:
    """Three steps, then with N = 2: mean of one, mean of two, then half of the last average and half of the new."""
    learner = learner_of(replace(TINY, averaging_steps=2))
    for name in ("actor", "hyper_critic"):
        acting, learning = getattr(learner.policy, name).body[-1].bias, getattr(learner, name).body[-1].bias
        assert acting is not learning
    expected = {"actor": torch.zeros(1), "hyper_critic": torch.zeros(2)}
    for count in (1, 2, 3):
        step(learner)
        for name in expected:
            learned = getattr(learner, name).body[-1].bias.detach().clone()
            expected[name] = learned if count == 1 else (expected[name] + learned) / 2
            torch.testing.assert_close(getattr(learner.policy, name).body[-1].bias.detach(), expected[name])
    assert not torch.equal(learned, expected[name])


@pytest.mark.parametrize("changes", [{"averaging_steps": 3}, {"advantage_baseline": "hyper", "decay_share": 0.5}])
def test_a_run_with_further_networks_resumes_to_the_same_result(changes: dict[str, Any]) -> None:
    config = replace(TINY, **changes)
    whole, first, second = (learner_of(config) for _ in range(3))
    for _ in whole.remaining():
        pass
    for _ in range(4):
        step(first)
    second.restore(first.state())
    for _ in second.remaining():
        pass
    expected, got = whole.state(), second.state()
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


# ---------------------------------------------------------------- presets


def test_the_faithful_preset_is_the_authors_code_as_it_runs() -> None:
    config = preset_config("faithful", "hopper-medium")
    assert (config.num_critics, config.num_components, config.critic_reduction) == (3, 5, "first")
    assert (config.hyper_head, config.advantage_baseline, config.min_mixing_weight) == ("one_hot", "policy", 0.0)
    assert (config.mixture_steps, config.steps, config.mixture_hidden) == (200_000, 1_000_000, (512, 512))
    assert (config.mixture_batch, config.batch, config.hyper_batch) == (512, 256, 1024)
    assert (config.inverse_temperature, config.max_imitation_weight, config.target_noise_std) == (5.0, 50.0, 0.2)


def test_the_paper_preset_takes_only_what_the_paper_tunes_from_a_task() -> None:
    config = preset_config("paper", "hopper-medium-expert-v2")
    assert (config.num_components, config.inverse_temperature) == (2, 0.1)
    assert (config.num_critics, config.target_noise_std, config.imitation_noise_std) == (1, 0.0, 0.0)
    assert (config.hyper_head, config.advantage_baseline) == ("components", "mode_mean")


def test_a_task_lies_over_our_defaults_and_leaves_our_mask() -> None:
    config = preset_config("standard", "halfcheetah-medium-replay-like")
    assert (config.imitation_noise_std, config.max_imitation_weight) == (0.4, 100.0)
    assert config.min_mixing_weight is None
    assert preset_config("paper", "halfcheetah-medium-replay-like").min_mixing_weight == 0.0
    assert len(TASKS) == 15
    assert TASKS["halfcheetah-medium-expert"].num_components == 1  # one-step advantage-weighted regression


@pytest.mark.parametrize(("preset", "task"), [("huge", None), ("standard", "Hopper-medium"), ("standard", "")])
def test_an_unknown_preset_or_task_is_refused_by_name(preset: str, task: str | None) -> None:
    with pytest.raises(ValueError, match="expected one of"):
        preset_config(preset, task)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("task", [None, "walker2d-medium-expert"])
def test_every_preset_trains(preset: str, task: str | None) -> None:
    config = replace(
        preset_config(preset, task), mixture_steps=2, steps=3, hidden=(8,), mixture_hidden=(8,), hyper_batch=16
    )
    rng = np.random.default_rng(0)
    observations, actions = rng.normal(size=(50, 2)), np.clip(rng.normal(size=(50, 1)), -1, 1)
    data = transitions_of(observations, actions, rng.normal(size=50), observations, actions)
    learner = Learner(data, config, -torch.ones(1), torch.ones(1))
    for _ in learner.remaining():
        pass
    assert all(np.isfinite(value) for value in learner.metrics().values())


def test_preset_and_task_reach_the_run_and_flags_override_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "fork.npz", **fork_demonstrations(episodes=20))  # type: ignore[arg-type]
    small = ["--mixture-steps", "3", "--steps", "3", "--hidden", "8", "--mixture-hidden", "8", "--hyper-batch", "16"]
    chosen = ["--preset", "faithful", "--task=hopper-medium-like", "--num-critics", "2"]
    train.main([str(tmp_path / "fork.npz"), "--out", str(tmp_path / "run"), *chosen, *small])
    config = load_run(tmp_path / "run").spec.config
    assert (config.num_components, config.hyper_head, config.min_mixing_weight) == (5, "one_hot", 0.0)
    assert (config.num_critics, config.steps) == (2, 3)


def test_an_unknown_task_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main(["gone.npz", "--out", str(tmp_path / "run"), "--task", "Hopper-medium"])
    assert caught.value.code == 2
    assert "--task: expected one of" in capsys.readouterr().err
