"""Episodes belong to one policy, one bundle and matching spaces, or are not played."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from lom_api.codec import pack_array, unpack_tensor
from lom_api.v1 import policy_pb2
from lom_client import ContractMismatch, DeadlineExceeded, PolicyClient, Source
from lom_client.episodes import ANY_SCORE, play_episodes, play_episodes_in_real_time
from tests.clients.toy_environments import STEPS, ToyEnv, ToyGoalEnv, ToyWalkEnv
from tests.support.fake_policy_server import Context, FakePolicyServer, honest_act, never_act, tampered


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


def test_a_goal_environment_is_seen_so_in_a_vector_too(server: FakePolicyServer, client: PolicyClient) -> None:
    envs = SyncVectorEnv([ToyGoalEnv, ToyGoalEnv], autoreset_mode=AutoresetMode.DISABLED)
    play_episodes(envs, client, episodes=2, deadline_s=10)
    seen = np.frombuffer(server.requests[0].inputs[0].data, np.float32)
    np.testing.assert_array_equal(seen, np.array([0.1, 0.2, 0.3] * 2, dtype=np.float32))


@pytest.mark.parametrize("num_envs", [1, 3, 9])
def test_a_vector_plays_the_episodes_that_one_environment_plays(client: PolicyClient, num_envs: int) -> None:
    told: list[int] = []
    alone = play_episodes(ToyWalkEnv(), client, episodes=7, seed=5, deadline_s=10)
    envs = SyncVectorEnv([ToyWalkEnv] * num_envs, autoreset_mode=AutoresetMode.DISABLED)
    together = play_episodes(
        envs, client, episodes=7, seed=5, deadline_s=10, on_episode=lambda episode, _: told.append(episode)
    )
    assert len(set(alone.lengths)) > 2
    assert (together.returns, together.lengths, together.successes) == (alone.returns, alone.lengths, alone.successes)
    assert together.mode_counts == alone.mode_counts
    assert together.first_episode_modes == alone.first_episode_modes
    assert sorted(told) == list(range(7))


def test_so_does_a_vector_of_processes(client: PolicyClient) -> None:
    alone = play_episodes(ToyWalkEnv(), client, episodes=4, seed=5, deadline_s=10)
    envs = AsyncVectorEnv([ToyWalkEnv] * 2, autoreset_mode=AutoresetMode.DISABLED, context="forkserver")
    try:
        together = play_episodes(envs, client, episodes=4, seed=5, deadline_s=10)
    finally:
        envs.close()
    assert (together.returns, together.lengths, together.successes) == (alone.returns, alone.lengths, alone.successes)


def test_a_step_of_a_vector_asks_once_for_those_that_still_play(server: FakePolicyServer, client: PolicyClient) -> None:
    envs = SyncVectorEnv([ToyWalkEnv] * 3, autoreset_mode=AutoresetMode.DISABLED)
    report = play_episodes(envs, client, episodes=5, seed=10, deadline_s=10)
    rows = [request.inputs[0].shape[0] for request in server.requests]
    assert rows[0] == 3
    assert sum(rows) == sum(report.lengths) == report.steps
    assert report.lengths == (5, 7, 2, 9, 4)
    # Number 0 plays the episodes 0 and 3, number 1 plays 1 and 4, number 2 plays 2.
    assert len(rows) == len(report.latencies_s) == max(5 + 9, 7 + 4, 2)
    assert report.sources == {Source.FRESH: report.steps}
    assert report.fresh_share == 1
    assert len(report.first_episode_modes) == report.lengths[0]


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_a_vector_that_resets_by_itself_is_counted_by_episodes_alike(client: PolicyClient, mode: AutoresetMode) -> None:
    expected: dict[int, tuple[float, int, bool]] = {}
    for first in range(3):  # each on its own: a seeded reset, then resets that follow from it
        env = ToyWalkEnv()
        for episode in range(first, 8, 3):
            observation, _ = env.reset(seed=10 + first if episode == first else None)
            total, length, over = 0.0, 0, False
            while not over:
                observation, reward, over, _, info = env.step(client.act(observation, deadline_s=10).actions)
                total, length = total + reward, length + 1
            expected[episode] = (total, length, info["is_success"])
    report = play_episodes(
        SyncVectorEnv([ToyWalkEnv] * 3, autoreset_mode=mode), client, episodes=8, seed=10, deadline_s=10
    )
    assert report.successes is not None
    played = list(zip(report.returns, report.lengths, report.successes, strict=True))
    assert played == [expected[episode] for episode in range(8)]


def test_a_vector_has_to_say_how_it_resets(server: FakePolicyServer, client: PolicyClient) -> None:
    envs = SyncVectorEnv([ToyEnv] * 2)
    del envs.metadata["autoreset_mode"]
    with pytest.raises(ValueError, match="must state metadata"):
        play_episodes(envs, client, episodes=1, deadline_s=10)
    assert server.requests == []


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


def test_real_time_with_answers_in_time_is_the_same_run(client: PolicyClient) -> None:
    told: list[int] = []
    expected = play_episodes(ToyWalkEnv(), client, episodes=2, seed=14, deadline_s=10)
    assert expected.lengths == (4, 2)
    report = play_episodes_in_real_time(
        ToyWalkEnv(), client, episodes=2, rate_hz=2.5, seed=14, on_episode=lambda episode, _: told.append(episode)
    )
    assert report.sources == {Source.FRESH: expected.steps}
    assert (report.returns, report.lengths, report.successes) == (
        expected.returns,
        expected.lengths,
        expected.successes,
    )
    assert (report.mode_counts, report.first_episode_modes) == (expected.mode_counts, expected.first_episode_modes)
    assert (report.skipped_periods, report.bundle_digest) == (0, expected.bundle_digest)
    assert report.elapsed_s > 4 / 2.5
    assert told == [0, 1]


def test_warnings_are_counted(server: FakePolicyServer, client: PolicyClient) -> None:
    def warn(reply: policy_pb2.ActReply) -> None:
        first = unpack_tensor(reply.action)[:, 0]
        reply.scores.add(name="state_score", values=pack_array(first), threshold=0.0)

    server.act = tampered(warn)
    report = play_episodes(ToyEnv(), client, episodes=2, seed=5, deadline_s=10)
    warned = sum(np.frombuffer(request.inputs[0].data, np.float32)[0] > 0 for request in server.requests)
    assert report.warning_counts == {"state_score": warned}
    assert report.warning_share == {"state_score": warned / (2 * STEPS)}
    in_real_time = play_episodes_in_real_time(ToyEnv(), client, episodes=1, rate_hz=2.5, seed=5)
    of_the_first = sum(np.frombuffer(request.inputs[0].data, np.float32)[0] > 0 for request in server.requests[:STEPS])
    assert 0 < of_the_first < STEPS
    assert in_real_time.warning_counts == {ANY_SCORE: of_the_first}


def test_real_time_goes_on_without_answers(server: FakePolicyServer, client: PolicyClient) -> None:
    client.get_spec(deadline_s=10)
    server.act = never_act
    report = play_episodes_in_real_time(ToyEnv(), client, episodes=2, rate_hz=100)
    assert report.returns == (0, 0)  # nothing was ever known, so the safe action stays
    assert report.lengths == (STEPS, STEPS)
    assert report.fresh_share == 0
    assert report.sources == {Source.HOLD: 2 * STEPS}
    assert report.first_episode_modes == (-1,) * STEPS
    assert (report.mode_counts, report.bundle_digest) == ({}, "d" * 64)


def test_real_time_needs_a_rate_and_a_known_kind(client: PolicyClient) -> None:
    with pytest.raises(ValueError, match="kinds must be position, velocity or torque"):
        play_episodes_in_real_time(ToyEnv(), client, episodes=1, rate_hz=10, kinds="force")
    with pytest.raises(ValueError, match="period_s"):
        play_episodes_in_real_time(ToyEnv(), client, episodes=1, rate_hz=1e-6)
