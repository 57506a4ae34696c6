from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from lom.dataset import DatasetError, load_transitions

Arrays = dict[str, NDArray[Any]]


def episode_arrays() -> Arrays:
    """Two episodes: rows 0-2 cut off by the time limit, rows 3-4 ending in a terminal state."""
    observations = np.arange(5, dtype=np.float32)[:, None] * np.ones((1, 2), np.float32)
    return {
        "observations": observations,
        "actions": np.linspace(-0.5, 0.5, 5, dtype=np.float32)[:, None],
        "rewards": np.array([1, 2, 3, 4, 5], np.float32),
        "next_observations": observations + 0.5,
        "terminals": np.array([0, 0, 0, 0, 1], np.bool_),
        "timeouts": np.array([0, 0, 1, 0, 0], np.bool_),
    }


def write(path: Path, arrays: Arrays) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]
    else:
        with h5py.File(path, "w") as file:
            for key, array in arrays.items():
                file[key] = array
    return path


@pytest.mark.parametrize("suffix", [".npz", ".hdf5", ".h5"])
def test_the_next_action_never_crosses_an_episode_end(tmp_path: Path, suffix: str) -> None:
    arrays = episode_arrays()
    got = load_transitions([write(tmp_path / f"data{suffix}", arrays)])
    actions = arrays["actions"]
    assert got.has_next_action.tolist() == [True, True, False, True, False]
    np.testing.assert_array_equal(got.next_actions[[0, 1, 3]], actions[[1, 2, 4]])
    assert (got.next_actions[[2, 4]] == 0).all()  # the timed-out row must not see row 3's action, row 4 overflows
    assert got.episodes.tolist() == [0, 0, 0, 1, 1]
    assert got.episode_returns.tolist() == [6.0, 9.0]


def test_without_next_observations_they_come_from_the_next_row_and_a_cut_off_row_is_dropped(tmp_path: Path) -> None:
    arrays = episode_arrays()
    del arrays["next_observations"]
    got = load_transitions([write(tmp_path / "raw.npz", arrays)])
    # Row 2 (time limit) has no next observation; its action still is the next action of row 1.
    assert got.rewards.tolist() == [1, 2, 4, 5]
    assert got.next_observations[:, 0].tolist() == [1.0, 2.0, 4.0, 4.0]
    assert got.has_next_action.tolist() == [True, True, True, False]
    assert got.next_actions[1, 0] == arrays["actions"][2, 0]
    assert got.terminals.tolist() == [False, False, False, True]
    assert got.episodes.tolist() == [0, 0, 1, 1]


def test_without_timeouts_a_seam_between_episodes_is_found(tmp_path: Path) -> None:
    arrays = episode_arrays()
    del arrays["timeouts"]
    arrays["next_observations"] = np.roll(arrays["observations"], -1, axis=0)
    arrays["next_observations"][2] = 99.0  # row 3 starts somewhere else
    got = load_transitions([write(tmp_path / "seam.npz", arrays)])
    assert got.has_next_action.tolist() == [True, True, False, True, False]


def test_given_next_actions_are_used_also_where_the_time_limit_cut(tmp_path: Path) -> None:
    arrays = episode_arrays() | {"next_actions": np.full((5, 1), 0.25, np.float32)}
    got = load_transitions([write(tmp_path / "given.npz", arrays)])
    assert got.has_next_action.all()
    assert (got.next_actions == 0.25).all()


def test_files_are_joined_in_order_with_episodes_counted_on(tmp_path: Path) -> None:
    first = write(tmp_path / "a.npz", episode_arrays())
    second = write(tmp_path / "b.npz", episode_arrays() | {"rewards": np.zeros(5, np.float32)})
    got = load_transitions([first, second])
    assert len(got) == 10
    assert got.episodes.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert not got.has_next_action[4]  # the last row of a file has no successor in the next file
    assert got.fingerprint != load_transitions([second, first]).fingerprint


def test_actions_outside_the_space_are_clipped_and_counted_or_refused(tmp_path: Path) -> None:
    arrays = episode_arrays()
    arrays["actions"] = np.array([[0.0], [3.0], [0.0], [-2.0], [0.0]], np.float32)
    path = write(tmp_path / "wild.npz", arrays)
    warnings: list[str] = []
    bounds = (-np.ones(1, np.float32), np.ones(1, np.float32))
    got = load_transitions([path], action_bounds=bounds, warn=warnings.append)
    assert got.actions[:, 0].tolist() == [0.0, 1.0, 0.0, -1.0, 0.0]
    assert got.next_actions[0, 0] == 1.0
    assert len(warnings) == 1
    assert "2 of 5 action entries (40.0%)" in warnings[0]
    with pytest.raises(DatasetError, match=r"2 of 5 .*--strict"):
        load_transitions([path], strict=True)


