import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import lom.envs  # noqa: F401  (registers)
from lom.envs.double_circle import double_circle_demonstrations


def test_gymnasium_accepts_it() -> None:
    check_env(gymnasium.make("lom/DoubleCircle-v0").unwrapped, skip_render_check=True)


@pytest.mark.parametrize("action", [-0.6, 0.6])
def test_an_action_of_the_sign_of_the_state_is_rewarded(action: float) -> None:
    env = gymnasium.make("lom/DoubleCircle-v0")
    signs = set()
    for seed in range(8):
        (x,), _ = env.reset(seed=seed)
        signs.add(x > 0)
        _, reward, terminated, _, _ = env.step(np.array([action], np.float32))
        assert reward == (x * action > 0)
        assert terminated
    assert signs == {True, False}


def test_demonstrations_lie_on_two_rings_a_quarter_of_them_on_the_inner_one() -> None:
    arrays = double_circle_demonstrations(rows=4000, seed=0)
    radius = 1.2 * np.hypot(arrays["observations"][:, 0], arrays["actions"][:, 0])
    inner, outer = np.abs(radius - 0.3) < 0.1001, np.abs(radius - 1.0) < 0.1001
    assert (inner | outer).all()
    assert inner.mean() == pytest.approx(0.25, abs=0.03)
    assert arrays["rewards"].mean() == pytest.approx(0.5, abs=0.03)
    assert np.array_equal(arrays["rewards"] == 1, arrays["observations"][:, 0] * arrays["actions"][:, 0] > 0)
