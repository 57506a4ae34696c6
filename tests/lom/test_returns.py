from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lom.dataset import Transitions, load_transitions
from lom.envs.fork import fork_demonstrations
from lom.returns import mean_horizon, multi_step, returns_to_go


def episodes(*lengths: int, terminal: bool, has_next_action: bool = False) -> Transitions:
    """Rewards 1, 2, 3 and so on; every episode ends in the same way."""
    count = sum(lengths)
    column = np.zeros((count, 1), np.float32)
    episode = np.repeat(np.arange(len(lengths)), lengths).astype(np.int32)
    ends = np.diff(episode, append=-1) != 0
    return Transitions(
        observations=column,
        actions=column,
        rewards=np.arange(1, count + 1, dtype=np.float32),
        next_observations=column,
        next_actions=column,
        terminals=ends & terminal,
        has_next_action=~ends | has_next_action,
        episodes=episode,
        sources=np.zeros(count, np.int32),
        source_names=("here",),
        observation_parts=(),
        action_low=-np.ones(1, np.float32),
        action_high=np.ones(1, np.float32),
        fingerprint="",
    )


def test_returns_to_go_by_hand() -> None:
    """1 + 2/2 + 3/4, 2 + 3/2, 3 and 4 + 5/2, 5."""
    assert returns_to_go(episodes(3, 2, terminal=True), 0.5).tolist() == [2.75, 3.5, 3.0, 6.5, 5.0]


def test_two_steps_by_hand() -> None:
    """A terminal ends the sum, and what follows belongs to another episode."""
    rewards, last, discounts = multi_step(episodes(3, 2, terminal=True), 2, 0.5)
    assert rewards.tolist() == [1 + 2 / 2, 2 + 3 / 2, 3, 4 + 5 / 2, 5]
    assert last.tolist() == [1, 2, 2, 4, 4]
    assert discounts.tolist() == [0.25, 0.25, 0.5, 0.25, 0.5]


def test_an_episode_cut_off_without_a_next_action_is_bootstrapped_one_row_earlier() -> None:
    rewards, last, discounts = multi_step(episodes(3, terminal=False), 5, 0.5)
    assert rewards.tolist() == [1 + 2 / 2, 2, 3]  # the last row has no target, whatever is summed
    assert last.tolist() == [1, 1, 2]
    assert discounts.tolist() == [0.25, 0.5, 0.5]
    assert multi_step(episodes(3, terminal=False, has_next_action=True), 5, 0.5).last.tolist() == [2, 2, 2]


@pytest.mark.parametrize("terminal", [True, False])
def test_one_step_is_the_row_itself(terminal: bool) -> None:
    transitions = episodes(3, 1, 2, terminal=terminal)
    rewards, last, discounts = multi_step(transitions, 1, 0.9)
    np.testing.assert_allclose(rewards, transitions.rewards)
    assert last.tolist() == list(range(6))
    assert set(discounts.tolist()) == {0.9}


def test_many_steps_of_terminal_episodes_are_the_whole_return(tmp_path: Path) -> None:
    np.savez(tmp_path / "fork.npz", **fork_demonstrations(episodes=20, seed=1))  # type: ignore[arg-type]
    transitions = load_transitions([tmp_path / "fork.npz"])
    rewards, last, _ = multi_step(transitions, 1_000, 0.99)
    np.testing.assert_allclose(rewards, returns_to_go(transitions, 0.99))
    assert (transitions.episodes[last] == transitions.episodes).all()
    assert multi_step(replace(transitions, rewards=0 * transitions.rewards), 7, 0.99).rewards.any() == np.False_


def test_the_horizon_ends_with_the_episode_or_with_the_discount() -> None:
    """Rows of 3 and 5 steps at γ = 0.75, which sees 4: (3 · 3 + 5 · 4) / 8; of episodes that were cut off 4 each."""
    assert mean_horizon(episodes(3, 5, terminal=True), 0.75) == pytest.approx(29 / 8)
    assert mean_horizon(episodes(3, 5, terminal=False), 0.75) == pytest.approx(4.0)
    assert mean_horizon(episodes(3, 5, terminal=False), 1.0) == pytest.approx((9 + 25) / 8)
