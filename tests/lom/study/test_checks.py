"""The three further checks: trained policies against exact answers."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from lom.envs.bandit import CORNER_REWARDS, CORNERS
from lom.evaluation import EVALUATION_SEED, evaluate, policy_act
from lom.study.checks import (
    TASKS,
    measure_choices,
    measure_error_bound,
    measure_forced_modes,
    measure_sensitivity,
    played_value,
)
from lom.study.experiments import continued, trained, untrained
from lom.study.hyper_policies import rules, value_of_noisy_choice, value_of_random_share


def test_a_trained_bandit_earns_what_every_rule_is_worth() -> None:
    """As many components as modes: then the exact figures of four modes hold for the trained policy, too."""
    found = measure_choices(task="bandit4", num_components=4, seed=0)
    exact = {"random_uniform": 2.375, "random_alpha": 2.375, "hyper_q": 5.0, "oracle": 5.0, "worst": 0.0}
    earned = {rule: found["rules"][rule] for rule in exact}
    assert earned == pytest.approx(exact, abs=0.06)
    assert min(abs(found["rules"]["max_alpha"] - CORNER_REWARDS)) < 0.05  # all weigh the same: any corner may win
    values = CORNER_REWARDS.astype(np.float64)
    for share, value in found["random_share"].items():
        assert value == pytest.approx(value_of_random_share(values, float(share)), abs=0.06)
    for noise_std, value in found["noise"].items():
        assert value == pytest.approx(value_of_noisy_choice(values, float(noise_std)), abs=0.15)


def test_on_the_fork_modes_are_drawn_at_every_step_and_act_by_their_means() -> None:
    """An untrained policy will do: one-hot hyper-policies give what `greedy_mode` returns, random ones draw."""
    task = replace(TASKS["fork"], episodes=5)
    policy = untrained(task.transitions(0), task.config(seed=0)).policy
    chosen = evaluate(policy_act(policy, "greedy_mode"), task.env_id, episodes=5, seed=EVALUATION_SEED).returns.mean()

    def value(rule: str, seed: int) -> float:
        return played_value(policy, lambda seen, answer: rules(answer, task.best_actions(seen), 0.05)[rule], task, seed)

    assert value("hyper_q", 0) == chosen == value("hyper_q", 1)
    assert value("random_uniform", 0) == value("random_uniform", 0) != value("random_uniform", 1)


def test_the_forks_oracle_goes_below_the_obstacle() -> None:
    """From (-0.3, 0) to (0, -0.7): (0.3, -0.7) / √0.58."""
    (action,) = TASKS["fork"].best_actions(torch.tensor([[-0.3, 0.0]]))
    assert action.tolist() == pytest.approx([0.3 / 0.58**0.5, -0.7 / 0.58**0.5], abs=1e-6)


def test_fetchs_oracle_goes_to_the_best_target() -> None:
    """From a start at (1, 0.5, 0.4), 0.02 m short of the target in x and 0.3 m above it: 10 · 0.02, 0, at most -1."""
    gripper, start = [1.08, 0.4, 0.7], [1.0, 0.5, 0.4]
    (action,) = TASKS["fetch4_reach"].best_actions(torch.tensor([[*gripper, *[0.0] * 7, *start]]))
    assert action.tolist() == pytest.approx([0.2, 0.0, -1.0, 0.0], abs=1e-5)


def test_actors_on_top_of_one_mixture_are_those_that_are_trained_alone() -> None:
    task, seeds = TASKS["bandit4"], (0, 1)
    data = [task.transitions(seed) for seed in seeds]
    config = replace(task.config(seed=0), mixture_steps=20, steps=15)
    sharper = replace(config, inverse_temperature=50.0)
    actions = []
    for learner, own in zip(
        continued(trained(data, config, seeds, mixture_only=True), data, [config, sharper]),
        (config, sharper),
        strict=True,
    ):
        for _ in learner.remaining():
            pass
        alone = trained(data, own, seeds)
        for found, expected in zip(learner.policies, alone.policies, strict=True):
            tensors = expected.state_dict()
            for name, tensor in found.state_dict().items():
                assert torch.equal(tensor, tensors[name]), name
            actions.append(found(torch.zeros(1, 1), "actor")["action"])
    assert not any(torch.equal(one, other) for one, other in combinations(actions, 2))


def test_one_component_covers_all_four_modes_and_acts_in_their_middle() -> None:
    (found,) = measure_sensitivity(task="bandit4", num_components=1, seeds=[0, 1], settings=[(0.1, 50.0)])
    assert found["greedy_mode"] == pytest.approx([0.0, 0.0], abs=0.01)
    assert max(found["actor"]) < 0.2
    # sd of the corners ±0.8 with 0.05 around them
    assert found["mode_std"] == pytest.approx([(0.8**2 + 0.05**2) ** 0.5] * 2, abs=0.05)
    assert found["active_components"] == [1.0, 1.0]
    assert list(found["clipped_weights"]) == [0.0, 0.0]


def test_losses_by_errors_of_hyper_q_grow_with_the_error_and_stay_within_the_bound() -> None:
    errors = (0.0, 0.1, 1.0)
    found = measure_error_bound(errors=errors, problems=20, seed=0)
    assert found["discount"] == 0.95
    bound = 2 * np.array(errors)[:, None] / 0.05
    assert (found["worst"] <= bound + 1e-8).all()
    assert (found["uniform"] <= found["worst"] + 1e-8).all()
    assert found["worst"][0].max() < 1e-8  # Theorem 1
    assert (np.diff(found["worst"], axis=0) >= -1e-8).all()
    assert found["worst"][2].max() > 1.0  # the bound is not met by doing nothing


def test_weighted_imitation_stays_in_the_mode_that_was_forced_on_it() -> None:
    """The value rises all the way to the best corner, and still the actor goes no farther than the closed form: a
    fortieth of the way, with σ 0.05, β 5 and the value's curvature of 1.95."""
    rows = measure_forced_modes(seed=0, steps=500)
    best = CORNERS[3]
    seen = set()
    for row in rows:
        corner = int(np.abs(CORNERS - row["mode_mean"]).sum(axis=1).argmin())
        seen.add(corner)
        assert row["action"] == pytest.approx(row["tilted_mean"], abs=0.02)
        assert row["reward"] == pytest.approx(CORNER_REWARDS[corner], abs=0.2)
        moved = np.linalg.norm(row["tilted_mean"] - row["mode_mean"])
        assert moved == pytest.approx(np.linalg.norm(best - row["mode_mean"]) / 40, rel=0.3, abs=0.01)
    assert seen == {0, 1, 2, 3}
