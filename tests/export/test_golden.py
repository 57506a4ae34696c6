import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lom_bundle import BundleError, GoldenSpec, Manifest, SpaceSpec, VariantSpec, check_golden

Arrays = Mapping[str, NDArray[Any]]

MANIFEST = Manifest(
    policy="toy",
    inputs=(SpaceSpec(name="observation", shape=(1,), low=(-math.inf,), high=(math.inf,)),),
    action=SpaceSpec(name="action", shape=(2,), low=(-1.0, 0.0), high=(1.0, 10.0)),
    variants={"greedy_mode": VariantSpec(graph="g.onnx", outputs=("action", "mode", "margin"))},
    default_variant="greedy_mode",
    num_components=2,
    min_mixing_weight=0.05,
    golden=GoldenSpec(rows=3, action_tolerance=1e-3, tie_width=0.1),
)
GOLDEN: dict[str, NDArray[Any]] = {
    "observation": np.zeros((3, 1), np.float32),
    "greedy_mode.action": np.array([[0.0, 5.0], [0.5, 1.0], [0.5, 1.0]], np.float32),
    "greedy_mode.mode": np.array([0, 1, 1], np.int32),
    "greedy_mode.margin": np.array([1.0, 0.05, np.nan], np.float32),  # a clear row, a tie, a row without runner-up
}


def report(action: NDArray[Any] | None = None, mode: list[int] | None = None) -> Any:
    outputs = {
        "action": GOLDEN["greedy_mode.action"] if action is None else action,
        "mode": np.array([0, 1, 1] if mode is None else mode, np.int32),
    }
    return check_golden(MANIFEST, "greedy_mode", lambda inputs: outputs, GOLDEN)


def changed(row: int, column: int, by: float) -> NDArray[Any]:
    action = GOLDEN["greedy_mode.action"].copy()
    action[row, column] += by
    return action


def test_differences_are_measured_as_a_share_of_each_elements_range() -> None:
    assert report(changed(0, 1, 0.005)).action_error == pytest.approx(0.0005, rel=1e-2)
    assert report(changed(0, 0, 0.001)).action_error == pytest.approx(0.0005, rel=1e-2)


def test_a_tie_may_go_either_way_and_is_counted() -> None:
    got = report(changed(1, 1, 8.0), mode=[0, 0, 1])
    assert (got.rows, got.ties) == (3, 1)


@pytest.mark.parametrize(
    ("action", "mode", "message"),
    [
        (changed(0, 1, 0.02), None, r"row 0: action: expected within 0\.001"),
        (None, [1, 1, 1], r"row 0: mode: expected 0, got 1 at margin 1"),
        (None, [0, 1, 0], r"row 2: mode: expected 1, got 0 at margin nan"),
        (changed(2, 0, np.nan), None, r"row 2: action: expected a value inside"),
        (changed(1, 0, np.inf), None, r"row 1: action: expected a value inside"),
        (changed(1, 1, 20.0), None, r"row 1: action: expected a value inside"),  # a tie is no licence to leave bounds
        (GOLDEN["greedy_mode.action"].astype(np.float64), None, r"expected float32\[3, 2\], got float64\[3, 2\]"),
        (GOLDEN["greedy_mode.action"][:2], None, r"got float32\[2, 2\]"),
    ],
)
def test_a_wrong_answer_is_named(action: NDArray[Any] | None, mode: list[int] | None, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        report(action, mode)
    assert caught.value.reason == "SELF_TEST_FAILED"
