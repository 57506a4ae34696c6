import gymnasium
import numpy as np
import pytest
from numpy.typing import NDArray

from lom.evaluation import UnsuitableEnvError, env_spaces, evaluate, make_env

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
