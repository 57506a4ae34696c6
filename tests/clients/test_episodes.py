"""Episodes belong to one policy, one bundle and matching spaces, or are not played."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from gymnasium import spaces

from lom_api.v1 import policy_pb2
from lom_client import ContractMismatch, DeadlineExceeded, PolicyClient
from lom_client.episodes import play_episodes
from tests.clients.toy_environments import STEPS, ToyEnv, ToyGoalEnv
from tests.support.fake_policy_server import Context, FakePolicyServer, honest_act, never_act


def test_the_report_tells_what_happened(server: FakePolicyServer, client: PolicyClient) -> None:
    env = ToyEnv()
    told: list[tuple[int, float]] = []
    report = play_episodes(
        env, client, episodes=3, seed=5, deadline_s=10, on_episode=lambda episode, value: told.append((episode, value))
    )
    assert env.seeds == [5, 6, 7]
    assert report.lengths == (STEPS,) * 3
    first_numbers = [float(action[0]) for action in env.actions]
    assert report.returns == pytest.approx([sum(first_numbers[i : i + STEPS]) for i in (0, 4, 8)])
    assert told == list(enumerate(report.returns))
    assert report.success_rate == 1
    assert len(report.latencies_s) == len(server.requests) == 3 * STEPS
    assert (report.latencies_s > 0).all()
    assert sum(report.mode_counts.values()) == 3 * STEPS
    assert sum(report.mode_share.values()) == pytest.approx(1)
    assert (report.variant, report.policy) == ("greedy_mode", "toy")


def test_an_episode_can_be_played_again_alone(client: PolicyClient) -> None:
    together = play_episodes(ToyEnv(), client, episodes=3, seed=5, deadline_s=10)
    alone = play_episodes(ToyEnv(), client, episodes=1, seed=7, deadline_s=10)
    assert together.returns[2] == alone.returns[0]


def test_success_is_reported_as_the_environment_says_it(client: PolicyClient) -> None:
    assert play_episodes(ToyEnv(succeeds=False), client, episodes=2, deadline_s=10).success_rate == 0
    assert play_episodes(ToyEnv(succeeds=None), client, episodes=2, deadline_s=10).success_rate is None


def test_the_actor_has_no_modes(client: PolicyClient) -> None:
    report = play_episodes(ToyEnv(), client, episodes=1, variant="actor", deadline_s=10)
    assert (report.variant, report.mode_counts, report.mode_share) == ("actor", {}, {})


def test_a_goal_environment_is_seen_as_observation_then_goal(server: FakePolicyServer, client: PolicyClient) -> None:
    play_episodes(ToyGoalEnv(), client, episodes=1, deadline_s=10)
    seen = np.frombuffer(server.requests[0].inputs[0].data, np.float32)
    np.testing.assert_array_equal(seen, np.array([0.1, 0.2, 0.3], dtype=np.float32))


def goal_env_without_goal() -> ToyEnv:
    env = ToyEnv()
    env.observation_space = spaces.Dict(observation=spaces.Box(-1, 1, (3,)))
    return env


def env_with_discrete_action() -> ToyEnv:
    env = ToyEnv()
    env.action_space = spaces.Discrete(2)  # type: ignore[assignment]
    return env


def env_with_image() -> ToyEnv:
    env = ToyEnv()
    env.observation_space = spaces.Box(0, 255, (3, 1), np.uint8)
    return env


@pytest.mark.parametrize(
    ("make_env", "words"),
    [
        (lambda: ToyEnv(observation_width=4), "expects width 3, the environment has 4"),
        (lambda: ToyEnv(action_high=2.0), "the policy's low is"),
        (env_with_discrete_action, "the environment takes Discrete"),
        (env_with_image, "expected one vector"),
        (goal_env_without_goal, "a Dict needs observation and desired_goal"),
    ],
)
def test_an_environment_of_other_spaces_is_not_played(
    server: FakePolicyServer, client: PolicyClient, make_env: Callable[[], ToyEnv], words: str
) -> None:
    env = make_env()
    with pytest.raises(ContractMismatch, match=words):
        play_episodes(env, client, episodes=1, deadline_s=10)
    assert env.seeds == []
    assert server.requests == []


def test_a_bundle_that_changes_in_mid_run_ends_it(server: FakePolicyServer, client: PolicyClient) -> None:
    digests = itertools.chain(["d" * 64] * 3, itertools.repeat("e" * 64))

    def act(request: policy_pb2.ActRequest, context: Context) -> policy_pb2.ActReply:
        reply = honest_act(request, context)
        reply.bundle_digest = next(digests)
        return reply

    server.act = act
    with pytest.raises(ContractMismatch, match="changed the bundle"):
        play_episodes(ToyEnv(), client, episodes=1, deadline_s=10)


def test_a_missed_deadline_ends_the_run(server: FakePolicyServer, client: PolicyClient) -> None:
    client.get_spec(deadline_s=10)
    server.act = never_act
    with pytest.raises(DeadlineExceeded):
        play_episodes(ToyEnv(), client, episodes=1, deadline_s=0.1)


def test_there_is_at_least_one_episode(client: PolicyClient) -> None:
    with pytest.raises(ValueError, match="episodes"):
        play_episodes(ToyEnv(), client, episodes=0)
