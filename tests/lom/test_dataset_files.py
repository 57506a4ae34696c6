from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lom.dataset import DatasetError, load_transitions
from lom.dataset_files import find_dataset
from tests.support.datasets import box, minari_episode, write_arrays, write_minari

BOUNDS = (-np.ones(1, np.float32), np.ones(1, np.float32))


def goal_arrays(rows: int = 4) -> dict[str, Any]:
    """A goal environment's file; what each number is can be read off it."""
    column = np.arange(rows, dtype=np.float64)[:, None]
    observation = {
        "achieved_goal": column + 900,
        "desired_goal": column + np.array([20.0, 30.0]),
        "observation": column + np.array([0.0, 10.0]),
    }
    return {
        "observations": observation,
        "next_observations": {key: value + 0.5 for key, value in observation.items()},
        "actions": np.zeros((rows, 1), np.float32),
        "rewards": np.zeros(rows),
        "terminals": np.arange(rows) == rows - 1,
    }


@pytest.mark.parametrize("place", ["", "data", "data/main_data.hdf5"])
def test_minari_episodes_follow_each_other_and_end_where_they_end(tmp_path: Path, place: str) -> None:
    folder = write_minari(
        tmp_path / "d-v0",
        [minari_episode(3), minari_episode(2, first=50, terminated=True, truncated=False)],
        action_space=box([-2.0], [3.0]),
    )
    got = load_transitions([folder / place])
    assert got.observations[:, 0].tolist() == [0, 1, 2, 50, 51]
    assert got.next_observations.tolist() == [[1, -1], [2, -2], [3, -3], [51, -51], [52, -52]]
    assert got.rewards.tolist() == [0, 1, 2, 0, 1]
    assert got.terminals.tolist() == [False, False, False, False, True]
    assert got.has_next_action.tolist() == [True, True, False, True, False]
    np.testing.assert_allclose(got.next_actions[[0, 1, 3], 0], [0.01, 0.02, 0.51])
    assert got.episodes.tolist() == [0, 0, 0, 1, 1]
    assert (got.action_low.tolist(), got.action_high.tolist()) == ([-2.0], [3.0])


def test_minari_episodes_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = write_minari(tmp_path / "d-v0", [minari_episode(1, first=k) for k in range(12)])
    assert load_transitions([folder]).observations[:, 0].tolist() == list(range(12))


def test_a_minari_episode_that_was_only_cut_off_ends_all_the_same(tmp_path: Path) -> None:
    folder = write_minari(tmp_path / "d-v0", [minari_episode(2, truncated=False), minari_episode(2, first=2)])
    got = load_transitions([folder])  # row 2 begins where row 1 ends: no seam shows
    assert got.has_next_action.tolist() == [True, False, True, False]
    assert got.episodes.tolist() == [0, 0, 1, 1]


def test_minari_reads_what_its_own_files_of_older_versions_say(tmp_path: Path) -> None:
    folder = write_minari(
        tmp_path / "d-v0", [minari_episode(2)], attributes={"action_space": '{"type":"Box","low":[-4],"high":[4]}'}
    )
    (folder / "data" / "metadata.json").unlink()  # 0.4 kept it in the HDF5 file
    assert load_transitions([folder]).action_high.tolist() == [4.0]


def test_an_id_is_looked_up_below_minaris_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_minari(tmp_path / "root" / "door" / "human-v2", [minari_episode(2)])
    assert find_dataset(Path("door/human-v2"), tmp_path / "root") == folder
    assert find_dataset(Path("door/human-v3"), tmp_path / "root") == Path("door/human-v3")
    here = tmp_path / "here"
    (here / "door" / "human-v2").mkdir(parents=True)
    monkeypatch.chdir(here)
    assert find_dataset(Path("door/human-v2"), tmp_path / "root") == Path("door/human-v2")  # a path comes first


@pytest.mark.parametrize("name", ["goal.npz", "goal.hdf5", "goal-v0"])
def test_goal_observations_become_observation_then_desired_goal(tmp_path: Path, name: str) -> None:
    arrays = goal_arrays()
    path = tmp_path / name
    if path.suffix:
        write_arrays(path, arrays)
    else:
        whole = {k: np.concatenate([v, v[-1:] + 0.5]) for k, v in arrays["observations"].items()}
        write_minari(path, [minari_episode(4) | {"observations": whole}])
    got = load_transitions([path])
    assert got.observation_parts == (("observation", 2), ("desired_goal", 2))
    assert got.observations[1].tolist() == [1, 11, 21, 31]
    assert got.next_observations[3].tolist() == [3.5, 13.5, 23.5, 33.5]


def test_other_dict_observations_are_in_alphabetical_order_or_as_asked(tmp_path: Path) -> None:
    arrays = goal_arrays()
    nested = {"wheels": arrays["observations"]["observation"], "arm": {"joints": np.arange(4.0)}}
    path = write_arrays(tmp_path / "robot.hdf5", arrays | {"observations": nested, "next_observations": nested})
    got = load_transitions([path])
    assert got.observation_parts == (("arm/joints", 1), ("wheels", 2))
    assert got.observations[3].tolist() == [3, 3, 13]
    asked = load_transitions([path], observation_keys=["wheels"])
    assert asked.observation_parts == (("wheels", 2),)
    assert asked.observations[3].tolist() == [3, 13]


