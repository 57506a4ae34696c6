"""Whatever a caller holds, as the float32 rows that may be sent, or a refusal that names the culprit."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lom_api.reasons import Reason
from lom_client.errors import InvalidRequest
from lom_client.spec import PolicySpec

# Every integer up to here has an exact float32; beyond it neighbours merge.
_MAX_EXACT_INTEGER = 2**24


def observation_rows(observations: ArrayLike, spec: PolicySpec) -> tuple[NDArray[np.float32], tuple[int, ...]]:
    """The observations as finite float32[B, O], and the leading axes of the answer: `(B,)`, or `()` for one row `[O]`.

    float64 is rounded to float32 here, on purpose: gymnasium environments observe in float64, policies in float32.
    Nothing else is converted in a way that could change its meaning.

    Raises:
        InvalidRequest: BAD_DTYPE for what is no real number, or for an integer beyond 2^24 that float32 would round;
            BAD_RANK, BAD_SHAPE, EMPTY_BATCH or BATCH_TOO_LARGE for a wrong shape; NON_FINITE, naming the index, for
            NaN, infinity or a number beyond float32's range.
    """
    try:
        given = np.asarray(observations)
    except Exception as error:  # a foreign object's own conversion may raise anything
        raise InvalidRequest(Reason.BAD_SHAPE, f"expected an array of numbers, numpy says: {error}") from None
    if given.dtype.kind not in "fiu":
        raise InvalidRequest(Reason.BAD_DTYPE, f"expected real numbers, got {given.dtype}")
    if given.ndim not in (1, 2):
        raise InvalidRequest(Reason.BAD_RANK, f"expected one row [O] or rows [B, O], got {given.ndim} dimensions")

    width = spec.observation.width
    if given.shape[-1] != width:
        raise InvalidRequest(Reason.BAD_SHAPE, f"observation: expected width {width}, got {given.shape[-1]}")
    rows = given.reshape(-1, width)
    if len(rows) == 0:
        raise InvalidRequest(Reason.EMPTY_BATCH, "expected at least one row, got 0")
    if len(rows) > spec.max_batch_rows:
        raise InvalidRequest(Reason.BATCH_TOO_LARGE, f"expected at most {spec.max_batch_rows} rows, got {len(rows)}")
    if given.dtype.kind in "iu" and (rows.max() > _MAX_EXACT_INTEGER or rows.min() < -_MAX_EXACT_INTEGER):
        raise InvalidRequest(Reason.BAD_DTYPE, "expected integers of at most 2^24, which float32 holds exactly")

    with np.errstate(over="ignore"):  # what overflows is infinite, and refused below
        converted = rows.astype(np.float32)
    finite = np.isfinite(converted)
    if not finite.all():
        row, column = (int(index) for index in np.argwhere(~finite)[0])
        raise InvalidRequest(
            Reason.NON_FINITE, f"observation[{row}, {column}]: expected a finite float32, got {rows[row, column]}"
        )
    return converted, given.shape[:-1]
