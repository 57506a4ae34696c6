import json
from dataclasses import asdict
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from numpy.typing import NDArray

from lom import train
from lom.envs.bandit import bandit_demonstrations
from lom.evaluation import UnsuitableEnvError, bootstrap_interval, env_spaces, evaluate, make_env, recommend

Array = NDArray[np.float32]


def go_below(observations: Array) -> Array:
    x, y = observations[:, 0], observations[:, 1]
    sideways = np.where(x < 0.0, -0.6 - y, 0.0 - y)
    return np.stack([np.where((x < -0.3) & (y > -0.5), 0.1, 1.0), 3 * sideways], axis=1).clip(-1, 1).astype(np.float32)


def test_the_fork_is_found_by_its_plain_id() -> None:
    assert make_env("lom/Fork-v0").spec is not None


def test_an_episode_does_not_depend_on_what_runs_beside_it() -> None:
    alone = [evaluate(go_below, "lom/Fork-v0", episodes=1, seed=7 + k).returns[0] for k in range(30)]
    together = evaluate(go_below, "lom/Fork-v0", episodes=30, seed=7)
    np.testing.assert_allclose(together.returns, alone)
    assert together.success_rate == 1.0


def test_success_is_none_where_the_environment_never_says() -> None:
    assert (
        evaluate(lambda o: np.zeros((len(o), 2), np.float32), "lom/Bandit4-v0", episodes=3, seed=0).success_rate is None
    )


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("lom/Spoon-v0", "Spoon"),
        ("Nowhere-v0", "Nowhere"),
        ("no.such.module:Thing-v0", "no"),
        ("CartPole-v1", "action space: expected a flat Box"),
        ("Blackjack-v1", "observation space: expected a flat Box"),
    ],
)
def test_an_unsuitable_environment_is_named(env_id: str, message: str) -> None:
    with pytest.raises(UnsuitableEnvError, match=message) as caught:
        env_spaces(env_id)
    assert env_id in str(caught.value)


def test_an_infinite_action_bound_is_refused() -> None:
    class Unbounded(gymnasium.Env[Array, Array]):
        observation_space = gymnasium.spaces.Box(-1, 1, (2,))
        action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))

    gymnasium.register("test/Unbounded-v0", entry_point=Unbounded)  # type: ignore[arg-type]
    with pytest.raises(UnsuitableEnvError, match="expected finite bounds"):
        env_spaces("test/Unbounded-v0")


def test_returns_can_be_discounted() -> None:
    """Into the obstacle: -0.1 a step, and -5 at the last."""
    into = evaluate(go_ahead, "lom/Fork-v0", episodes=1, seed=0).returns[0]
    steps = round((into + 5.0) / -0.1)
    discounted = evaluate(go_ahead, "lom/Fork-v0", episodes=1, seed=0, discount=0.5).returns[0]
    assert discounted == pytest.approx(-0.1 * (1 - 0.5**steps) / 0.5 - 5.0 * 0.5 ** (steps - 1))


def go_ahead(observations: Array) -> Array:
    return np.tile(np.array([1.0, 0.0], np.float32), (len(observations), 1))


def test_the_interval_of_a_mean_is_as_wide_as_its_standard_error_says() -> None:
    sample = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = bootstrap_interval(sample)
    assert low < sample.mean() < high
    assert (high - low) / 2 == pytest.approx(1.96 * sample.std() / 20, rel=0.1)
    assert bootstrap_interval(sample) == (low, high)


def test_estimators_that_disagree_widen_the_interval() -> None:
    assert bootstrap_interval(np.array([[0.0] * 50, [1.0] * 50])) == (0.0, 1.0)
    assert bootstrap_interval(np.array([0.5] * 50)) == (0.5, 0.5)


LUCK = np.random.default_rng(0).normal(0.0, 100.0, 50)
"""How well each episode begins, which every variant shares."""


def returned(mean: float, noise_seed: int) -> NDArray[np.float64]:
    return mean + LUCK + np.random.default_rng(noise_seed).normal(0.0, 1.0, 50)


@pytest.mark.parametrize(
    ("actor", "greedy_mode", "recommended"),
    [(12.0, 10.0, "actor"), (10.05, 10.0, "greedy_mode"), (8.0, 10.0, "greedy_mode")],
)
def test_the_actor_is_recommended_where_it_is_better_beyond_chance(
    actor: float, greedy_mode: float, recommended: str
) -> None:
    """Episode by episode: the luck of the start is fifty times the difference, and is no reason to doubt."""
    recommendation = recommend({"actor": returned(actor, 1), "greedy_mode": returned(greedy_mode, 2), "bc": LUCK})
    assert recommendation.variant == recommended
    assert "actor - greedy_mode: " in recommendation.reason
    assert recommendation.warning is None


@pytest.mark.parametrize(("bc", "warned"), [(15.0, True), (11.0, False), (5.0, False)])
def test_cloning_that_is_better_than_both_is_said(bc: float, warned: bool) -> None:
    results = {"actor": returned(12.0, 1), "greedy_mode": returned(10.0, 2), "bc": returned(bc, 3)}
    assert (recommend(results).warning is not None) == warned


def test_a_run_keeps_every_return_and_says_which_variant_to_act_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "bandit.npz", **bandit_demonstrations(rows=200))  # type: ignore[arg-type]
    steps = ["--preset", "small", "--mixture-steps", "20", "--steps", "20"]
    train.main([str(tmp_path / "bandit.npz"), "--env", "lom/Bandit4-v0", "--out", str(tmp_path / "run"), *steps])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    evaluation = summary["evaluation"]
    assert evaluation["episodes"] == 100
    for result in evaluation["variants"].values():
        assert len(result["returns"]) == 100
        assert result["return_mean"] == pytest.approx(np.mean(result["returns"]))
    returns = {variant: np.array(result["returns"]) for variant, result in evaluation["variants"].items()}
    assert evaluation["recommended"] == asdict(recommend(returns))
    assert f"recommended: {evaluation['recommended']['variant']}" in capsys.readouterr().err
    assert summary["off_policy_evaluation"] == {}
