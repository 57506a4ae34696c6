"""Whatever a caller holds, as the float32 rows that may be sent, or a refusal that names the culprit."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lom_api.reasons import Reason
from lom_client.errors import InvalidRequest
from lom_client.spec import PolicySpec, Space

Observations: TypeAlias = ArrayLike | Mapping[str, ArrayLike]

GOAL_KEYS = ("observation", "desired_goal")
"""A goal environment's policy sees what is and what is wanted, in this order."""

# Every integer up to here has an exact float32; beyond it neighbours merge.
_MAX_EXACT_INTEGER = 2**24


def observation_rows(
    observations: Observations, spec: PolicySpec
) -> tuple[dict[str, NDArray[np.float32]], tuple[int, ...]]:
    """The observations as finite float32[B, ...] by input, and the leading axes of the answer: `(B,)`, or `()`.

    `()` answers a single row. Observations that are no mapping are those of the only input.

    float64 is rounded to float32 here, on purpose: gymnasium environments observe in float64, policies in float32.
    Nothing else is converted in a way that could change its meaning.

    Raises:
        InvalidRequest: MISSING_INPUT or UNKNOWN_INPUT; BAD_DTYPE for what is no real number, or for an integer beyond
            2^24 that float32 would round; BAD_RANK, BAD_SHAPE, EMPTY_BATCH, BATCH_TOO_LARGE or BATCH_MISMATCH for a
            wrong shape; NON_FINITE, naming the index, for NaN, infinity or a number beyond float32's range.
    """
    names = [space.name for space in spec.inputs]
    if not isinstance(observations, Mapping):
        if len(names) > 1:
            raise InvalidRequest(Reason.MISSING_INPUT, f"expected a mapping with the inputs {', '.join(names)}")
        observations = {names[0]: observations}
    for name in observations:
        if name not in names:
            raise InvalidRequest(Reason.UNKNOWN_INPUT, f"expected {', '.join(names)}, got {str(name)[:64]!r}")
    rows: dict[str, NDArray[np.float32]] = {}
    leading: tuple[int, ...] | None = None
    for space in spec.inputs:
        if space.name not in observations:
            raise InvalidRequest(Reason.MISSING_INPUT, f"expected the input {space.name}, got none")
        given = _numbers(observations[space.name], space)
        axes = given.shape[: given.ndim - len(space.shape)]
        if leading is None:
            leading = axes
        elif axes != leading:
            raise InvalidRequest(
                Reason.BATCH_MISMATCH,
                f"{space.name}: expected rows {list(leading)} as in {names[0]}, got {list(axes)}",
            )
        rows[space.name] = _float32_rows(given.reshape(-1, *space.shape), space, spec.max_batch_rows)
    return rows, leading or ()


def goal_as_vector(observations: Observations) -> NDArray[Any]:
    """A goal environment's observations, one or rows of them, as the vectors that its policy sees.

    **Shapes**: `observation` `[..., O]` and `desired_goal` `[..., G]` become `[..., O + G]`. What is no mapping stays
    as it is.
    """
    if isinstance(observations, Mapping):
        return np.concatenate([np.asarray(observations[key]) for key in GOAL_KEYS], axis=-1)
    return np.asarray(observations)


def _numbers(values: ArrayLike, space: Space) -> NDArray[Any]:
    try:
        given = np.asarray(values)
    except Exception as error:  # a foreign object's own conversion may raise anything
        raise InvalidRequest(Reason.BAD_SHAPE, f"expected an array of numbers, numpy says: {error}") from None
    if given.dtype.kind not in "fiu":
        raise InvalidRequest(Reason.BAD_DTYPE, f"{space.name}: expected real numbers, got {given.dtype}")
    rank = len(space.shape)
    if given.ndim not in (rank, rank + 1):
        raise InvalidRequest(
            Reason.BAD_RANK,
            f"{space.name}: expected {rank} dimensions for one row or {rank + 1} for many, got {given.ndim}",
        )
    if given.shape[given.ndim - rank :] != space.shape:
        raise InvalidRequest(
            Reason.BAD_SHAPE,
            f"{space.name}: expected {list(space.shape)} per row, got {list(given.shape[given.ndim - rank :])}",
        )
    return given


def _float32_rows(rows: NDArray[Any], space: Space, max_rows: int) -> NDArray[np.float32]:
    if len(rows) == 0:
        raise InvalidRequest(Reason.EMPTY_BATCH, "expected at least one row, got 0")
    if len(rows) > max_rows:
        raise InvalidRequest(Reason.BATCH_TOO_LARGE, f"expected at most {max_rows} rows, got {len(rows)}")
    if rows.dtype.kind in "iu" and (rows.max() > _MAX_EXACT_INTEGER or rows.min() < -_MAX_EXACT_INTEGER):
        raise InvalidRequest(
            Reason.BAD_DTYPE, f"{space.name}: expected integers of at most 2^24, which float32 holds exactly"
        )
    with np.errstate(over="ignore"):  # what overflows is infinite, and refused below
        converted = rows.astype(np.float32)
    finite = np.isfinite(converted)
    if not finite.all():
        index = tuple(int(axis) for axis in np.argwhere(~finite)[0])
        raise InvalidRequest(
            Reason.NON_FINITE, f"{space.name}{list(index)}: expected a finite float32, got {rows[index]}"
        )
    return converted
