"""Whatever it is given, `lom-train` trains, or refuses with one line, exit code 2 and no folder left behind."""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from lom import train
from lom.dataset import DatasetError, load_transitions
from lom.run import load_run
from tests.bench import dataset_memory
from tests.support.datasets import box, minari_episode, write_arrays, write_minari

QUICK = ["--preset", "small", "--mixture-steps", "6", "--steps", "6"]
FILE_KINDS = ("npz", "compressed npz", "hdf5", "minari")
Make = Callable[[Path], Path]


def rows(count: int = 60, *, observation_dim: int = 3, action_dim: int = 2, **changes: Any) -> dict[str, Any]:
    """Random transitions in episodes of 20 rows; a value of None takes a key away."""
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(count, observation_dim)).astype(np.float32),
        "next_observations": rng.normal(size=(count, observation_dim)).astype(np.float32),
        "actions": rng.uniform(-0.9, 0.9, (count, action_dim)).astype(np.float32),
        "rewards": rng.normal(size=count).astype(np.float32),
        "terminals": np.zeros(count, np.bool_),
        "timeouts": np.arange(count) % 20 == 19,
        **changes,
    }
    return {key: array for key, array in arrays.items() if array is not None}


def constant_dimension() -> dict[str, Any]:
    arrays = rows()
    for key in ("observations", "next_observations"):
        arrays[key][:, 1] = 1e6
    return arrays


def npz(arrays: dict[str, Any], name: str = "data.npz") -> Make:
    return lambda folder: write_arrays(folder / name, arrays)


def hdf5(arrays: dict[str, Any]) -> Make:
    return npz(arrays, "data.hdf5")


