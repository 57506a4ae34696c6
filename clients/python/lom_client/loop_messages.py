"""What a control loop and whoever asks the policy for it tell each other, as bytes."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from lom_api.reasons import Reason
from lom_client.levels import Refusal, Reply
from lom_client.observations import Observations

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer(Reply):
    """A reply with what the levels need not know. `margin` is None where there was no runner-up, or is no mode."""

    variant: str = ""
    margin: float | None = None


_ANSWER_FIELDS = tuple(field.name for field in fields(Answer))


@dataclass(frozen=True, kw_only=True)
class Question:
    """The observation of tick `sequence`, to be answered until `over_ns` of the monotonic clock, which all processes
    of a machine share. `source` says who is asked; `previous_mode` counts where the width is above 0."""

    sequence: int
    generation: int
    observed_ns: int
    over_ns: int
    source: str
    variant: str | None
    previous_mode: int
    hysteresis_width: float
    observation: bytes

    def to_bytes(self) -> bytes:
        """As `from_bytes` reads it."""
        header = json.dumps({name: getattr(self, name) for name in _HEADER_FIELDS}).encode()
        return b"".join((_LENGTH.pack(len(header)), header, self.observation))

    @classmethod
    def from_bytes(cls, message: bytes) -> Self:
        """What `to_bytes` wrote."""
        end = _LENGTH.size + _LENGTH.unpack_from(message)[0]
        return cls(**json.loads(message[_LENGTH.size : end]), observation=message[end:])


_HEADER_FIELDS = tuple(field.name for field in fields(Question) if field.name != "observation")


class UnusableObservationError(Exception):
    """An observation that cannot be sent. `reason` is its code, `detail` says which number."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def pack_observation(observation: Observations) -> bytes:
    """A copy of one row of an observation, dtypes and shapes included: equal bytes are equal observations.

    Raises:
        UnusableObservationError: BAD_SHAPE or BAD_DTYPE, it is no array of real numbers, nor a mapping to such;
            NON_FINITE, naming the number.
    """
    try:
        if isinstance(observation, Mapping):
            arrays = {str(name): np.asarray(values) for name, values in observation.items()}
        else:
            arrays = {"": np.asarray(observation)}
    except Exception:  # a foreign object's own conversion may raise anything
        raise UnusableObservationError(Reason.BAD_SHAPE.value, "observation: expected an array of numbers") from None
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise UnusableObservationError(
                Reason.BAD_DTYPE.value, f"{name or 'observation'}: expected real numbers, got {array.dtype}"
            )
        finite = np.isfinite(array)
        if np.count_nonzero(finite) != finite.size:
            index = [int(axis) for axis in np.argwhere(~finite)[0]]
            raise UnusableObservationError(Reason.NON_FINITE.value, f"{name or 'observation'}{index}")
    header = json.dumps([(name, array.dtype.str, array.shape) for name, array in arrays.items()]).encode()
    return b"".join((_LENGTH.pack(len(header)), header, *(array.tobytes() for array in arrays.values())))


def unpack_observation(packed: bytes) -> Observations:
    """What `pack_observation` packed."""
    start = _LENGTH.size + _LENGTH.unpack_from(packed)[0]
    arrays: dict[str, NDArray[Any]] = {}
    for name, dtype, shape in json.loads(packed[_LENGTH.size : start]):
        array = np.frombuffer(packed, dtype, int(np.prod(shape)), start).reshape(shape)
        start += array.nbytes
        arrays[name] = array
    return arrays[""] if list(arrays) == [""] else arrays


def packed_header(packed: bytes) -> bytes:
    """Names, dtypes and shapes of what `pack_observation` packed: equal for observations of equal form."""
    return packed[: _LENGTH.size + _LENGTH.unpack_from(packed)[0]]


def pack_reply(answer: Answer) -> bytes:
    """As `unpack_reply` reads it: every number to the bit."""
    return json.dumps({name: getattr(answer, name) for name in _ANSWER_FIELDS}).encode()


def unpack_reply(message: bytes) -> Answer:
    """What `pack_reply` packed."""
    said = json.loads(message)
    return Answer(**(said | {"action": tuple(said["action"])}))


def pack_refusal(refusal: Refusal, detail: str) -> bytes:
    """As `unpack_refusal` reads it."""
    return json.dumps((refusal.sequence, refusal.generation, refusal.reason, detail)).encode()


def unpack_refusal(message: bytes) -> tuple[Refusal, str]:
    """What `pack_refusal` packed: the refusal, and its detail for a person."""
    sequence, generation, reason, detail = json.loads(message)
    return Refusal(sequence=sequence, generation=generation, reason=reason), detail
