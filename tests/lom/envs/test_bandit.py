import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import lom.envs  # noqa: F401  (registers)
from lom.envs.bandit import bandit_demonstrations


@pytest.mark.parametrize(
    ("action", "reward"),
    [((0.8, -0.8), 5.0), ((-0.8, 0.8), 3.0), ((0.8, 0.8), 1.5), ((-0.8, -0.8), 0.0), ((0, 0), 0.0)],
)
def test_rewards_of_the_corners_and_of_their_mean(action: tuple[float, float], reward: float) -> None:
    env = gymnasium.make("lom/Bandit4-v0")
    env.reset(seed=0)
    _, got, terminated, _, _ = env.step(np.array(action, np.float32))
    assert got == pytest.approx(reward, abs=1e-3)
    assert terminated


def test_gymnasium_accepts_it() -> None:
    check_env(gymnasium.make("lom/Bandit4-v0").unwrapped, skip_render_check=True)


def test_demonstrations_follow_the_weights() -> None:
    arrays = bandit_demonstrations(rows=4000, seed=0, weights=(0.45, 0.1, 0.4, 0.05))
    best = (arrays["actions"][:, 0] > 0) & (arrays["actions"][:, 1] < 0)
    assert best.mean() == pytest.approx(0.05, abs=0.015)
    assert arrays["rewards"][best].mean() == pytest.approx(5.0, abs=0.15)
    assert arrays["terminals"].all()
