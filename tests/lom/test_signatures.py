"""Every failure is produced on purpose and found; what is healthy is not."""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lom import signatures, train
from lom.config import PRESETS
from lom.envs.bandit import bandit_demonstrations
from lom.envs.fork import fork_demonstrations
from lom.learner import Learner
from lom.networks import Mixture
from lom.study.experiments import trained, transitions_of

QUICK = replace(PRESETS["small"], mixture_steps=500, steps=300)


def found(learner: Learner) -> set[str]:
    return {each.name for each in signatures.found(learner.signs())}


def bandit(**changes: Any) -> Learner:
    arrays = bandit_demonstrations(rows=4000)
    data = transitions_of(arrays["observations"], arrays["actions"], arrays["rewards"])
    return trained(data, replace(QUICK, **changes))


@pytest.fixture(scope="module")
def fork() -> Mapping[str, np.ndarray[Any, Any]]:
    return fork_demonstrations()


def learn_fork(arrays: Mapping[str, np.ndarray[Any, Any]], **changes: Any) -> Learner:
    names = ("observations", "actions", "rewards", "next_observations", "next_actions")
    data = transitions_of(*(arrays[name] for name in names))
    return trained(replace(data, terminals=arrays["terminals"]), replace(QUICK, **changes))


@pytest.fixture(scope="module")
def healthy() -> Learner:
    return bandit()


def test_a_healthy_training_shows_none_of_them(healthy: Learner) -> None:
    assert found(healthy) == set()


def test_too_few_components_miss_modes() -> None:
    """Four corners, two components: each spans two."""
    assert "missed modes" in found(bandit(num_components=2))


