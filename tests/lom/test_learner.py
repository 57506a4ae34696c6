from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lom.config import PRESETS, TrainConfig
from lom.dataset import DatasetError, Transitions, load_transitions
from lom.envs.bandit import bandit_demonstrations
from lom.envs.fork import fork_demonstrations
from lom.learner import Learner, LearningDivergedError

TINY = replace(
    PRESETS["small"], mixture_steps=20, steps=20, hidden=(16, 16), mixture_hidden=(16, 16), mixture_batch=32, batch=16
)
LOW, HIGH = -torch.ones(2), torch.ones(2)


@pytest.fixture(scope="module")
def transitions(tmp_path_factory: pytest.TempPathFactory) -> Transitions:
    path = tmp_path_factory.mktemp("data") / "fork.npz"
    np.savez(path, **fork_demonstrations(episodes=30, seed=3))  # type: ignore[arg-type]
    return load_transitions([path])


def weights_after(learner: Learner, steps: int | None = None) -> dict[str, torch.Tensor]:
    for done, _ in enumerate(learner.remaining(), start=1):
        if done == steps:
            break
    return learner.state()


@pytest.mark.parametrize("stopped_after", [7, 20, 33])
def test_a_resumed_run_ends_exactly_where_an_uninterrupted_one_does(
    transitions: Transitions, stopped_after: int
) -> None:
    uninterrupted = weights_after(Learner(transitions, TINY, LOW, HIGH))
    saved = weights_after(Learner(transitions, TINY, LOW, HIGH), stopped_after)
    resumed = Learner(transitions, TINY, LOW, HIGH)
    resumed.restore(saved)
    again = weights_after(resumed)
    assert again.keys() == uninterrupted.keys()
    for name, tensor in uninterrupted.items():
        assert torch.equal(tensor, again[name]), name


def test_the_seed_decides_the_result(transitions: Transitions) -> None:
    first, same = (weights_after(Learner(transitions, TINY, LOW, HIGH)) for _ in range(2))
    other = weights_after(Learner(transitions, replace(TINY, seed=1), LOW, HIGH))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["policy.actor.body.0.weight"], other["policy.actor.body.0.weight"])


def test_training_leaves_torchs_global_generator_alone(transitions: Transitions) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    weights_after(Learner(transitions, TINY, LOW, HIGH), 3)
    assert torch.equal(before, torch.get_rng_state())


def test_cached_and_recomputed_mixtures_give_the_same_training(transitions: Transitions) -> None:
    cached = weights_after(Learner(transitions, TINY, LOW, HIGH))
    recomputed = weights_after(Learner(transitions, replace(TINY, mixture_cache_bytes=0), LOW, HIGH))
    for name, tensor in cached.items():
        torch.testing.assert_close(recomputed[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_mixture_is_frozen_in_the_second_stage_and_only_there(transitions: Transitions) -> None:
    learner = Learner(transitions, TINY, LOW, HIGH)
    start = learner.state()
    after_mixture = weights_after(learner, TINY.mixture_steps)
    end = weights_after(learner)
    name = "policy.mixture.raw_means.weight"
    assert not torch.equal(start[name], after_mixture[name])
    assert torch.equal(after_mixture[name], end[name])
    for name in ("policy.actor.body.0.weight", "policy.hyper_critic.body.0.weight", "critic.members.0.0.weight"):
        assert torch.equal(start[name], after_mixture[name])
        assert not torch.equal(after_mixture[name], end[name])


def test_targets_follow_the_critic_slowly(transitions: Transitions) -> None:
    learner = Learner(transitions, replace(TINY, target_update_rate=0.005), LOW, HIGH)
    start = learner.state()
    end = weights_after(learner)
    name = "members.0.0.weight"
    moved = (end[f"target_critic.{name}"] - start[f"target_critic.{name}"]).norm()
    critic_moved = (end[f"critic.{name}"] - start[f"critic.{name}"]).norm()
    assert 0 < moved < 0.1 * critic_moved


def test_rows_without_a_next_action_stay_out_of_the_critic(transitions: Transitions) -> None:
    """Poisoned rewards on exactly the rows that may not be used must not reach any value."""
    cut = ~transitions.terminals.copy()
    cut[::2] = False
    has_next_action = ~cut
    poisoned = replace(transitions, has_next_action=has_next_action, rewards=np.where(cut, np.nan, transitions.rewards))
    learner = Learner(poisoned, TINY, LOW, HIGH)
    weights_after(learner)
    assert all(np.isfinite(value) for value in learner.metrics().values())


def test_an_action_is_valued_and_imitated_inside_the_bounds(transitions: Transitions) -> None:
    """LOM's fifth trap: hyper-Q valued unclipped samples, the actor imitated clipped ones."""
    learner = Learner(transitions, TINY, LOW, HIGH)
    samples = learner._sample_components(torch.full((500, 2), 0.95), torch.zeros(500, 2))
    assert samples.max() == 1.0
    assert samples.min() == -1.0


def test_only_timeouts_of_one_row_episodes_are_refused(transitions: Transitions) -> None:
    nothing = np.zeros(len(transitions), np.bool_)
    with pytest.raises(DatasetError, match="next action or a terminal"):
        Learner(replace(transitions, terminals=nothing, has_next_action=nothing), TINY, LOW, HIGH)


def test_divergence_is_reported_by_name(transitions: Transitions) -> None:
    learner = Learner(replace(transitions, rewards=transitions.rewards * np.float32(1e30)), TINY, LOW, HIGH)
    weights_after(learner)
    with pytest.raises(LearningDivergedError, match="critic/loss: expected a finite value"):
        learner.metrics()


@pytest.mark.parametrize("head", ["components", "one_hot"])
@pytest.mark.parametrize("components", [1, 3])
def test_every_head_and_a_single_component_train(transitions: Transitions, head: str, components: int) -> None:
    config = replace(TINY, hyper_head=head, num_components=components, num_critics=2)  # type: ignore[arg-type]
    learner = Learner(transitions, config, LOW, HIGH)
    weights_after(learner)
    assert all(np.isfinite(value) for value in learner.metrics().values())


def train_on_bandit(tmp_path: Path, config: TrainConfig) -> Learner:
    path = tmp_path / "bandit.npz"
    np.savez(path, **bandit_demonstrations(rows=4000, seed=0))  # type: ignore[arg-type]
    learner = Learner(load_transitions([path]), config, LOW, HIGH)
    weights_after(learner)
    return learner


def test_lom_chooses_the_best_of_four_actions_where_cloning_averages_them(tmp_path: Path) -> None:
    learner = train_on_bandit(tmp_path, replace(PRESETS["small"], mixture_steps=600, steps=600))
    best = np.array([0.8, -0.8])
    with torch.no_grad():
        actions = {
            name: learner.policy(torch.zeros(1, 1), name)["action"][0].numpy()
            for name in ("greedy_mode", "actor", "bc")
        }
    assert np.linalg.norm(actions["greedy_mode"] - best) < 0.1
    assert np.linalg.norm(actions["actor"] - best) < 0.15
    assert np.linalg.norm(actions["bc"]) < 0.3
