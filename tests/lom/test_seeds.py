"""Several seeds that train as one are the runs that they are alone."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lom.config import PRESETS, TrainConfig
from lom.dataset import Transitions
from lom.learner import Learner, LearningDivergedError
from tests.bench.training import random_transitions

TINY = replace(
    PRESETS["small"], mixture_steps=6, steps=6, hidden=(16, 16), mixture_hidden=(16, 16), mixture_batch=32, batch=16
)
SEEDS = (3, 0, 11)
LOW, HIGH = -torch.ones(2), torch.ones(2)


@pytest.fixture(scope="module")
def whole() -> Transitions:
    """Every seventh row has no next action, so that not every row has a target."""
    data = random_transitions(rows=1500, observation_dim=3, action_dim=2)
    return replace(data, has_next_action=np.arange(1500) % 7 != 0)


def parts_of(whole: Transitions) -> list[Transitions]:
    """What every seed trains on: data of its own, of its own length."""
    return [whole.hold_out(0.1 * run, seed)[0] for run, seed in enumerate(SEEDS)]


def together(whole: Transitions, config: TrainConfig) -> Learner:
    return Learner(parts_of(whole), config, LOW, HIGH, SEEDS)


def alone(whole: Transitions, config: TrainConfig) -> list[Learner]:
    return [
        Learner(part, replace(config, seed=seed), LOW, HIGH) for part, seed in zip(parts_of(whole), SEEDS, strict=True)
    ]


def advance(learner: Learner, steps: int = TINY.mixture_steps + TINY.steps) -> None:
    remaining = learner.remaining()
    for _ in range(steps):
        next(remaining)


def assert_close(got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert np.asarray(got[name]) == pytest.approx(np.asarray(value), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hyper_head": "one_hot", "num_critics": 2, "averaging_steps": 3, "mixture_cache_bytes": 0},
        {"advantage_baseline": "hyper", "imitation_samples": 3, "imitation_noise_std": 0.1},
        {"imitated_actions": "data", "normalise_advantages": True, "initial_means": "network"},
    ],
)
def test_a_seed_among_others_is_the_seed_alone(whole: Transitions, changes: dict[str, Any]) -> None:
    """Weights, moments, random state, metrics and signs, with data of different lengths."""
    config = replace(TINY, **changes)
    assert len({len(part) for part in parts_of(whole)}) > 1
    learner = together(whole, config)
    advance(learner)
    states, metrics, signs = learner.states(), learner.metrics_of_runs(), learner.signs_of_runs()
    for run, single in enumerate(alone(whole, config)):
        advance(single)
        assert_close(states[run], single.state())
        assert_close(metrics[run], single.metrics())
        assert signs[run] == pytest.approx(single.signs(), abs=2e-2)  # shares of rows: one may lie on a limit


def test_policies_learn_with_the_stack_and_stay_apart(whole: Transitions) -> None:
    learner = together(whole, TINY)
    before = [next(policy.actor.parameters()).clone() for policy in learner.policies]
    advance(learner)
    after = [next(policy.actor.parameters()) for policy in learner.policies]
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert not torch.equal(after[0], after[1])
    with pytest.raises(ValueError, match="too many values"):
        _ = learner.policy


def test_a_seed_goes_on_alone_from_where_it_was_among_others(whole: Transitions) -> None:
    learner, (single, *_) = together(whole, TINY), alone(whole, TINY)
    advance(learner, 8)
    single.restore(learner.states()[0])
    advance(single, 4)
    advance(learner, 4)
    assert_close(learner.states()[0], single.state())


def test_stopped_seeds_resume_to_the_same_result(whole: Transitions) -> None:
    uninterrupted, stopped, resumed = (together(whole, TINY) for _ in range(3))
    advance(uninterrupted)
    advance(stopped, 9)
    resumed.restore(*stopped.states())
    advance(resumed, 3)
    for got, expected in zip(resumed.states(), uninterrupted.states(), strict=True):
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor), name


def test_seeds_that_are_not_equally_far_are_refused(whole: Transitions) -> None:
    learner, other = together(whole, TINY), together(whole, TINY)
    advance(other, 2)
    with pytest.raises(ValueError, match="expected the same of all seeds"):
        learner.restore(learner.states()[0], *other.states()[1:])


def test_a_seed_that_diverges_is_named(whole: Transitions) -> None:
    parts = parts_of(whole)
    parts[1] = replace(parts[1], rewards=parts[1].rewards * np.float32(1e30))
    learner = Learner(parts, TINY, LOW, HIGH, SEEDS)
    advance(learner)
    with pytest.raises(LearningDivergedError, match="seed 0: critic/loss: expected a finite value"):
        learner.metrics_of_runs()


def test_there_is_data_for_every_seed(whole: Transitions) -> None:
    with pytest.raises(ValueError, match="zip"):
        Learner(parts_of(whole)[:2], TINY, LOW, HIGH, SEEDS)
