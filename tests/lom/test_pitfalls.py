"""The traps of the authors' code, one regression test each, through the learner: every test fails in the trap.

What is looked at is what really enters the networks and the losses, not what some function would return.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lom import losses
from lom.config import PRESETS, TrainConfig
from lom.dataset import Transitions, load_transitions
from lom.learner import Learner
from lom.networks import LOG_STD_MAX, LOG_STD_MIN

TINY = replace(
    PRESETS["small"],
    mixture_steps=1,
    steps=40,
    hidden=(8,),
    mixture_hidden=(8,),
    num_components=3,
    batch=64,
    hyper_batch=64,
    target_noise_std=0.0,
    held_out_share=0.0,
    actor_form="direct",
)
EPISODE_STEPS = 5
EPISODES = 8


@pytest.fixture(scope="module")
def timed_out(tmp_path_factory: pytest.TempPathFactory) -> Transitions:
    """Episodes that all end by the time limit, except the last one, which is terminal. Row i acts a = i / 100."""
    rows = EPISODES * EPISODE_STEPS
    observations = np.random.default_rng(0).normal(size=(rows, 2)).astype(np.float32)
    last = np.arange(rows) % EPISODE_STEPS == EPISODE_STEPS - 1
    arrays = {
        "observations": observations,
        "actions": (np.arange(rows, dtype=np.float32) / 100)[:, None],
        "rewards": np.ones(rows, np.float32),
        "next_observations": np.roll(observations, -1, axis=0) + 100 * last[:, None],
        "terminals": np.arange(rows) == rows - 1,
        "timeouts": last & (np.arange(rows) != rows - 1),
    }
    path = tmp_path_factory.mktemp("data") / "timed_out.npz"
    np.savez(path, **arrays)
    return load_transitions([path])


def in_second_stage(transitions: Transitions, config: TrainConfig = TINY) -> Learner:
    """A learner whose next step is its first one of critics and actor."""
    learner = Learner(transitions, config, -torch.ones(1), torch.ones(1))
    learner.mixture_steps_done = config.mixture_steps
    return learner


def step(learner: Learner, count: int = 1) -> None:
    steps = learner.remaining()
    for _ in range(count):
        next(steps)


def calls_of(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """Records what a loss is called with; it is still computed."""
    recorded: list[tuple[Any, ...]] = []
    original: Callable[..., Tensor] = getattr(losses, name)

    def recording(*arguments: Any) -> Tensor:
        recorded.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(losses, name, recording)
    return recorded


def inputs_of(network: nn.Module) -> list[tuple[Tensor, ...]]:
    recorded: list[tuple[Tensor, ...]] = []
    network.register_forward_pre_hook(lambda _, arguments: recorded.append(arguments))
    return recorded


def set_mixture(learner: Learner, weights: list[float], means: list[float], raw_log_std: float) -> None:
    """The same mixture at every observation."""
    mixture = learner.policy.mixture
    with torch.no_grad():
        for head in (mixture.mixing_logits, mixture.raw_means, mixture.raw_log_stds):
            head.weight.zero_()
        mixture.mixing_logits.bias.copy_(torch.tensor(weights).log())
        mixture.raw_means.bias.copy_(torch.atanh(torch.tensor(means)))
        mixture.raw_log_stds.bias.fill_(raw_log_std)


def set_output(network: nn.Module, values: list[float]) -> None:
    """Makes a network constant."""
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor(values))


def test_1_the_next_action_never_comes_from_another_episode(timed_out: Transitions) -> None:
    """In the trap the row before a time limit bootstraps with the next episode's first action."""
    learner = in_second_stage(timed_out)
    seen = inputs_of(learner.target_critic)
    step(learner, 40)
    first_actions = set(range(EPISODE_STEPS, EPISODES * EPISODE_STEPS, EPISODE_STEPS))
    pairs = 0
    for observations, actions in seen:
        rows = (100 * actions[:, 0]).round().int().tolist()
        assert not first_actions & set(rows)
        raw = learner.policy.normaliser.mean + observations * learner.policy.normaliser.std
        for row, observation in zip(rows, raw, strict=True):
            if row != 0:  # the terminal row: its next value is masked
                pairs += 1
                np.testing.assert_allclose(observation.numpy(), timed_out.observations[row], atol=1e-4)
    assert pairs > 1000


