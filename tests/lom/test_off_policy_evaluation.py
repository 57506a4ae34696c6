"""Values from data alone against closed forms, hand-worked numbers and roll-outs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lom import off_policy_evaluation, train
from lom.config import PRESETS
from lom.dataset import Transitions, load_transitions
from lom.envs.fork import fork_demonstrations
from lom.evaluation import evaluate
from lom.off_policy_evaluation import FittedQConfig, OffPolicyEvaluation, evaluate_off_policy
from lom.study.linear_quadratic import Controller, LinearQuadraticProblem

Array = NDArray[np.float32]


def recorded(tmp_path: Path, **arrays: object) -> Transitions:
    """Transitions with one observation and one action dimension, or those of the arrays; actions in [-1, 1]."""
    columns = {key: np.asarray(value, np.float32) for key, value in arrays.items()}
    for key, column in columns.items():
        if key.endswith(("observations", "actions")) and column.ndim == 1:
            columns[key] = column[:, None]
    np.savez(tmp_path / "data.npz", **columns)  # type: ignore[arg-type]
    return load_transitions([tmp_path / "data.npz"])


def always(action: float) -> Callable[[Array], Array]:
    return lambda observations: np.full((len(observations), 1), action, np.float32)


def test_two_steps_are_worth_what_they_are_by_hand(tmp_path: Path) -> None:
    """First step: reward 1 for +1, else 0. Second and last: twice the action. With γ = 0.5, up is worth 1 + 0.5·2."""
    rng = np.random.default_rng(0)
    first, second = rng.choice([-1.0, 1.0], (2, 200))
    zeros, ones = np.zeros(200), np.ones(200)

    def rows(a: object, b: object) -> Array:
        return np.stack([np.asarray(a), np.asarray(b)], axis=1).ravel().astype(np.float32)

    data = recorded(
        tmp_path,
        observations=rows(zeros, ones),
        next_observations=rows(ones, ones),
        actions=rows(first, second),
        rewards=rows(first > 0, 2 * second),
        terminals=rows(zeros, ones),
        timeouts=rows(zeros, zeros),
    )
    config = FittedQConfig(discount=0.5, steps=800, batch=64, hidden=(32, 32))
    found = evaluate_off_policy({"up": always(1.0), "down": always(-1.0)}, data, config)
    assert found.values["up"].mean() == pytest.approx(2.0, abs=0.05)
    assert found.values["down"].mean() == pytest.approx(-1.0, abs=0.05)
    # The behaviour goes on by chance: its first action is worth its own reward, and 0 on average from there.
    observed = (first > 0) + 0.5 * 2 * second
    np.testing.assert_allclose(found.observed_returns, observed, rtol=1e-6)
    by_first_action = [found.behaviour_values[:, first == sign].mean() for sign in (1, -1)]
    expected = [1.0 + second[first > 0].mean(), second[first < 0].mean()]
    assert by_first_action == pytest.approx(expected, abs=0.08)
    assert found.doubts() == {}


def cut_off_walks(tmp_path: Path) -> Transitions:
    """One state. +1 is worth 1 and goes on, recorded for three steps and cut off; 0 costs 10 and ends."""
    stays, ends = 90, 30
    return recorded(
        tmp_path,
        observations=np.zeros(stays + ends),
        next_observations=np.zeros(stays + ends),
        actions=np.r_[np.ones(stays), np.zeros(ends)],
        rewards=np.r_[np.ones(stays), np.full(ends, -10.0)],
        terminals=np.r_[np.zeros(stays), np.ones(ends)],
        timeouts=np.r_[np.tile([0, 0, 1], stays // 3), np.zeros(ends)],
    )


def test_an_episode_that_was_cut_off_goes_on_and_its_last_row_teaches_the_behaviour_nothing(tmp_path: Path) -> None:
    """1 / (1 - 0.8) = 5 for ever +1. Taken for an end, the last rows would leave 2.1; taken for a' = 0, -3.6."""
    data = cut_off_walks(tmp_path)
    assert not data.has_next_action[2]
    config = FittedQConfig(discount=0.8, steps=1000, batch=64, hidden=(32, 32))
    found = evaluate_off_policy({"stay": always(1.0), "quit": always(0.0)}, data, config)
    assert found.values["stay"].mean() == pytest.approx(5.0, abs=0.2)
    assert found.values["quit"].mean() == pytest.approx(-10.0, abs=0.2)
    assert found.behaviour_values[:, :30].mean() == pytest.approx(5.0, abs=0.2)
    # 1 + 0.8 + 0.64·5: what was not recorded enters by its fitted value.
    assert found.observed_returns[:30].mean() == pytest.approx(5.0, abs=0.15)
    np.testing.assert_allclose(found.observed_returns[30:], -10.0)


