"""The one place where arrays become `Tensor` messages and back.

Row-major and little-endian on the wire. Nothing is cast silently: a tensor of another dtype than
the one that was asked for is an error, because a silent cast hides a swapped unit or a wrong sensor.
"""

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lom_api.reasons import Reason
from lom_api.v1 import policy_pb2

Array: TypeAlias = NDArray[Any]
DataType: TypeAlias = policy_pb2.DataType.ValueType

MAX_RANK = 8
_MAX_ELEMENTS = 2**31 - 1

_NUMPY_DTYPES: dict[int, np.dtype[Any]] = {
    policy_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    policy_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
}
_WIRE_DTYPES: dict[np.dtype[Any], DataType] = {
    np.dtype("<f4"): policy_pb2.DATA_TYPE_FLOAT32,
    np.dtype("<i4"): policy_pb2.DATA_TYPE_INT32,
}


class CodecError(ValueError):
    """A tensor that contradicts itself. `reason` is its wire code, `detail` the sentence without it."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def wire_dtype(dtype: Any) -> DataType:
    """The wire's name for a numpy dtype.

    Raises:
        CodecError: BAD_DTYPE, for a dtype that does not travel.
    """
    wanted = np.dtype(dtype).newbyteorder("<")
    if wanted not in _WIRE_DTYPES:
        raise CodecError(Reason.BAD_DTYPE, f"expected float32 or int32, got {np.dtype(dtype)}")
    return _WIRE_DTYPES[wanted]


def pack_array(array: Array, name: str = "") -> policy_pb2.Tensor:
    """Array to message; any memory layout and byte order of float32 or int32.

    Raises:
        CodecError: BAD_DTYPE, for any other dtype.
    """
    dtype = wire_dtype(array.dtype)
    little_endian = np.ascontiguousarray(array, dtype=_NUMPY_DTYPES[dtype])
    return policy_pb2.Tensor(name=name, dtype=dtype, shape=array.shape, data=little_endian.tobytes())


def unpack_tensor(tensor: policy_pb2.Tensor) -> Array:
    """Message to array. The array is a read-only view of the message's bytes.

    Raises:
        CodecError: UNKNOWN_DTYPE, BAD_RANK, BAD_DIM, SHAPE_OVERFLOW or SIZE_MISMATCH; nothing is
            allocated before the shape has been checked against the bytes.
    """
    dtype = _NUMPY_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise CodecError(Reason.UNKNOWN_DTYPE, f"expected float32 (1) or int32 (2), got {int(tensor.dtype)}")
    shape = tuple(tensor.shape)
    if not 1 <= len(shape) <= MAX_RANK:
        raise CodecError(Reason.BAD_RANK, f"expected 1 to {MAX_RANK} dimensions, got {len(shape)}")
    if any(dim < 0 for dim in shape):
        raise CodecError(Reason.BAD_DIM, f"expected dimensions of 0 or more, got {min(shape)}")
    elements = math.prod(shape)
    if elements > _MAX_ELEMENTS or max(shape) > _MAX_ELEMENTS:
        raise CodecError(Reason.SHAPE_OVERFLOW, f"expected at most {_MAX_ELEMENTS} elements")
    expected_bytes = elements * dtype.itemsize
    if len(tensor.data) != expected_bytes:
        raise CodecError(Reason.SIZE_MISMATCH, f"expected {expected_bytes} bytes, got {len(tensor.data)}")
    return np.frombuffer(tensor.data, dtype=dtype).reshape(shape)