def test_2_the_last_row_has_no_next_row(timed_out: Transitions) -> None:
    """In the trap the last row reads past the end: a zero action, or an IndexError on a full buffer."""
    assert timed_out.terminals[-1]
    cut_off = replace(timed_out, terminals=np.zeros(len(timed_out), np.bool_))
    learner = in_second_stage(cut_off)
    seen = inputs_of(learner.target_critic)
    step(learner, 40)
    assert all((actions > 0).all() for _, actions in seen)  # row 0 acts 0 and follows on nothing
    assert not timed_out.has_next_action[-1]


@pytest.mark.parametrize("raw_log_std", [-9.0, 0.0, 9.0])
def test_3_fitting_scoring_and_sampling_see_one_clamped_spread(
    timed_out: Transitions, monkeypatch: pytest.MonkeyPatch, raw_log_std: float
) -> None:
    """In the trap a raw log-std above 0 is clamped where it is fitted and scored, and sampled as it is."""
    config = replace(TINY, batch=4096, hyper_batch=4096, min_mixing_weight=0.0)
    learner = in_second_stage(timed_out, config)
    set_mixture(learner, [0.4, 0.3, 0.3], [0.0, 0.0, 0.0], raw_log_std)
    fitted = learner.policy.mixture(torch.zeros(1, 2)).log_stds[0, 0, 0].item()
    assert LOG_STD_MIN <= fitted <= LOG_STD_MAX
    scored, imitated = inputs_of(learner.critic), calls_of(monkeypatch, "weighted_imitation_loss")
    step(learner)
    # A quantile that the action bounds do not reach: |z| below 0.6745 half of the time.
    half_inside = 0.6745 * np.exp(fitted)
    for samples in (scored[1][1], imitated[0][1]):
        assert float((samples.abs() < half_inside).float().mean()) == pytest.approx(0.5, abs=0.03)