def test_columns_of_scalars_are_taken_as_scalars(tmp_path: Path) -> None:
    arrays = episode_arrays()
    arrays["rewards"] = arrays["rewards"][:, None]
    assert load_transitions([write(tmp_path / "column.npz", arrays)]).rewards.shape == (5,)


def broken(**changes: NDArray[Any] | None) -> Arrays:
    arrays = {**episode_arrays(), **changes}
    return {key: array for key, array in arrays.items() if array is not None}


NAN = np.array([0, 0, np.nan, 0, 0], np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (broken(rewards=None), r"expected a key 'rewards', got \[.*\]$"),
        (broken(rewards=None, reward=NAN), r"expected a key 'rewards', .*is 'reward' meant"),
        (broken(rewards=NAN), r"rewards: expected finite .* infinite ones in 1 of 5 rows, the first is row 2$"),
        (broken(rewards=np.array([1e39] * 5)), r"rewards: expected finite float32"),
        (broken(observations=np.full((5, 2), np.inf, np.float32)), r"observations: expected finite"),
        (broken(rewards=np.zeros(4, np.float32)), r"rewards: expected shape \[5\], got \[4\]"),
        (
            broken(actions=np.zeros((5, 3), np.float32)),
            r"actions: expected shape \[5, 1\] as of the environment, got \[5, 3\]",
        ),
        (
            broken(observations=np.zeros((5, 7), np.float32)),
            r"observations: expected shape \[5, 2\] as of the environment, got \[5, 7\]",
        ),
        (broken(observations=np.zeros((5, 2, 2), np.float32)), r"observations: expected shape"),
        (broken(observations=np.zeros((0, 2), np.float32)), r"expected at least one transition, got none"),
        (broken(rewards=np.array(["a"] * 5)), r"rewards: expected numbers"),
        (broken(rewards=np.array([None] * 5, dtype=object)), r"pickled objects, which are never loaded"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, arrays: Arrays, message: str) -> None:
    path = write(tmp_path / "bad.npz", arrays)
    bounds = (-np.ones(1, np.float32), np.ones(1, np.float32))
    with pytest.raises(DatasetError, match=message) as caught:
        load_transitions([path], action_bounds=bounds, observation_dim=2)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.npz", None, "expected a file, found none"),
        ("text.npz", b"not an archive", "expected"),
        ("text.hdf5", b"not an archive", "expected an HDF5 file"),
        ("data.csv", b"1,2", r"expected a file named \.npz, \.hdf5 or \.h5"),
        ("cut.npz", b"PK\x03\x04 cut off", "expected an .npz archive"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        load_transitions([path])


def test_a_pickle_inside_an_archive_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (canary,))

    path = write(tmp_path / "evil.npz", broken(rewards=np.array([Touch()] * 5, dtype=object)))
    with pytest.raises(DatasetError, match="never loaded"):
        load_transitions([path])
    assert not canary.exists()


def test_no_files_at_all() -> None:
    with pytest.raises(DatasetError, match="expected at least one dataset file"):
        load_transitions([])


def test_whole_episodes_are_held_out_and_nothing_is_lost(tmp_path: Path) -> None:
    one = episode_arrays()
    many = {key: np.concatenate([array] * 20) for key, array in one.items()}
    many["rewards"] = np.arange(100, dtype=np.float32)
    whole = load_transitions([write(tmp_path / "many.npz", many)])  # 40 episodes, of 3 and 2 rows
    kept, held_out = whole.hold_out(0.1, seed=0)
    assert held_out is not None
    assert len(np.unique(held_out.episodes)) == 4
    assert held_out.episodes.max() == 3
    assert sorted([*kept.rewards, *held_out.rewards]) == list(range(100))
    episode_of = dict(zip(whole.rewards, whole.episodes, strict=True))
    assert {episode_of[r] for r in kept.rewards}.isdisjoint(episode_of[r] for r in held_out.rewards)
    assert whole.hold_out(0.1, seed=0)[1].fingerprint == whole.fingerprint  # type: ignore[union-attr]


@pytest.mark.parametrize(("copies", "share", "held_out"), [(1, 0.05, 0), (5, 0.05, 1), (5, 0.0, 0), (20, 0.5, 20)])
def test_how_many_episodes_are_held_out(tmp_path: Path, copies: int, share: float, held_out: int) -> None:
    arrays = {key: np.concatenate([array] * copies) for key, array in episode_arrays().items()}
    part = load_transitions([write(tmp_path / "data.npz", arrays)]).hold_out(share, seed=0)[1]
    assert (0 if part is None else len(np.unique(part.episodes))) == held_out
