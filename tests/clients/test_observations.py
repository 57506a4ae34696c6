"""What may be sent, and how the rest is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, [[1, 2, 3]])


REFUSED: list[tuple[Callable[[], Any], str, str]] = [
    (lambda: ["a", "b", "c"], "BAD_DTYPE", "real numbers"),
    (lambda: [True, False, True], "BAD_DTYPE", "bool"),
    (lambda: [1j, 0, 0], "BAD_DTYPE", "complex"),
    (lambda: [None, 0, 0], "BAD_DTYPE", "object"),
    (lambda: [2**24 + 1, 0, 0], "BAD_DTYPE", "2^24"),
    (lambda: [-(2**24) - 1, 0, 0], "BAD_DTYPE", "2^24"),
    (lambda: [[1, 2, 3], [1]], "BAD_SHAPE", "numpy says"),
    (Unconvertible, "BAD_SHAPE", "requires grad"),
    (lambda: 1.0, "BAD_RANK", "0 dimensions"),
    (lambda: np.zeros((1, 1, 3)), "BAD_RANK", "3 dimensions"),
    (lambda: np.zeros(4), "BAD_SHAPE", "expected width 3, got 4"),
    (lambda: np.zeros((0, 3)), "EMPTY_BATCH", "got 0"),
    (lambda: np.zeros((65, 3)), "BATCH_TOO_LARGE", "at most 64 rows, got 65"),
    (lambda: [1e39, 0, 0], "NON_FINITE", "observation[0, 0]"),
]


@pytest.mark.parametrize(("observations", "reason", "words"), REFUSED)
def test_what_would_lose_its_meaning_is_refused(observations: Callable[[], Any], reason: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        observation_rows(observations(), SPEC)
    assert caught.value.reason == reason
    assert words in caught.value.detail


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
