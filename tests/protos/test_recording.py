"""The spool: whole up to wherever its writer was cut off, and nothing that is not whole counts."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from lom_api.recording import finish_recordings
from lom_api.recording.spool import OUTCOME, Layout, SpoolWriter, Step, floats, read_spool

LAYOUT = Layout(
    recorded_by="test",
    policy="toy",
    inputs=(("left", (2,)), ("right", (1, 1))),
    low=(-1.0,),
    high=(1.0,),
    longest_gap_ns=10**9,
)
OTHER = Layout(recorded_by="test", policy="", inputs=(("", (1,)),), low=(0.0,), high=(2.0,), longest_gap_ns=1)
STEPS = [
    (LAYOUT, Step(observation=floats([1, 2, 3]), action=floats([0.5]), sequence=1, variant="greedy_mode", mode=2)),
    (LAYOUT, Step(observation=floats([4, 5, 6]), action=floats([0.25]), policy_action=floats([0.75]), sequence=2)),
    (OTHER, Step(observation=floats([7]), action=floats([1.5]), sequence=2**63, reason="ü" * 100)),
    (LAYOUT, Step(observation=floats([8, 9, 0]), action=floats([0]), kind=OUTCOME, reward=2.5, has_outcome=True)),
]


def written(folder: Path) -> bytes:
    writer = SpoolWriter(folder)
    for layout, step in STEPS:
        writer.add(layout, step)
        writer.flush()
    writer.close()
    return writer.path.read_bytes()


def test_what_was_put_in_comes_out(tmp_path: Path) -> None:
    facts, rows = read_spool(io.BytesIO(written(tmp_path)))
    assert facts.wall_ns > 10**18
    parts = list(rows)
    assert [layout for layout, _, _ in parts] == [layout for layout, _ in STEPS]
    (first, second, third, fourth) = (part[0] for _, part, _ in parts)
    texts = parts[0][2]
    assert first["observation"].tolist() == [1, 2, 3]
    assert (first["action"].tolist(), first["sequence"], first["mode"]) == ([0.5], 1, 2)
    assert texts[int(first["variant"])] == "greedy_mode"
    assert (bool(first["is_answered"]), bool(second["is_answered"])) == (False, True)
    assert np.isnan(first["policy_action"]).all()
    assert second["policy_action"].tolist() == [0.75]
    assert int(third["sequence"]) == 2**63
    assert texts[int(third["reason"])] == "ü" * 64
    assert (int(fourth["kind"]), float(fourth["reward"])) == (OUTCOME, 2.5)


def test_a_spool_that_is_cut_off_anywhere_is_read_up_to_there(tmp_path: Path) -> None:
    content = written(tmp_path)
    counts: list[int] = []
    for length in range(len(content) + 1):
        try:
            _, rows = read_spool(io.BytesIO(content[:length]))
        except ValueError:
            assert not counts  # not even begun
            continue
        counts.append(len(list(rows)))
    assert counts == sorted(counts)
    assert set(counts) == {0, 1, 2, 3, 4}
    assert counts.count(4) == 1


def test_a_flipped_bit_ends_it(tmp_path: Path) -> None:
    content = bytearray(written(tmp_path))
    whole = len(list(read_spool(io.BytesIO(bytes(content)))[1]))
    for place in range(200, len(content), 7):
        content[place] ^= 16
        try:
            found = len(list(read_spool(io.BytesIO(bytes(content)))[1]))
        except ValueError:
            found = 0
        assert found < whole, place
        content[place] ^= 16


def test_a_step_that_does_not_fit_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path)
    for step in (
        Step(observation=floats([1]), action=floats([0.5])),
        Step(observation=floats([1, 2, 3]), action=floats([0.5, 0.5])),
        Step(observation=floats([1, 2, 3]), action=floats([0.5]), policy_action=floats([1, 2])),
    ):
        with pytest.raises(ValueError, match="width"):
            writer.add(LAYOUT, step)
    writer.add(*STEPS[0])
    writer.flush()
    writer.close()
    with writer.path.open("rb") as file:
        ((_, rows, _),) = list(read_spool(file)[1])
    assert len(rows) == 1


def step(number: int, **changes: Any) -> Step:
    """Observes (number, 0, stream), acts number / 10,000; a millisecond after the one before."""
    stream = changes.get("stream", 0)
    values: dict[str, Any] = {
        "observation": floats([number, 0, stream]),
        "action": floats([number / 10_000]),
        "sequence": number,
        "monotonic_ns": number * 1_000_000,
        "bundle_digest": f"d{number // 1000}",
    }
    return Step(**(values | changes))


def episodes_of(folder: Path, steps: Iterable[Step], *, flush_every: int = 100, layout: Layout = LAYOUT) -> list[Any]:
    """What becomes of them: by episode, the numbers that were observed, and the arrays of actions and infos."""
    writer = SpoolWriter(folder)
    for count, one in enumerate(steps):
        writer.add(layout, one)
        if count % flush_every == 0:
            writer.flush()
    writer.flush()
    writer.close()
    found = []
    for path in finish_recordings(folder):
        with h5py.File(path / "data" / "main_data.hdf5") as file:
            for number in range(len(file)):
                group = file[f"episode_{number}"]
                numbers = group["observations/left"][:, 0].astype(int).tolist()
                steps_of_it = len(numbers) - 1
                assert len(group["actions"]) == len(group["rewards"]) == steps_of_it == group.attrs["total_steps"]
                np.testing.assert_allclose(group["actions"][:, 0], np.array(numbers[:steps_of_it]) / 10_000, rtol=1e-6)
                assert {len(info) for info in group["infos"].values()} == {steps_of_it + 1}
                assert group["truncations"][:-1].sum() == group["terminations"][:-1].sum() == 0
                assert group["truncations"][-1] != group["terminations"][-1]
                found.append((numbers, {name: info[()] for name, info in group["infos"].items()}))
    return found


def test_a_long_episode_is_written_in_parts_and_is_one(tmp_path: Path) -> None:
    """Beside another stream, whose steps come in between."""
    mixed = [step(number, stream=stream) for number in range(1, 2601) for stream in (0, 7)]
    (one, other) = episodes_of(tmp_path, mixed, flush_every=333)
    for stream, (numbers, infos) in ((0, one), (7, other)):
        assert numbers == list(range(1, 2601))
        assert infos["sequence"].tolist() == numbers
        assert set(infos["stream"]) == {stream}
        assert infos["bundle_digest"].tolist() == [f"d{number // 1000}".encode() for number in numbers]


@pytest.mark.parametrize("flush_every", [1, 3, 100])
@pytest.mark.parametrize(
    ("seam", "before"),
    [
        ({"sequence": 8}, [1, 2, 3, 4]),
        ({"epoch": 1}, [1, 2, 3, 4]),
        ({"begins": True}, [1, 2, 3, 4]),
        ({"monotonic_ns": 10**9 + 4_000_001}, [1, 2, 3, 4]),
    ],
    ids=["number", "epoch", "begin", "pause"],
)
def test_what_does_not_follow_is_another_episode(
    tmp_path: Path, seam: dict[str, Any], before: list[int], flush_every: int
) -> None:
    later = [
        step(
            number,
            sequence=seam.get("sequence", 5) + number - 5,
            epoch=seam.get("epoch", 0),
            begins=seam.get("begins", False) and number == 5,
            monotonic_ns=seam.get("monotonic_ns", 5_000_000) + (number - 5) * 1_000_000,
        )
        for number in range(5, 8)
    ]
    found = episodes_of(tmp_path, [*map(step, range(1, 5)), *later], flush_every=flush_every)
    assert [numbers for numbers, _ in found] == [before, [5, 6, 7]]


def test_a_pause_as_long_as_is_allowed_is_none(tmp_path: Path) -> None:
    steps = [step(1), step(2, monotonic_ns=1_000_000 + 10**9), step(3, monotonic_ns=1_000_000 + 2 * 10**9)]
    assert [numbers for numbers, _ in episodes_of(tmp_path, steps)] == [[1, 2, 3]]


@pytest.mark.parametrize("flush_every", [1, 2, 100])
def test_what_is_not_finite_is_left_out_and_a_seam(tmp_path: Path, flush_every: int) -> None:
    """An observation beyond float32 is as bad as NaN: nobody could train on it."""
    steps = [step(number) for number in range(1, 8)]
    steps[3] = step(4, observation=floats([np.nan, 0, 0]))
    steps[6] = step(7, observation=floats([1e300, 0, 0]))
    found = episodes_of(tmp_path, steps, flush_every=flush_every)
    assert [numbers for numbers, _ in found] == [[1, 2, 3], [5, 6]]


def test_one_observation_alone_is_no_episode(tmp_path: Path) -> None:
    assert episodes_of(tmp_path, [step(1), step(10), step(20)]) == []
    assert not list(tmp_path.iterdir())