def test_controllers_of_a_linear_quadratic_problem_have_their_exact_values(tmp_path: Path) -> None:
    def problem(*controllers: Controller) -> LinearQuadraticProblem:
        one = np.ones((1, 1))
        return LinearQuadraticProblem(
            dynamics=0.9 * one,
            control=0.5 * one,
            noise_covariance=0.01 * one,
            state_cost=one,
            action_cost=0.1 * one,
            discount=0.9,
            controllers=controllers,
        )

    def controller(gain: float, offset: float, weight: float = 1.0, variance: float = 0.0) -> Controller:
        matrix = np.ones((1, 1))
        return Controller(weight=weight, gain=gain * matrix, offset=np.array([offset]), covariance=variance * matrix)

    behaviour = problem(controller(-0.5, 0.1, 0.5, 0.02), controller(-0.2, -0.1, 0.5, 0.02))
    rng = np.random.default_rng(0)
    states: NDArray[Any] = rng.uniform(-1, 1, (300, 1))
    rows = []
    for _ in range(10):
        actions = behaviour.behave(states, rng).clip(-1, 1)
        rewards, following = behaviour.step(states, actions, rng)
        rows.append((states, actions, rewards[:, None], following))
        states = following
    observations, actions, rewards, following = np.stack([np.concatenate(row, 1) for row in rows], 1).reshape(-1, 4).T
    data = recorded(
        tmp_path,
        observations=observations,
        actions=actions,
        rewards=rewards,
        next_observations=following,
        terminals=np.zeros(len(rewards)),
        timeouts=np.arange(len(rewards)) % 10 == 9,
    )
    gains = {"steady": (-0.5, 0.1), "slow": (-0.2, -0.1)}
    policies = {
        name: (lambda o, gain=gain, offset=offset: (gain * o + offset).clip(-1, 1).astype(np.float32))
        for name, (gain, offset) in gains.items()
    }
    found = evaluate_off_policy(policies, data, FittedQConfig(discount=0.9, steps=1500, members=2))
    starts = data.observations[::10].astype(np.float64)
    for name, values in found.values.items():
        exact = np.mean([problem(controller(*gains[name])).value(start) for start in starts])
        assert values.mean() == pytest.approx(exact, abs=0.1), name
    exact = np.mean([behaviour.value(start) for start in starts])
    assert found.behaviour_values.mean() == pytest.approx(exact, abs=0.15)
    assert found.doubts() == {}


def around_the_obstacle(side: float) -> Callable[[Array], Array]:
    """The demonstrators of the fork without their noise: above 1, below -1; 0 runs into the obstacle."""

    def act(observations: Array) -> Array:
        x = observations[:, 0]
        aside = np.stack([np.zeros_like(x), np.full_like(x, 0.7 * side)], axis=1)
        straight = np.stack([x + 1.0, np.zeros_like(x)], axis=1)
        target = np.where((x < -0.6)[:, None], straight, np.where((x < -0.1)[:, None], aside, [1.0, 0.0]))
        way = target - observations
        actions: Array = np.clip(way / np.linalg.norm(way, axis=1, keepdims=True).clip(min=0.15), -1, 1)
        return actions.astype(np.float32)

    return act


@pytest.fixture(scope="module")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "fork.npz"
    np.savez(path, **fork_demonstrations(episodes=200, seed=0))  # type: ignore[arg-type]
    return path


def test_routes_of_the_fork_are_ranked_as_their_roll_outs(fork: Path) -> None:
    policies = {"below": around_the_obstacle(-1), "above": around_the_obstacle(1), "into": around_the_obstacle(0)}
    truth = {
        name: evaluate(act, "lom/Fork-v0", episodes=20, seed=0, discount=0.99).returns.mean()
        for name, act in policies.items()
    }
    assert truth["below"] > truth["above"] + 0.5 > truth["into"] + 4.5  # the toll, and the obstacle
    found = evaluate_off_policy(policies, load_transitions([fork]), FittedQConfig(discount=0.99, members=2))
    values = {name: fitted.mean() for name, fitted in found.values.items()}
    assert values["below"] > values["above"] > values["into"] + 2
    for name in ("below", "above"):
        assert values[name] == pytest.approx(truth[name], abs=0.6)


