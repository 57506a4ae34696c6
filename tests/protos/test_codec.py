import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lom_api.codec import CodecError, pack_array, unpack_tensor
from lom_api.reasons import Reason
from lom_api.v1 import policy_pb2

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)
ARRAYS = st.one_of(hnp.arrays(np.float32, SHAPES), hnp.arrays(np.int32, SHAPES))


@given(ARRAYS, st.booleans(), st.booleans())
def test_an_array_survives_the_wire_bit_for_bit(array: np.ndarray, big_endian: bool, transposed: bool) -> None:
    sent = array.astype(array.dtype.newbyteorder(">")) if big_endian else array
    sent = sent.T if transposed else sent
    message = policy_pb2.Tensor.FromString(pack_array(sent, "x").SerializeToString())
    received = unpack_tensor(message)
    assert message.name == "x"
    assert received.shape == sent.shape
    assert received.dtype == array.dtype
    assert received.tobytes() == np.ascontiguousarray(array.T if transposed else array).tobytes()


def test_special_values_travel_as_the_bits_that_they_are() -> None:
    bits = np.array([0x00000001, 0x80000000, 0x7FA00000, 0x7FC00000, 0x7F800000], np.uint32)  # subnormal, -0, NaNs, inf
    assert unpack_tensor(pack_array(bits.view(np.float32))).view(np.uint32).tolist() == bits.tolist()


def test_the_wire_is_row_major_little_endian() -> None:
    message = pack_array(np.array([[1.0, 2.0]], np.float32))
    assert message.data == b"\x00\x00\x80\x3f\x00\x00\x00\x40"
    assert list(message.shape) == [1, 2]


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.float16, np.uint8, np.bool_, object])
def test_no_dtype_is_cast_silently(dtype: type) -> None:
    with pytest.raises(CodecError) as caught:
        pack_array(np.zeros(2, dtype))
    assert caught.value.reason is Reason.BAD_DTYPE


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "reason"),
    [
        (0, [1], b"\0" * 4, Reason.UNKNOWN_DTYPE),
        (999, [1], b"\0" * 4, Reason.UNKNOWN_DTYPE),
        (1, [], b"\0" * 4, Reason.BAD_RANK),
        (1, [1] * 9, b"\0" * 4, Reason.BAD_RANK),
        (1, [-1, -1], b"\0" * 4, Reason.BAD_DIM),
        (1, [2, 2], b"\0" * 15, Reason.SIZE_MISMATCH),
        (1, [2, 2], b"\0" * 17, Reason.SIZE_MISMATCH),
        (1, [2**31], b"", Reason.SHAPE_OVERFLOW),
        (1, [2**62, 2**62], b"", Reason.SHAPE_OVERFLOW),
        (1, [0, 2**62], b"", Reason.SHAPE_OVERFLOW),
    ],
)
def test_a_tensor_that_contradicts_itself_is_named(dtype: int, shape: list[int], data: bytes, reason: Reason) -> None:
    message = policy_pb2.Tensor(dtype=dtype, shape=shape, data=data)  # type: ignore[arg-type]
    with pytest.raises(CodecError) as caught:
        unpack_tensor(message)
    assert caught.value.reason is reason


def test_an_empty_batch_is_a_valid_array() -> None:
    """Refusing it is the service's business; the codec only carries it."""
    assert unpack_tensor(pack_array(np.zeros((0, 3), np.float32))).shape == (0, 3)
