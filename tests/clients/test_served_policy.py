"""Evaluation code that was written for stable-baselines3 finds what it calls."""

from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from lom_client import DeadlineExceeded, InvalidRequest, PolicyClient, ServedPolicy
from lom_client.episodes import play_episodes
from tests.clients.toy_environments import ToyEnv, ToyWalkEnv
from tests.support.fake_policy_server import FakePolicyServer, never_act


def mean_return(model: Any, envs: SyncVectorEnv[Any, Any], episodes_each: int) -> float:
    """Asks as `stable_baselines3.common.evaluation.evaluate_policy` does, of environments that reset in the step."""
    observations, _ = envs.reset(seed=5)
    states, starts = None, np.ones(envs.num_envs, np.bool_)
    totals, counts = np.zeros(envs.num_envs), np.zeros(envs.num_envs, np.int64)
    while (counts < episodes_each).any():
        actions, states = model.predict(observations, state=states, episode_start=starts, deterministic=True)
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        totals += rewards * (counts < episodes_each)
        starts = terminated | truncated
        counts += starts
    return float(totals.sum() / (episodes_each * envs.num_envs))


def test_evaluation_code_plays_it(client: PolicyClient) -> None:
    def vector() -> SyncVectorEnv[Any, Any]:
        return SyncVectorEnv([ToyWalkEnv] * 3, autoreset_mode=AutoresetMode.SAME_STEP)

    expected = play_episodes(vector(), client, episodes=6, seed=5, deadline_s=10)
    model = ServedPolicy(client, deadline_s=10)
    assert mean_return(model, vector(), episodes_each=2) == pytest.approx(np.mean(expected.returns), rel=1e-12)


def test_one_observation_gives_one_action_and_rows_give_rows(client: PolicyClient) -> None:
    model = ServedPolicy(client, deadline_s=10)
    state = (np.zeros(1),)
    action, same = model.predict(np.array([0.25, -0.5, 0.0]), state)
    np.testing.assert_array_equal(action, np.array([0.25, -0.5], np.float32))
    assert same is state
    assert action.dtype == np.float32
    actions, none = model.predict(np.array([[0.25, -0.5, 0], [2, 0.5, 0]]))
    np.testing.assert_array_equal(actions, np.array([[0.25, -0.5], [1, 0.5]], np.float32))
    assert none is None


def test_goals_are_seen_after_observations_row_by_row(client: PolicyClient) -> None:
    model = ServedPolicy(client, deadline_s=10)
    one = {"observation": np.array([0.1]), "achieved_goal": np.full(2, 9.0), "desired_goal": np.array([0.2, 0.3])}
    np.testing.assert_array_equal(model.predict(one)[0], np.array([0.1, 0.2], np.float32))
    two = {key: np.stack([value, 2 * value]) for key, value in one.items()}
    np.testing.assert_array_equal(model.predict(two)[0], np.array([[0.1, 0.2], [0.2, 0.4]], np.float32))


def test_what_is_no_goal_is_checked_against_the_contract(client: PolicyClient) -> None:
    with pytest.raises(InvalidRequest, match="expected observation, got 'camera'"):
        ServedPolicy(client, deadline_s=10).predict({"camera": np.zeros(3)})


def test_sampling_counts_its_seeds_up(server: FakePolicyServer, client: PolicyClient) -> None:
    model = ServedPolicy(client, deadline_s=10, seed=40)
    for deterministic in (False, True, False):
        model.predict(np.zeros(3), deterministic=deterministic)
    seeds = [request.sampling_seed if request.HasField("sampling_seed") else None for request in server.requests]
    assert seeds == [40, None, 41]


def test_without_an_answer_there_is_no_action(server: FakePolicyServer, client: PolicyClient) -> None:
    client.get_spec(deadline_s=10)
    server.act = never_act
    observation: NDArray[Any] = ToyEnv().reset(seed=0)[0]
    with pytest.raises(DeadlineExceeded):
        ServedPolicy(client, deadline_s=0.1).predict(observation)