def test_every_row_knows_its_file_also_after_holding_out(tmp_path: Path) -> None:
    first = write_minari(tmp_path / "first-v0", [minari_episode(2, first=k) for k in range(0, 60, 3)])
    second = write_minari(tmp_path / "second-v0", [minari_episode(1, first=k) for k in range(100, 130, 2)])
    whole = load_transitions([first, second], names=["one", "two"])
    assert whole.source_names == ("one", "two")
    assert whole.sources.tolist() == [0] * 40 + [1] * 15
    for part in whole.hold_out(0.3, seed=1):
        assert part is not None
        assert ((part.observations[:, 0] >= 100) == (part.sources == 1)).all()
        assert part.source_names == ("one", "two")


def test_files_with_and_without_stated_bounds_share_the_stated_ones(tmp_path: Path) -> None:
    stated = write_minari(tmp_path / "d-v0", [minari_episode(2)], action_space=box([-0.5], [0.5]))
    flat = write_arrays(
        tmp_path / "flat.npz", goal_arrays() | {"observations": np.zeros((4, 2)), "next_observations": np.zeros((4, 2))}
    )
    assert load_transitions([flat, stated]).action_high.tolist() == [0.5]
    assert load_transitions([flat, stated], action_bounds=BOUNDS).action_high.tolist() == [1.0]


def minari(tmp_path: Path, *episodes: Any, **more: Any) -> Path:
    return write_minari(tmp_path / "bad-v0", list(episodes) or [minari_episode(3)], **more)


def changed(**arrays: Any) -> dict[str, Any]:
    return {key: value for key, value in {**minari_episode(3), **arrays}.items() if value is not None}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: minari(p, changed(rewards=None)), r"episode_0: expected a key 'rewards', got \["),
        (lambda p: minari(p, changed(observations=np.zeros((3, 2)))), r"observations: expected 4 rows for 3 .* got 3"),
        (lambda p: minari(p, changed(actions=np.zeros((2, 1)))), r"episode_0: actions: expected 3 rows .* got 2"),
        (lambda p: minari(p, changed(), changed(actions=np.zeros((3, 2)))), r"episode_1: actions: .* as in episode_0"),
        (lambda p: minari(p, changed(actions={"left": np.zeros(3)})), r"actions: expected an array, got a group"),
        (lambda p: minari(p, changed(actions=np.zeros(3, np.int64))), r"actions: expected shape \[3, dimensions\]"),
        (
            lambda p: minari(p, changed(observations={"text": np.array([b"a"] * 4)})),
            r"observations/text: expected numb",
        ),
        (
            lambda p: minari(p, changed(observations={"eye": np.zeros((4, 8, 8, 3))})),
            r"/eye: expected .*\[4, 8, 8, 3\]",
        ),
        (lambda p: minari(p, changed(observations={})), r"observations: .* empty group"),
        (
            lambda p: minari(p, changed(), changed(observations={"a": np.zeros((4, 2))})),
            r"episode_1: expected the part",
        ),
        (lambda p: minari(p, action_space={"type": "Discrete", "n": 3}), r"expected a Box .* got Discrete"),
        (lambda p: minari(p, action_space=box([-np.inf], [np.inf])), r"action_space: expected finite bounds"),
        (lambda p: minari(p, action_space="nonsense"), r"action_space: expected Minari's description"),
        (lambda p: minari(p, action_space=box([-1.0, -1.0], [1.0, 1.0])), r"action_space: expected Minari's descript"),
        (lambda p: minari(p, metadata={"rewards_known": False}), r"rewards: expected known ones"),
        (lambda p: minari(p, attributes={"rewards_known": False}), r"rewards: expected known ones"),
    ],
)
def test_what_is_wrong_with_a_minari_dataset_is_named(tmp_path: Path, make: Any, message: str) -> None:
    path = make(tmp_path)
    with pytest.raises(DatasetError, match=message) as caught:
        load_transitions([path])
    assert str(caught.value).startswith(str(path))


def test_known_rewards_may_be_said_to_be_known(tmp_path: Path) -> None:
    assert len(load_transitions([minari(tmp_path, metadata={"rewards_known": True})])) == 3


def test_an_arrow_dataset_is_refused_by_its_format(tmp_path: Path) -> None:
    folder = minari(tmp_path, metadata={"data_format": "arrow"})
    (folder / "data" / "main_data.hdf5").unlink()
    with pytest.raises(DatasetError, match=r"expected a Minari dataset in HDF5 .*'arrow', which is not read here"):
        load_transitions([folder])


def test_files_that_disagree_are_named(tmp_path: Path) -> None:
    low = write_minari(tmp_path / "low-v0", [minari_episode(2)], action_space=box([-1.0], [1.0]))
    high = write_minari(tmp_path / "high-v0", [minari_episode(2)], action_space=box([-2.0], [2.0]))
    with pytest.raises(DatasetError, match=r"high-v0: action_space: expected the bounds of .*low-v0, got \[-2.0\]"):
        load_transitions([low, high])
    goal = write_arrays(tmp_path / "goal.npz", goal_arrays())
    with pytest.raises(
        DatasetError, match=r"low-v0: observations: expected shape \[2, 4\] as of .*goal.npz, got \[2, 2\]"
    ):
        load_transitions([goal, low])


def test_parts_that_are_not_there_are_named(tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "goal.npz", goal_arrays())
    with pytest.raises(DatasetError, match=r"observation keys: expected some of \['achieved_goal', .*got 'camera'"):
        load_transitions([path], observation_keys=["camera"])
    arrays = goal_arrays()
    del arrays["next_observations"]["desired_goal"]
    with pytest.raises(
        DatasetError, match=r"next_observations: expected the parts observation\[2\], desired_goal\[2\]"
    ):
        load_transitions([write_arrays(tmp_path / "half.npz", arrays)])
