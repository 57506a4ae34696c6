import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import lom.envs  # noqa: F401  (registers)
from lom.envs.fetch4 import DEMONSTRATORS, TARGET_REWARDS, Fetch4Env, Kind, fetch4_demonstrations


def test_gymnasium_accepts_it() -> None:
    check_env(gymnasium.make("lom/Fetch4Reach-v0").unwrapped, skip_render_check=True)


@pytest.mark.parametrize(
    ("kind", "best", "least"), [("Reach", 0, 47), ("Reach", 3, 47), ("Push", 0, 15), ("PickAndPlace", 1, 25)]
)
def test_the_demonstrator_gets_to_its_target_and_is_paid_for_it(kind: Kind, best: int, least: int) -> None:
    env = Fetch4Env(kind)
    observation, _ = env.reset(seed=0)
    target, paid = env.targets[best], []
    for _ in range(50):
        action = np.clip(DEMONSTRATORS[kind](observation, target), -1, 1).astype(np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        assert not terminated
        assert not truncated
        assert info["is_success"] == (reward == 1.0)
        paid.append(reward)
    assert set(paid) == {0.0, TARGET_REWARDS[best]}
    assert paid.count(TARGET_REWARDS[best]) >= least
    env.close()


def test_the_mean_of_the_four_ways_is_worth_nothing() -> None:
    env = Fetch4Env("Reach")
    observation, _ = env.reset(seed=0)
    mean = np.mean([DEMONSTRATORS["Reach"](observation, target) for target in env.targets], axis=0)
    assert mean == pytest.approx(np.zeros(4), abs=1e-5)
    assert env.step(mean.astype(np.float32))[1] == 0.0
    distances = np.linalg.norm(env.targets[:, None] - env.targets[None], axis=2)
    assert distances[~np.eye(4, dtype=bool)].min() > 2 * 0.05  # no place is paid twice


def test_demonstrations_end_at_the_time_limit_with_the_action_that_would_have_followed() -> None:
    arrays = fetch4_demonstrations("Reach", episodes=3, seed=1)
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [49, 99, 149]
    assert not arrays["terminals"].any()
    inside = np.flatnonzero(~arrays["timeouts"])
    assert np.array_equal(arrays["next_actions"][inside], arrays["actions"][inside + 1])
    assert np.array_equal(arrays["next_observations"][inside], arrays["observations"][inside + 1])
    again = fetch4_demonstrations("Reach", episodes=3, seed=1)
    assert all(np.array_equal(arrays[key], again[key]) for key in arrays)
