"""The spool: whole up to wherever its writer was cut off, and nothing that is not whole counts."""

import io
from pathlib import Path

import numpy as np
import pytest

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