def test_modes_missed_in_a_few_states_only_are_found_too(fork: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """On the fork two routes part in front of the obstacle, everywhere else one Gaussian is enough."""
    assert "missed modes" in found(learn_fork(fork, num_components=1, mixture_steps=1500, steps=1))


def test_data_without_spread_collapses_the_modes() -> None:
    rows = 2000
    side = np.where(np.random.default_rng(0).random((rows, 1)) < 0.5, -0.5, 0.5)
    learner = trained(transitions_of(np.zeros((rows, 1)), side, side[:, 0]), QUICK)
    assert "variance collapse" in found(learner)
    assert "missed modes" not in found(learner)


def test_without_the_mask_modes_act_that_no_data_supports(healthy: Learner) -> None:
    """Hyper-Q is told to prefer the lightest component."""
    learner = copy.deepcopy(healthy)
    learner.policy.min_mixing_weight = 0.0
    with torch.no_grad():
        learner.policy.mixture.mixing_logits.bias[3] = -20.0
        list(learner.policy.hyper_critic.parameters())[-1][3] = 1e6
    assert learner.signs()["signs/unsupported_modes"] == 1.0
    assert "out-of-distribution modes" in found(learner)


def test_large_values_saturate_the_weights(healthy: Learner) -> None:
    """As if the rewards had been a thousand times larger."""
    learner = copy.deepcopy(healthy)
    with torch.no_grad():
        for parameter in list(learner.critic.parameters())[-2:]:
            parameter.mul_(1000.0)
    assert found(learner) == {"saturated weights"}


def test_an_actor_that_does_not_learn_disagrees_with_the_greedy_mode() -> None:
    assert "actor and greedy mode disagree" in found(bandit(actor_learning_rate=1e-9, actor_form="direct"))


# ---------------------------------------------------------------- the numbers, by hand


def standard_mixture(rows: int, means: list[float], std: float) -> Mixture:
    components = len(means)
    return Mixture(
        log_weights=torch.full((rows, components), -math.log(components)),
        means=torch.tensor(means).view(1, -1, 1).expand(rows, -1, 1),
        log_stds=torch.full((rows, components, 1), math.log(std)),
    )


def test_the_misfit_of_the_truth_is_chance_and_of_one_gaussian_over_two_clusters_a_third() -> None:
    """Clusters at ±0.5 under N(0, 0.5²): quantiles Φ(±1) = 0.16 and 0.84, so the distance is 0.34."""
    generator = torch.Generator().manual_seed(0)
    side = torch.where(torch.rand(2048, 1, generator=generator) < 0.5, -0.5, 0.5)
    actions = side + 0.02 * torch.randn(2048, 1, generator=generator)
    truth = signatures.mixture_misfit(standard_mixture(2048, [-0.5, 0.5], 0.02), actions, generator)
    one = signatures.mixture_misfit(standard_mixture(2048, [0.0], 0.5), actions, generator)
    assert truth < 0.12
    # Conditioned on |a| < 0.98, which keeps 95 %: (Φ(-1) - Φ(-1.96)) / 0.95 = 0.141, a little more by the noise of
    # sampling in groups of 512.
    assert one == pytest.approx(0.5 - 0.141, abs=0.08)


def test_a_constant_dimension_on_the_floor_of_the_spread_is_no_misfit() -> None:
    misfit = signatures.mixture_misfit(
        standard_mixture(2048, [0.3], math.exp(-5)), torch.full((2048, 1), 0.3), torch.Generator().manual_seed(0)
    )
    assert misfit < 0.15


def test_clipped_and_repeated_actions_are_no_misfit() -> None:
    """A third of the actions on the bound, a third exactly 0.25, one component on each."""
    actions = torch.tensor([1.0, 0.25, -0.6]).repeat(700).unsqueeze(1)
    generator = torch.Generator().manual_seed(0)
    actions[2::3] += 0.05 * torch.randn(700, 1, generator=generator)
    mixture = Mixture(
        log_weights=torch.full((2100, 3), -math.log(3)),
        means=torch.tensor([0.999, 0.25, -0.6]).view(1, 3, 1).expand(2100, 3, 1),
        log_stds=torch.tensor([0.0067, 0.0067, 0.05]).log().view(1, 3, 1).expand(2100, 3, 1),
    )
    assert signatures.mixture_misfit(mixture, actions, generator) < 0.15


def test_too_few_rows_say_nothing() -> None:
    actions = torch.zeros(100, 1)
    assert signatures.mixture_misfit(standard_mixture(100, [0.9], 0.01), actions, torch.Generator()) == 0.0


def test_shares_by_hand() -> None:
    assert signatures.narrow_modes(torch.log(torch.tensor([[0.01, 0.02], [0.01, 0.05]]))) == 0.5
    weights = torch.tensor([[0.96, 0.04], [0.94, 0.06]])
    assert signatures.unsupported_modes(weights, torch.tensor([1, 1])) == 0.5
    assert signatures.unsupported_modes(torch.full((1, 20), 0.05), torch.tensor([7])) == 0.0  # 0.5/M is 0.025
    assert signatures.saturated_weights(torch.tensor([50.0, 0.01, 1.0, 3.0]), 50.0) == 0.5
    assert signatures.actor_disagreement(torch.zeros(2, 2), torch.tensor([[0.2, 0.2], [0.3, 0.1]])) == 0.5


def test_a_metric_on_its_limit_or_not_measured_is_no_failure() -> None:
    assert signatures.found({"signs/narrow_modes": 0.5}) == ()
    (failure,) = signatures.report({"signs/narrow_modes": 0.51})
    assert failure["name"] == "variance collapse"
    assert failure["limit"] == 0.5
    assert "num_components" in failure["advice"]


def test_asking_for_signs_does_not_change_training(fork: Mapping[str, np.ndarray[Any, Any]]) -> None:
    tiny = {"mixture_steps": 20, "steps": 20}
    asked, not_asked = (learn_fork(fork, **tiny) for _ in range(2))
    before = asked.state()
    assert asked.signs() == asked.signs()
    for name, tensor in asked.state().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(tensor, not_asked.state()[name])


def test_failures_reach_progress_curves_and_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = bandit_demonstrations(rows=2000)
    np.savez(tmp_path / "bandit.npz", **arrays)  # type: ignore[arg-type]
    out = tmp_path / "run"
    flags = ["--preset", "small", "--mixture-steps", "200", "--steps", "40", "--num-components", "1"]
    train.main([str(tmp_path / "bandit.npz"), "--out", str(out), *flags])
    summary = json.loads((out / "summary.json").read_text())
    failures = {failure["name"]: failure for failure in summary["failures"]}
    assert "missed modes" in failures
    assert failures["missed modes"]["measured"] > failures["missed modes"]["limit"] == 0.15
    assert "raise num_components" in failures["missed modes"]["advice"]
    printed = " ".join(capsys.readouterr().err.split())
    assert "warning: missed modes" in printed
    assert printed.count("missed modes") >= 2  # in the progress too
    curves = EventAccumulator(str(out / "tensorboard"))
    curves.Reload()
    assert {each.metric for each in signatures.SIGNATURES} <= set(curves.Tags()["scalars"])
