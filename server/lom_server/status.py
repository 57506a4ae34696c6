"""The only place where reasons become gRPC statuses and sentences become status messages."""

from collections.abc import Mapping

import grpc

from lom_api.reasons import Reason
from lom_server.errors import PolicyError, log_incident

MAX_MESSAGE_BYTES = 256

_CODES: Mapping[Reason, grpc.StatusCode] = {
    Reason.MISSING_MODEL: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.BAD_MODEL_NAME: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.BAD_VERSION: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.UNKNOWN_VARIANT: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.MISSING_INPUT: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.UNKNOWN_INPUT: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.DUPLICATE_INPUT: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.UNKNOWN_DTYPE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.BAD_DTYPE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.BAD_RANK: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.BAD_DIM: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.BAD_SHAPE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.SHAPE_OVERFLOW: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.SIZE_MISMATCH: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.EMPTY_BATCH: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.BATCH_TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.BATCH_MISMATCH: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.NON_FINITE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.BAD_MESSAGE: grpc.StatusCode.INTERNAL,
    Reason.MODEL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.VERSION_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.CONTRACT_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.QUEUE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.MODEL_LOADING: grpc.StatusCode.UNAVAILABLE,
    Reason.DRAINING: grpc.StatusCode.UNAVAILABLE,
    Reason.INFERENCE_FAILED: grpc.StatusCode.INTERNAL,
    Reason.BAD_MODEL_OUTPUT: grpc.StatusCode.INTERNAL,
    Reason.NON_FINITE_ACTION: grpc.StatusCode.INTERNAL,
    Reason.INTERNAL_ERROR: grpc.StatusCode.INTERNAL,
}


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Code and message for `error`: `REASON_CODE: text`, at most 256 bytes of printable ASCII on one line.

    What is no `PolicyError` is a defect of the server: INTERNAL with an id under which the log has the traceback.
    """
    if isinstance(error, PolicyError):
        return _CODES[error.reason], _message(error.reason, error.detail)
    incident = log_incident("request failed", error)
    return grpc.StatusCode.INTERNAL, _message(
        Reason.INTERNAL_ERROR, f"the request could not be answered, id {incident}"
    )


def _message(reason: Reason, detail: str) -> str:
    text = f"{reason}: {detail}"
    printable = "".join(character if " " <= character <= "~" else "?" for character in text)
    return printable if len(printable) <= MAX_MESSAGE_BYTES else printable[: MAX_MESSAGE_BYTES - 3] + "..."
