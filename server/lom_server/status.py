"""The only place where reasons become gRPC statuses and sentences become status messages."""

from collections.abc import Mapping
from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2, status_pb2

from lom_api.reasons import Reason
from lom_server.errors import PolicyError, log_incident

MAX_MESSAGE_BYTES = 256
ERROR_DOMAIN = "lom"

_CODES: Mapping[Reason, grpc.StatusCode] = {
    Reason.MISSING_MODEL: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.BAD_MODEL_NAME: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.BAD_VERSION: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.UNKNOWN_VARIANT: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.BAD_OPTION: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.UNKNOWN_PARAMETER: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.TOO_MANY_PARAMETERS: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.UNKNOWN_OUTPUT: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.SEQ_NOT_INCREASING: grpc.StatusCode.INVALID_ARGUMENT,
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
    Reason.OBS_OUT_OF_RANGE: grpc.StatusCode.OUT_OF_RANGE,
    Reason.BAD_MESSAGE: grpc.StatusCode.INTERNAL,
    Reason.MODEL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.VERSION_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.CONTRACT_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.MODEL_FAILED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.QUEUE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.DEADLINE_INFEASIBLE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.TOO_MANY_CALLS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.SLOW_CONSUMER: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.STREAM_IDLE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.SUPERSEDED: grpc.StatusCode.ABORTED,
    Reason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.CANCELLED: grpc.StatusCode.CANCELLED,
    Reason.MODEL_LOADING: grpc.StatusCode.UNAVAILABLE,
    Reason.DRAINING: grpc.StatusCode.UNAVAILABLE,
    Reason.AUTH_REQUIRED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.ROLE_REQUIRED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.UNSUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
    Reason.STORE_UNREADABLE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.BUNDLE_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.BUNDLE_INCOMPLETE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.BUNDLE_UNSAFE_FILE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.BAD_MANIFEST: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.BAD_GRAPH: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.BAD_SIGNATURE: grpc.StatusCode.PERMISSION_DENIED,
    Reason.DIGEST_MISMATCH: grpc.StatusCode.DATA_LOSS,
    Reason.EXTERNAL_DATA_FORBIDDEN: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.OP_FORBIDDEN: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.MODEL_TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.WARMUP_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.SELF_TEST_FAILED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.PROVIDER_UNAVAILABLE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.VERIFIER_LOST: grpc.StatusCode.INTERNAL,
    Reason.WORKER_LOST: grpc.StatusCode.UNAVAILABLE,
    Reason.RELOAD_IN_PROGRESS: grpc.StatusCode.ABORTED,
    Reason.LAST_VERSION: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.NO_PREVIOUS_VERSION: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.INFERENCE_FAILED: grpc.StatusCode.INTERNAL,
    Reason.BAD_MODEL_OUTPUT: grpc.StatusCode.INTERNAL,
    Reason.NON_FINITE_ACTION: grpc.StatusCode.INTERNAL,
    Reason.INTERNAL_ERROR: grpc.StatusCode.INTERNAL,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """What a caller is told.

    Attributes:
        message: `REASON_CODE: text`, at most 256 bytes of printable ASCII on one line.
        retry_after_ms: a hint, or None.
    """

    code: grpc.StatusCode
    reason: Reason
    message: str
    retry_after_ms: int | None

    @property
    def trailers(self) -> tuple[tuple[str, bytes], ...]:
        """The same as `google.rpc.Status`, for callers that read `ErrorInfo` instead of text."""
        code: int = self.code.value[0]
        rich = status_pb2.Status(code=code, message=self.message)
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=ERROR_DOMAIN)
        rich.details.add().Pack(info)
        if self.retry_after_ms is not None:
            retry = error_details_pb2.RetryInfo()
            retry.retry_delay.FromMilliseconds(self.retry_after_ms)
            rich.details.add().Pack(retry)
        return (("grpc-status-details-bin", rich.SerializeToString()),)


def status_of(error: Exception) -> Status:
    """What is to be told of `error`.

    What is no `PolicyError` is a defect of the server: INTERNAL with an id under which the log has the traceback.
    """
    if not isinstance(error, PolicyError):
        incident = log_incident("request failed", error)
        error = PolicyError(Reason.INTERNAL_ERROR, f"the request could not be answered, id {incident}")
    text = str(error)
    if error.retry_after_ms is not None:
        text += f"; retry_after_ms {error.retry_after_ms}"
    return Status(
        code=_CODES[error.reason], reason=error.reason, message=_one_line(text), retry_after_ms=error.retry_after_ms
    )


def _one_line(text: str) -> str:
    printable = "".join(character if " " <= character <= "~" else "?" for character in text)
    return printable if len(printable) <= MAX_MESSAGE_BYTES else printable[: MAX_MESSAGE_BYTES - 3] + "..."