def test_a_seed_decides_everything(fork: Path) -> None:
    data, policies = load_transitions([fork]), {"into": around_the_obstacle(0)}

    def fitted(seed: int) -> NDArray[np.float64]:
        return evaluate_off_policy(policies, data, FittedQConfig(discount=0.99, steps=5, seed=seed)).values["into"]

    np.testing.assert_array_equal(fitted(0), fitted(0))
    assert np.abs(fitted(0) - fitted(1)).max() > 1e-3


def values_of(mean: float, spread: float = 0.0) -> NDArray[np.float64]:
    return mean + np.array([[-spread], [spread]]) + np.zeros((2, 50))


def test_values_that_miss_the_behaviours_returns_recommend_nothing_but_the_data() -> None:
    values = {"greedy_mode": values_of(1.0), "actor": values_of(2.0), "bc": values_of(0.0)}
    returns = np.full(50, 1.0)
    sound = OffPolicyEvaluation(values=values, behaviour_values=values_of(1.01), observed_returns=returns, scale=1.0)
    assert sound.doubts() == {}
    assert sound.recommendation().variant == "actor"
    unsound = OffPolicyEvaluation(values=values, behaviour_values=values_of(1.2), observed_returns=returns, scale=1.0)
    assert "fitted +0.2 away" in unsound.doubts()["behaviour"]
    assert unsound.recommendation().variant == "greedy_mode"


def test_fits_that_disagree_are_doubted() -> None:
    values = {"greedy_mode": values_of(1.0), "actor": values_of(2.0, spread=0.3), "bc": values_of(0.0)}
    found = OffPolicyEvaluation(
        values=values, behaviour_values=values_of(1.0), observed_returns=np.full(50, 1.0), scale=1.0
    )
    assert found.doubts().keys() == {"actor"}
    assert found.recommendation().variant == "greedy_mode"
    assert "actor" in found.recommendation().reason


def test_an_eighth_of_the_steps_and_3000_where_there_are_as_many() -> None:
    assert [FittedQConfig.after(PRESETS[name]).steps for name in ("standard", "small")] == [25_000, 3_000]


QUICK = ["--preset", "small", "--mixture-steps", "20", "--steps", "20"]


def test_a_run_without_an_environment_is_valued_and_can_be_valued_again(
    fork: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train.main([str(fork), "--out", str(out), *QUICK])
    summary = json.loads((out / "summary.json").read_text())
    valued = summary["off_policy_evaluation"]
    assert valued["variants"].keys() == {"greedy_mode", "actor", "bc"}
    low, high = valued["variants"]["actor"]["value_interval"]
    assert low <= valued["variants"]["actor"]["value_mean"] <= high
    assert valued["recommended"]["variant"] == "greedy_mode"  # twenty steps miss the behaviour's returns
    assert valued["steps"] == 20
    assert summary["evaluation"] == {}
    capsys.readouterr()
    off_policy_evaluation.main([str(out), str(fork), "--steps", "3"])
    assert "returns in the data" in capsys.readouterr().err


def test_values_that_were_cut_short_are_computed_again_to_the_same_result(fork: Path, tmp_path: Path) -> None:
    command, summary = [str(fork), "--out", str(tmp_path / "run"), *QUICK], tmp_path / "run" / "summary.json"
    train.main(command)
    before = json.loads(summary.read_text())["off_policy_evaluation"]
    summary.unlink()  # what a kill after the last training step leaves
    train.main([*command, "--resume"])
    assert json.loads(summary.read_text())["off_policy_evaluation"] == before


def test_it_can_be_left_out(fork: Path, tmp_path: Path) -> None:
    train.main([str(fork), "--out", str(tmp_path / "run"), *QUICK, "--no-off-policy-evaluation"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["off_policy_evaluation"] == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone", "DATA"], "expected a training run"),
        (["RUN", "gone.npz"], "gone.npz: expected a file, found none"),
        (["RUN", "DATA", "--steps", "0"], "steps: expected 1 or more, got 0"),
    ],
)
def test_a_mistake_is_one_line(
    fork: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    train.main([str(fork), "--out", str(tmp_path / "run"), *QUICK, "--no-off-policy-evaluation"])
    capsys.readouterr()
    places = {"RUN": str(tmp_path / "run"), "DATA": str(fork)}
    with pytest.raises(SystemExit) as caught:
        off_policy_evaluation.main([places.get(word, word) for word in words])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
