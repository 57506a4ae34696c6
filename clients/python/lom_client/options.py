"""What a caller may ask for beside an action, checked before it is sent."""

import operator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lom_api.codec import pack_array
from lom_api.reasons import Reason
from lom_api.v1 import policy_pb2
from lom_client.errors import InvalidRequest
from lom_client.spec import PolicySpec

_LARGEST_MODE = 2**31 - 1
_LARGEST_SEED = 2**64 - 1
_LARGEST_WIDTH = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True, eq=False)
class ActOptions:
    """The options of `PolicyClient.act`, which says what they mean."""

    variant: str | None = None
    explain: bool = False
    mode: int | None = None
    sampling_seed: int | None = None
    previous_mode: ArrayLike | None = None
    hysteresis_width: float = 0.0
    batch_priority: bool = False

    def write_into(self, request: policy_pb2.ActRequest, spec: PolicySpec, leading: tuple[int, ...]) -> None:
        """Adds the options to `request`, whose rows have the axes `leading`.

        Raises:
            InvalidRequest: UNKNOWN_VARIANT or BAD_OPTION.
        """
        request.variant = self._checked_variant(spec)
        if self.batch_priority:
            request.priority = policy_pb2.PRIORITY_BATCH
        request.explain = self.explain
        if self.mode is not None:
            request.mode = _checked_integer("mode", self.mode, _LARGEST_MODE)
        if self.sampling_seed is not None:
            request.sampling_seed = _checked_integer("sampling_seed", self.sampling_seed, _LARGEST_SEED)
        if self.previous_mode is not None:
            if self.mode is not None:
                raise _bad_option("previous_mode: expected no forced mode beside it, got one")
            previous_mode = _checked_modes(self.previous_mode, leading)
            request.hysteresis.previous_mode.CopyFrom(pack_array(previous_mode, "previous_mode"))
            request.hysteresis.width = self._checked_width()
        elif self.hysteresis_width:
            raise _bad_option("hysteresis_width: expected previous_mode beside it, got none")

    def _checked_variant(self, spec: PolicySpec) -> str:
        variant = spec.default_variant if self.variant is None else self.variant
        if variant not in spec.variants:
            raise InvalidRequest(
                Reason.UNKNOWN_VARIANT, f"expected one of {', '.join(spec.variants)}, got {str(variant)[:64]!r}"
            )
        return variant

    def _checked_width(self) -> float:
        # Written so that NaN fails as well.
        if not 0 <= self.hysteresis_width <= _LARGEST_WIDTH:
            raise _bad_option(f"hysteresis_width: expected a finite number of 0 or more, got {self.hysteresis_width}")
        return float(self.hysteresis_width)


def _checked_integer(name: str, value: int, largest: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise _bad_option(f"{name}: expected an integer, got {str(value)[:64]!r}") from None
    if not 0 <= number <= largest:
        raise _bad_option(f"{name}: expected 0 to {largest}, got {number}")
    return number


def _checked_modes(modes: ArrayLike, leading: tuple[int, ...]) -> NDArray[np.int32]:
    try:
        given = np.asarray(modes)
    except Exception as error:  # a foreign object's own conversion may raise anything
        raise _bad_option(f"previous_mode: expected an array of integers, numpy says: {error}") from None
    if given.dtype.kind not in "iu" or given.shape != leading:
        raise _bad_option(
            f"previous_mode: expected integers of shape {list(leading)}, one for each row, "
            f"got {given.dtype} of shape {list(given.shape)}"
        )
    if given.min() < -1 or given.max() > _LARGEST_MODE:
        raise _bad_option(f"previous_mode: expected -1 to {_LARGEST_MODE} in every row")
    return given.reshape(-1).astype(np.int32)


def _bad_option(detail: str) -> InvalidRequest:
    return InvalidRequest(Reason.BAD_OPTION, detail)
