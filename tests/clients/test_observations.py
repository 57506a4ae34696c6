"""What may be sent, and how the rest is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from lom_client import InvalidRequest
from lom_client.observations import observation_rows
from lom_client.spec import read_spec
from tests.support.fake_policy_server import honest_spec

SPEC = read_spec(honest_spec())


class Unconvertible:
    def __array__(self, *_args: object, **_kwargs: object) -> Any:
        raise RuntimeError("a tensor that requires grad")


def test_one_row_and_many_rows_keep_their_leading_axes() -> None:
    assert observation_rows([1, 2, 3], SPEC)[1] == ()
    assert observation_rows([[1, 2, 3]], SPEC)[1] == (1,)
    assert observation_rows(np.zeros((5, 3)), SPEC)[1] == (5,)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ">f4", np.int64, np.uint8, np.int8])
def test_numbers_of_any_type_arrive_as_float32(dtype: Any) -> None:
    rows, _ = observation_rows(np.array([1, 2, 3], dtype=dtype), SPEC)
    assert rows["observation"].dtype == np.float32
    np.testing.assert_array_equal(rows["observation"], [[1, 2, 3]])


REFUSED: list[tuple[Callable[[], Any], str, str]] = [
    (lambda: ["a", "b", "c"], "BAD_DTYPE", "real numbers"),
    (lambda: [True, False, True], "BAD_DTYPE", "bool"),
    (lambda: [1j, 0, 0], "BAD_DTYPE", "complex"),
    (lambda: [None, 0, 0], "BAD_DTYPE", "object"),
    (lambda: [2**24 + 1, 0, 0], "BAD_DTYPE", "2^24"),
    (lambda: [-(2**24) - 1, 0, 0], "BAD_DTYPE", "2^24"),
    (lambda: [[1, 2, 3], [1]], "BAD_SHAPE", "numpy says"),
    (Unconvertible, "BAD_SHAPE", "requires grad"),
    (lambda: 1.0, "BAD_RANK", "got 0"),
    (lambda: np.zeros((1, 1, 3)), "BAD_RANK", "got 3"),
    (lambda: np.zeros(4), "BAD_SHAPE", "expected [3] per row, got [4]"),
    (lambda: np.zeros((0, 3)), "EMPTY_BATCH", "got 0"),
    (lambda: np.zeros((65, 3)), "BATCH_TOO_LARGE", "at most 64 rows, got 65"),
    (lambda: [1e39, 0, 0], "NON_FINITE", "observation[0, 0]"),
    (dict, "MISSING_INPUT", "observation"),
    (lambda: {"obs": [0, 0, 0]}, "UNKNOWN_INPUT", "expected observation, got 'obs'"),
    (lambda: {"observation": [0, 0, 0], 7: [0]}, "UNKNOWN_INPUT", "got '7'"),
]

TWO_INPUTS = honest_spec()
TWO_INPUTS.inputs.add().CopyFrom(TWO_INPUTS.inputs[0])
TWO_INPUTS.inputs[1].name = "image"
TWO_INPUTS.inputs[1].shape[:] = [1, 3]
REFUSED_OF_TWO: list[tuple[Any, str, str]] = [
    ([0, 0, 0], "MISSING_INPUT", "observation, image"),
    ({"observation": [0, 0, 0]}, "MISSING_INPUT", "image"),
    (
        {"observation": [[0, 0, 0]], "image": [[0, 0, 0]]},
        "BATCH_MISMATCH",
        "image: expected rows [1] as in observation, got []",
    ),
    ({"observation": np.zeros((2, 3)), "image": np.zeros((1, 1, 3))}, "BATCH_MISMATCH", "expected rows [2]"),
    ({"observation": [0, 0, 0], "image": [0, 0, 0]}, "BAD_RANK", "image: expected 2 dimensions"),
    ({"observation": [0, 0, 0], "image": [[0, 0]]}, "BAD_SHAPE", "image: expected [1, 3] per row, got [1, 2]"),
    ({"observation": [0, 0, 0], "image": [[0, 0, np.nan]]}, "NON_FINITE", "image[0, 0, 2]"),
]


@pytest.mark.parametrize(("observations", "reason", "words"), REFUSED)
def test_what_would_lose_its_meaning_is_refused(observations: Callable[[], Any], reason: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        observation_rows(observations(), SPEC)
    assert caught.value.reason == reason
    assert words in caught.value.detail


@pytest.mark.parametrize(("observations", "reason", "words"), REFUSED_OF_TWO)
def test_inputs_belong_together(observations: Any, reason: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        observation_rows(observations, read_spec(TWO_INPUTS))
    assert caught.value.reason == reason
    assert words in caught.value.detail


def test_inputs_of_any_rank_travel_by_name() -> None:
    given_rows: dict[str, ArrayLike] = {"image": [[[1, 2, 3]], [[4, 5, 6]]], "observation": [[1, 2, 3], [4, 5, 6]]}
    rows, leading = observation_rows(given_rows, read_spec(TWO_INPUTS))
    assert (leading, list(rows)) == ((2,), ["observation", "image"])
    np.testing.assert_array_equal(rows["image"], given_rows["image"])
    single, leading = observation_rows({"image": [[1, 2, 3]], "observation": [1, 2, 3]}, read_spec(TWO_INPUTS))
    assert (leading, single["image"].shape) == ((), (1, 1, 3))


@given(
    row=st.integers(0, 4), column=st.integers(0, 2), culprit=st.sampled_from([np.nan, np.inf, -np.inf, 1e300, -1e300])
)
def test_a_number_that_is_not_finite_is_named_wherever_it_is(row: int, column: int, culprit: float) -> None:
    observations = np.zeros((5, 3))
    observations[row, column] = culprit
    with pytest.raises(InvalidRequest) as caught:
        observation_rows(observations, SPEC)
    assert caught.value.reason == "NON_FINITE"
    assert f"observation[{row}, {column}]" in caught.value.detail