def test_4_what_no_data_supports_is_neither_chosen_nor_imitated(
    timed_out: Transitions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the trap the argmax takes the component with weight 1 %, whose hyper-Q is extrapolated."""
    learner = in_second_stage(timed_out)
    set_mixture(learner, [0.01, 0.49, 0.5], [-0.8, 0.2, 0.7], -9.0)
    set_output(learner.policy.hyper_critic, [99.0, 2.0, 1.0])
    imitated = calls_of(monkeypatch, "weighted_imitation_loss")
    step(learner)
    assert imitated[0][1].numpy() == pytest.approx(0.2, abs=0.1)
    with torch.no_grad():
        assert (learner.policy(torch.zeros(4, 2), "greedy_mode")["mode"] == 1).all()


def test_5_the_action_that_is_valued_is_the_action_that_is_imitated(
    timed_out: Transitions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the trap hyper-Q values unclipped samples, the actor imitates clipped ones with noise added after."""
    learner = in_second_stage(timed_out, replace(TINY, imitation_noise_std=0.4, batch=1024))
    set_mixture(learner, [0.4, 0.3, 0.3], [0.95, 0.95, 0.95], 0.0)
    valued, imitated = inputs_of(learner.critic), calls_of(monkeypatch, "weighted_imitation_loss")
    step(learner)
    hyper_samples, actor_samples = valued[1][1], valued[2][1]
    for samples in (hyper_samples, actor_samples):
        assert float(samples.abs().max()) == 1.0
        assert float((samples == 1.0).float().mean()) > 0.2
    assert torch.equal(actor_samples[:, 0], imitated[0][1])


def test_6_the_normaliser_is_fitted_without_noise_and_divides_by_no_zero(timed_out: Transitions) -> None:
    """In the trap the spread grows by 0.05 in quadrature, and a constant dimension divides by its rounding."""
    narrow = timed_out.observations * np.array([0.01, 0.0], np.float32) + np.array([3.0, 7.0], np.float32)
    learner = in_second_stage(replace(timed_out, observations=narrow, next_observations=narrow))
    normaliser = learner.policy.normaliser
    assert float(normaliser.std[0]) == pytest.approx(float(narrow[:, 0].std(dtype=np.float64)), rel=1e-5)
    normalised = normaliser(torch.from_numpy(narrow))
    assert float(normalised[:, 0].std(correction=0)) == pytest.approx(1.0, rel=1e-4)
    assert torch.equal(normalised[:, 1], torch.zeros(len(narrow)))
    assert torch.isfinite(normaliser(torch.tensor([[3.0, 7.5]]))).all()


def test_7_a_checkpoint_holds_all_that_training_needs(timed_out: Transitions) -> None:
    """In the trap only the mixture is saved. (Seeded evaluation: tests/lom/test_evaluation.py.)"""
    learner = in_second_stage(timed_out)
    step(learner, 3)
    names = set(learner.state())
    for part in (
        "policy.mixture.",
        "policy.hyper_critic.",
        "policy.actor.",
        "policy.normaliser.",
        "critic.",
        "target_critic.",
        "optimiser.actor.",
        "optimiser.hyper_critic.",
        "optimiser.critic.",
        "generator",
    ):
        assert any(name.startswith(part) for name in names), part


def test_9_every_critic_speaks_in_hyper_q_and_in_the_advantage(
    timed_out: Transitions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the trap critics beyond the first enter the target only. Theirs: 1 and 4; minimum 1, mean 2.5."""
    learner = in_second_stage(timed_out, replace(TINY, num_critics=2, critic_learning_rate=1e-9))
    for member, value in zip(learner.critic.members, (4.0, 1.0), strict=True):
        set_output(member, [value])
    learner.target_critic.load_state_dict(learner.critic.state_dict())
    targets, hyper = calls_of(monkeypatch, "sarsa_target"), calls_of(monkeypatch, "hyper_critic_loss")
    step(learner)
    assert targets[0][2].amin(dim=0).numpy() == pytest.approx(1.0, abs=1e-5)
    assert hyper[0][1].numpy() == pytest.approx(2.5, abs=1e-5)


def test_10_sampling_a_mode_builds_no_graph(timed_out: Transitions, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = in_second_stage(timed_out)
    recorded = [calls_of(monkeypatch, name) for name in ("hyper_critic_loss", "weighted_imitation_loss")]
    step(learner)
    (_, values), (actions, imitated, weights) = recorded[0][0], recorded[1][0]
    assert not any(tensor.requires_grad for tensor in (values, imitated, weights))
    assert actions.requires_grad


def test_11_the_mixture_loss_is_logsumexp_over_components(timed_out: Transitions) -> None:
    """In the trap every component is fitted to all of the data: the loss is the mean over components of
    -log N_k - log α_k. By hand: two components on +-0.5, an action on one of them."""
    learner = in_second_stage(timed_out, replace(TINY, num_components=2))
    set_mixture(learner, [0.5, 0.5], [-0.5, 0.5], 0.0)
    std = learner.policy.mixture(torch.zeros(1, 2)).log_stds[0, 0, 0].exp().item()
    near = 0.5 / (std * np.sqrt(2 * np.pi))
    far = near * np.exp(-0.5 * (1.0 / std) ** 2)
    loss = learner.policy.mixture.negative_log_likelihood(torch.zeros(1, 2), torch.tensor([[0.5]]))
    assert loss.item() == pytest.approx(-np.log(near + far), rel=1e-5)


def test_nothing_is_written_or_drawn_outside_the_learner(timed_out: Transitions, tmp_path: Path) -> None:
    """numpy's global generator decides nothing and is left alone."""
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    learner = in_second_stage(timed_out)
    step(learner, 5)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index] # noqa: NPY002