def content(name: str, data: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def damaged(make: Make, damage: Callable[[bytes], bytes]) -> Make:
    def made(folder: Path) -> Path:
        path = make(folder)
        path.write_bytes(damage(path.read_bytes()))
        return path

    return made


def compressed(folder: Path) -> Path:
    np.savez_compressed(folder / "data.npz", **rows())
    return folder / "data.npz"


def single_array(folder: Path) -> Path:
    np.save(folder / "data.npy", np.zeros(3))
    return (folder / "data.npy").rename(folder / "data.npz")


def claims_a_petabyte(folder: Path) -> Path:
    with h5py.File(folder / "data.hdf5", "w") as file:
        for key, array in rows().items():
            if key == "observations":
                file.create_dataset(key, (10**12, 300), np.float32, chunks=(1024, 300))
            else:
                file[key] = array
    return folder / "data.hdf5"


def minari(**changes: Any) -> Make:
    episodes = [{**minari_episode(20, first=5 * k), **changes} for k in range(3)]
    return lambda folder: write_minari(folder / "data-v0", episodes, action_space=box([-1.0], [1.0]))


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    return data[:200] + bytes(byte ^ 0xFF for byte in data[200:300]) + data[300:]


AT_BOUNDS = np.sign(np.random.default_rng(1).normal(size=(60, 2))).astype(np.float32)


TRAINED: dict[str, tuple[Make, list[str]]] = {
    "npz": (npz(rows()), []),
    "hdf5 with next observations": (hdf5(rows()), []),
    "hdf5 without": (hdf5(rows(next_observations=None)), []),
    "hdf5 with terminals only": (hdf5(rows(next_observations=None, timeouts=None)), []),
    "compressed": (compressed, []),
    "minari": (minari(), []),
    "a constant dimension": (npz(constant_dimension()), []),
    "all constant": (npz(rows(observations=np.ones((60, 3)), next_observations=np.ones((60, 3)))), []),
    "one action": (npz(rows(actions=np.zeros((60, 2)))), []),
    "no rewards": (npz(rows(rewards=np.zeros(60))), []),
    "one episode": (npz(rows(20)), []),
    "two rows": (npz(rows(2)), []),
    "one row": (npz(rows(1, terminals=np.ones(1))), []),
    "all terminal": (npz(rows(terminals=np.ones(60), timeouts=np.zeros(60))), []),
    "M = 1": (npz(rows()), ["--num-components", "1"]),
    "M larger than the rows": (npz(rows(3)), ["--num-components", "50"]),
    "actions exactly at the bounds": (npz(rows(actions=AT_BOUNDS)), ["--strict"]),
    "28 action dimensions": (npz(rows(observation_dim=39, action_dim=28)), ["--num-components", "20"]),
    "large rewards": (npz(rows(rewards=np.full(60, 1e6))), []),
    "all float64": (hdf5({k: v.astype(np.float64) for k, v in rows().items()}), []),
}


@pytest.mark.parametrize(("make", "flags"), TRAINED.values(), ids=TRAINED)
def test_what_can_be_trained_on_is_trained_on(tmp_path: Path, make: Make, flags: list[str]) -> None:
    out = tmp_path / "run"
    train.main([str(make(tmp_path)), "--out", str(out), *QUICK, *flags])
    trained = load_run(out)  # refuses weights that are not finite
    assert all(math.isfinite(value) for value in trained.summary["metrics"].values())
    assert trained.policy.normaliser.std.min() > 0
    card = json.loads((out / "dataset_card.json").read_text(), parse_constant=pytest.fail)
    assert card["rows"] == trained.spec.dataset_rows
    assert card["fingerprint"] == trained.spec.dataset_fingerprint


def with_nan(key: str, where: Any, value: float = math.nan) -> dict[str, Any]:
    arrays = rows()
    arrays[key] = arrays[key].astype(np.float64)
    arrays[key][where] = value
    return arrays


NOT_FINITE = "expected finite float32 values, got NaN or infinite ones in"


REFUSED: dict[str, tuple[Make, list[str], str]] = {
    "NaN rewards": (npz(with_nan("rewards", [7, 9])), [], f"rewards: {NOT_FINITE} 2 of 60 rows, the first is row 7"),
    "NaN observations": (
        hdf5(with_nan("observations", (slice(3, 5), 1))),
        [],
        f"observations: {NOT_FINITE} 2 of 60 rows, the first is row 3",
    ),
    "infinite actions": (
        npz(with_nan("actions", (59, 0), math.inf)),
        [],
        f"actions: {NOT_FINITE} 1 of 60 rows, the first is row 59",
    ),
    "NaN terminals": (npz(with_nan("terminals", 4)), [], f"terminals: {NOT_FINITE} 1 of 60"),
    "beyond float32": (npz(with_nan("next_observations", 0, 1e300)), [], f"next_observations: {NOT_FINITE} 1 of 60"),
    "NaN in Minari": (minari(rewards=np.full(20, np.nan)), [], f"rewards: {NOT_FINITE} 60 of 60 rows"),
    "half terminal": (npz(with_nan("terminals", 4, 0.5)), [], "terminals: expected 0 or 1, got 0.5"),
    "a missing key": (npz(rows(rewards=None)), [], "expected a key 'rewards'"),
    "no keys": (hdf5({}), [], "expected a key 'observations'"),
    "no rows": (npz(rows(0)), [], "expected at least one transition, got none"),
    "lengths that differ": (hdf5(rows(rewards=np.zeros(59))), [], "rewards: expected shape [60], got [59]"),
    "flat actions": (npz(rows(actions=np.zeros(60))), [], "actions: expected shape [60, dimensions], got [60]"),
    "no action dimensions": (npz(rows(actions=np.zeros((60, 0)))), [], "actions: expected shape [60, dimensions]"),
    "a scalar": (npz(rows(observations=np.float32(1))), [], "expected at least one transition"),
    "a scalar reward": (npz(rows(rewards=np.float32(1))), [], "rewards: expected shape [60], got []"),
    "a scalar action": (npz(rows(actions=np.float32(1))), [], "actions: expected shape [60, dimensions], got []"),
    "text": (npz(rows(rewards=np.array(["1"] * 60))), [], "rewards: expected numbers, got dtype <U1"),
    "complex": (npz(rows(rewards=np.zeros(60, np.complex64))), [], "rewards: expected numbers"),
    "objects": (npz(rows(rewards=np.array([{}] * 60))), [], "pickled objects, which are never loaded"),
    "nothing follows": (npz(rows(terminals=np.zeros(60), timeouts=np.ones(60))), [], "are all of them timeouts?"),
    "strict": (npz(rows(actions=1.5 * AT_BOUNDS)), ["--strict"], "lie outside the action space; refused"),
    "another environment": (
        npz(rows()),
        ["--env", "lom/Fork-v0"],
        "expected shape [60, 2] as of the environment, got [60, 3]",
    ),
    "no such environment": (npz(rows()), ["--env", "lom/None-v0"], "lom/None-v0"),
    "no such part": (
        minari(observations={"a": np.zeros((21, 2))}),
        ["--observation-keys", "b"],
        "observation keys: expected some of ['a'], got 'b'",
    ),
    "Minari lengths": (
        minari(rewards=np.zeros(19)),
        [],
        "episode_0: observations: expected 20 rows for 19 rewards, got 21",
    ),
    "no file": (lambda folder: folder / "gone.npz", [], "expected a file, found none"),
    "some folder": (lambda folder: folder, [], "expected a Minari dataset in HDF5"),
    "another suffix": (content("data.csv", b"1,2"), [], "expected a file named .npz, .hdf5 or .h5"),
    "empty npz": (content("data.npz", b""), [], "expected an .npz archive"),
    "empty hdf5": (content("data.hdf5", b""), [], "expected an HDF5 file"),
    "text named hdf5": (content("data.hdf5", b"observations,actions\n"), [], "expected an HDF5 file"),
    "text named npz": (content("data.npz", b"observations,actions\n"), [], "expected an .npz archive"),
    "cut hdf5": (damaged(hdf5(rows()), cut), [], "expected an HDF5 file"),
    "cut npz": (damaged(npz(rows()), cut), [], "expected an .npz archive"),
    "flipped bits": (damaged(compressed, flip), [], "expected an .npz archive"),
    "npy named npz": (single_array, [], "expected an .npz archive, got a single array"),
    "a petabyte": (claims_a_petabyte, [], "larger than this machine's memory"),
}


@pytest.mark.parametrize(("make", "flags", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_on_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Make, flags: list[str], message: str
) -> None:
    out = tmp_path / "out" / "run"
    line = refused([str(make(tmp_path)), "--out", str(out), *QUICK, *flags], capsys)
    assert message in line
    assert not out.parent.exists()


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refusal says."""
    with pytest.raises(SystemExit) as caught:
        train.main(arguments)
    assert caught.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert said[-1].startswith("lom-train: ")
    assert not any("Traceback" in line or "lom-train" in line for line in said[:-1]), said
    return said[-1]


@pytest.mark.parametrize("make", [npz(rows(20)), compressed, hdf5(rows(20)), minari()], ids=FILE_KINDS)
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, make: Make) -> None:
    path = make(tmp_path)
    if path.is_dir():
        path = path / "data" / "main_data.hdf5"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refusals = 0
    for _ in range(250):
        data = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.3 else whole)
        for place in rng.integers(max(len(data), 1), size=rng.integers(20)):
            data[place : place + 1] = rng.bytes(1)
        path.write_bytes(data)
        try:
            load_transitions([path])
        except DatasetError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017
            refusals += 1
    assert refusals > 50


def test_files_that_do_not_fit_each_other_are_refused_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_arrays(tmp_path / "first.npz", rows())
    second = write_arrays(tmp_path / "second.hdf5", rows(observation_dim=4))
    line = refused([str(first), str(second), "--out", str(tmp_path / "run"), *QUICK], capsys)
    assert f"{second}: observations: expected shape [60, 3] as of {first}, got [60, 4]" in line


@contextmanager
def nobody() -> Iterator[None]:
    """As a user who may not read other people's files; root reads all of them."""
    privileged = os.geteuid() == 0
    if privileged:
        os.seteuid(65534)
    try:
        yield
    finally:
        if privileged:
            os.seteuid(0)


@pytest.mark.parametrize("name", ["data.npz", "data.hdf5", "data-v0"])
def test_what_may_not_be_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = tmp_path / name
    if path.suffix:
        write_arrays(path, rows()).chmod(0)
    else:
        write_minari(path, [minari_episode(2)]).chmod(0)
    with nobody():
        line = refused([str(path), "--out", "no-such-folder/run", *QUICK], capsys)
        assert f"{path}: cannot be read: Permission denied" in line
    path.chmod(0o700)


def test_a_run_where_nobody_may_look_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    with nobody():
        line = refused(["gone.npz", "--out", str(closed / "run"), *QUICK], capsys)
    assert f"--out {closed / 'run'}: cannot be looked at: Permission denied" in line
    closed.chmod(0o700)


def test_a_million_rows_fit_into_four_gigabytes(tmp_path: Path) -> None:
    few, many = (dataset_memory.Arguments(rows=n, observation_dim=17, action_dim=6) for n in (10_000, 110_000))
    paths = [dataset_memory.write_file(tmp_path / f"{a.rows}.hdf5", a) for a in (few, many)]
    peak_few, peak_many = dataset_memory.peak_bytes(paths)
    bytes_per_row = (peak_many - peak_few) / (many.rows - few.rows)
    assert peak_few + bytes_per_row * 1_000_000 < 4e9
