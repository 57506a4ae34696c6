"""The LQ mixture: exact values against roll-outs."""

import numpy as np
import pytest

from lom.study.linear_quadratic import Controller, LinearQuadraticProblem

PROBLEM = LinearQuadraticProblem(
    dynamics=np.array([[1.0, 0.1], [0.0, 0.9]]),
    control=np.array([[0.0], [0.3]]),
    noise_covariance=np.diag([1e-3, 4e-3]),
    state_cost=np.diag([1.0, 0.1]),
    action_cost=np.array([[0.05]]),
    discount=0.9,
    controllers=(
        Controller(weight=0.6, gain=np.array([[-0.8, -0.6]]), offset=np.array([0.2]), covariance=np.array([[0.01]])),
        Controller(weight=0.4, gain=np.array([[0.3, -0.2]]), offset=np.array([-0.4]), covariance=np.array([[0.04]])),
    ),
)
START = np.array([1.0, -0.5])


def returns(
    first_action: float | None, rollouts: int = 40_000, steps: int = 100
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    rng = np.random.default_rng(0)
    states, total = np.tile(START, (rollouts, 1)), np.zeros(rollouts)
    for step in range(steps):
        actions = PROBLEM.behave(states, rng)
        if step == 0 and first_action is not None:
            actions[:] = first_action
        rewards, states = PROBLEM.step(states, actions, rng)
        total += PROBLEM.discount**step * rewards
    return total


def test_the_value_of_a_scalar_problem_by_hand() -> None:
    """x' = u, u = x/2 for certain, reward -x²: V = -x²/(1 - γ/4)."""
    one = np.ones((1, 1))
    problem = LinearQuadraticProblem(
        dynamics=0 * one,
        control=one,
        noise_covariance=0 * one,
        state_cost=one,
        action_cost=0 * one,
        discount=0.8,
        controllers=(Controller(weight=1.0, gain=0.5 * one, offset=np.zeros(1), covariance=0 * one),),
    )
    assert problem.value(np.array([2.0])) == pytest.approx(-4 / 0.8)
    assert float(problem.action_value(np.array([2.0]))(np.array([3.0]))) == pytest.approx(-4 - 0.8 * 9 / 0.8)


def test_the_exact_value_is_that_of_roll_outs() -> None:
    sampled = returns(first_action=None)
    assert PROBLEM.value(START) == pytest.approx(sampled.mean(), abs=4 * sampled.std() / np.sqrt(len(sampled)))


def test_the_exact_action_value_is_that_of_roll_outs() -> None:
    sampled = returns(first_action=0.5)
    exact = float(PROBLEM.action_value(START)(np.array([0.5])))
    assert exact == pytest.approx(sampled.mean(), abs=4 * sampled.std() / np.sqrt(len(sampled)))


def test_value_action_value_and_hyper_value_agree() -> None:
    """V(x) = Σ_i α_i Q_H(x, i), Proposition 1 taken together."""
    for state in np.random.default_rng(1).normal(size=(5, 2)):
        weights = [controller.weight for controller in PROBLEM.controllers]
        assert PROBLEM.value(state) == pytest.approx(float(PROBLEM.hyper_values(state[None])[0] @ weights), rel=1e-9)
