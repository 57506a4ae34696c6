"""The closed vocabulary of reason codes that start every error message on the wire."""

from enum import StrEnum


class Reason(StrEnum):
    """Why a request was not answered. A message reads `CODE: what was wrong, what was expected, what was got`."""

    # The request contradicts the contract (gRPC INVALID_ARGUMENT).
    MISSING_MODEL = "MISSING_MODEL"
    BAD_MODEL_NAME = "BAD_MODEL_NAME"
    BAD_VERSION = "BAD_VERSION"
    UNKNOWN_VARIANT = "UNKNOWN_VARIANT"
    MISSING_INPUT = "MISSING_INPUT"
    UNKNOWN_INPUT = "UNKNOWN_INPUT"
    DUPLICATE_INPUT = "DUPLICATE_INPUT"
    UNKNOWN_DTYPE = "UNKNOWN_DTYPE"
    BAD_DTYPE = "BAD_DTYPE"
    BAD_RANK = "BAD_RANK"
    BAD_DIM = "BAD_DIM"
    BAD_SHAPE = "BAD_SHAPE"
    SHAPE_OVERFLOW = "SHAPE_OVERFLOW"
    SIZE_MISMATCH = "SIZE_MISMATCH"
    EMPTY_BATCH = "EMPTY_BATCH"
    BATCH_TOO_LARGE = "BATCH_TOO_LARGE"
    BATCH_MISMATCH = "BATCH_MISMATCH"
    NON_FINITE = "NON_FINITE"

    # The bytes are no message of the contract (gRPC INTERNAL, as gRPC itself answers them).
    BAD_MESSAGE = "BAD_MESSAGE"

    # The policy asked for is not here, or is not the one that the caller expects.
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    VERSION_NOT_FOUND = "VERSION_NOT_FOUND"
    CONTRACT_MISMATCH = "CONTRACT_MISMATCH"

    # The server cannot answer in time, or at all, just now.
    QUEUE_FULL = "QUEUE_FULL"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    MODEL_LOADING = "MODEL_LOADING"
    DRAINING = "DRAINING"

    # The server failed.
    INFERENCE_FAILED = "INFERENCE_FAILED"
    BAD_MODEL_OUTPUT = "BAD_MODEL_OUTPUT"
    NON_FINITE_ACTION = "NON_FINITE_ACTION"
    INTERNAL_ERROR = "INTERNAL_ERROR"
